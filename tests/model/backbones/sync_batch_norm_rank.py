"""One rank of test_batch_norms.py: `python sync_batch_norm_rank.py RANK FOLDER`. Not a test module."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from m2f.model.backbones.batch_norms import SyncBatchNorm2d


def run(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    given = torch.load(folder / "given.pt", weights_only=True)
    norm = SyncBatchNorm2d.like(nn.BatchNorm2d(3))
    norm.load_state_dict(given["state"])
    features = given["features"][rank].requires_grad_()
    output = norm.train()(features)
    (output * given["cotangents"][rank]).sum().backward()
    gradients = [norm.weight.grad, norm.bias.grad]
    for gradient in gradients:
        dist.all_reduce(gradient)
    torch.save([output.detach(), features.grad, *gradients, norm.state_dict()], folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]))
