"""Quality by layer with synthetic predictions; recall of proposals equals pycocotools without categories."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.sample import Annotation, DecodedSample, Segment
from m2f.data_pipeline.transforms.collate import collate_eval
from m2f.eval.config import EvaluationConfig
from m2f.eval.inference.evaluator import Evaluator, image_outputs
from m2f.eval.inference.layers import LayerAnalysis, class_agnostic_proposals, layer_table
from m2f.eval.metrics.rle import decode_mask, encode_masks
from m2f.eval.results.results import EvaluationSubject
from m2f.model.config import PostprocessConfig
from m2f.model.structures import Predictions

TABLE = CategoryTable((Category(1, "sky", False, (0, 0, 0)), Category(2, "bird", True, (0, 0, 0))))
SUBJECT = EvaluationSubject(dataset="birds", fingerprint="f" * 64)
BIRDS = {2: (0, 16, 0, 16), 3: (16, 32, 32, 64), 4: (48, 64, 0, 64)}
SIZE = 64


def birds(image_id):
    seg = np.ones((SIZE, SIZE), np.uint8)
    for i, (top, bottom, left, right) in BIRDS.items():
        seg[top:bottom, left:right] = i
    segments = tuple(
        Segment(
            id=i,
            category_id=1 if i == 1 else 2,
            is_thing=i > 1,
            is_crowd=False,
            area=float((seg == i).sum()),
            bbox=(0.0, 0.0, 1.0, 1.0),
            source_id=i,
            map="seg",
        )
        for i in (1, 2, 3, 4)
    )
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    annotation = Annotation(seg=seg, inst=None, segments=segments)
    return DecodedSample(key=f"k{image_id}", image_id=image_id, source="made", image=image, annotation=annotation)


class Improving(nn.Module):
    """Model whose layer n predicts n birds exactly. The last layer also predicts the sky."""

    def __init__(self, supervised=True):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.first = 0 if supervised else 1

    def normalise(self, images, sizes):
        return images.float()

    def forward(self, images):
        seg = torch.from_numpy(birds(0).annotation.seg)[::4, ::4]
        features = torch.full((len(images), 4, SIZE // 4, SIZE // 4), -8.0)
        for query, i in enumerate((2, 3, 4, 1)):
            features[:, query, seg == i] = 8.0
        class_logits = torch.full((4, len(images), 4, 3), -8.0)
        embeddings = torch.eye(4).expand(4, len(images), 4, 4).clone()
        for layer in range(4):
            class_logits[layer, :, :layer, 1] = 8.0
            class_logits[layer, :, layer:, 2] = 8.0
            embeddings[layer, :, layer:] = 0.0  # logits 0: no pixel is inside
        class_logits[3, :, 3] = torch.tensor([8.0, -8.0, -8.0])
        embeddings[3] = torch.eye(4)
        return Predictions(class_logits[self.first :], embeddings[self.first :], features)


def analysis_of(model):
    config = EvaluationConfig(tasks=("panoptic", "instance", "semantic"))
    evaluator = Evaluator(model, TABLE, config, model_task="panoptic", postprocess=PostprocessConfig())
    return LayerAnalysis(evaluator, TABLE)


def batch_of(*image_ids):
    return collate_eval([birds(i) for i in image_ids], tuple(range(len(image_ids))), SIZE, 4096)


def test_recall_and_pq_of_each_layer_reflect_its_predictions():
    analysis = analysis_of(Improving())
    analysis.update(batch_of(1))
    analysis.update(batch_of(2, 3))
    layers = analysis.compute(SUBJECT, num_layers=3)
    assert [q.layer for q in layers] == [0, 1, 2, 3]
    recalls = [q.metrics["AR100"] for q in layers]
    assert recalls[0] == 0
    assert recalls == sorted(recalls)
    assert recalls[3] == pytest.approx(100, abs=15)  # upsampling rounds corners
    assert [q.metrics["AR10"] for q in layers] == recalls
    assert [q.metrics["PQ"] for q in layers[:3]] == sorted(q.metrics["PQ"] for q in layers[:3])
    assert layers[3].metrics["PQ"] > 90
    assert layers[3].metrics["PQ_st"] > 90 > 1 > layers[2].metrics["PQ_st"]
    assert "layer" in layer_table(layers).splitlines()[0]


def test_layers_start_at_1_without_supervised_queries():
    analysis = analysis_of(Improving(supervised=False))
    analysis.update(batch_of(1))
    assert [q.layer for q in analysis.compute(SUBJECT, num_layers=3)] == [1, 2, 3]


def test_proposal_score_combines_all_classes():
    class_logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])
    predictions = Predictions(class_logits[None, None], torch.full((1, 1, 2, 1), 9.0), torch.ones(1, 1, 16, 16))
    (output,) = image_outputs(batch_of(1), predictions)
    proposals = class_agnostic_proposals(output)
    expected = 1 - class_logits.softmax(-1)[:, -1].double()
    np.testing.assert_allclose(proposals.scores, expected * torch.tensor(9.0).sigmoid(), rtol=2e-4)
    assert proposals.labels.tolist() == [0, 0]


def test_recall_equals_pycocotools_without_categories():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(1, 6, 16, 16, generator=generator)
    embeddings = torch.randn(1, 1, 12, 6, generator=generator)
    for query, i in enumerate((2, 3, 4)):  # three queries match a bird
        seg = torch.from_numpy(birds(0).annotation.seg)[::4, ::4]
        features[0, query] = torch.where(seg == i, 3.0, -3.0) + 3 * features[0, query]
        embeddings[0, 0, query] = torch.eye(6)[query]
    predictions = Predictions(torch.randn(1, 1, 12, 3, generator=generator), embeddings, features)

    class Fixed(Improving):
        def forward(self, images):
            return predictions

    analysis = analysis_of(Fixed())
    analysis.update(batch_of(7))
    (quality,) = analysis.compute(SUBJECT, num_layers=0)
    (output,) = image_outputs(batch_of(7), predictions)
    assert quality.metrics["AR100"] == pytest.approx(100 * coco_recall(class_agnostic_proposals(output)), abs=1e-9)
    assert 10 < quality.metrics["AR100"] < 99


def coco_recall(proposals):
    seg = birds(0).annotation.seg
    truth, results = COCO(), COCO()
    for side in (truth, results):
        images = [{"id": 7, "height": SIZE, "width": SIZE}]
        side.dataset = {"images": images, "categories": [{"id": 1}, {"id": 2}], "annotations": []}
    for i in BIRDS:
        rle = encode_masks((seg == i)[None])[0]
        entry = {"id": i, "image_id": 7, "category_id": 1 + i % 2, "segmentation": rle, "iscrowd": 0}
        truth.dataset["annotations"].append(entry | {"area": float((seg == i).sum())})
    for n, (mask, score) in enumerate(zip(proposals.mask_index, proposals.scores, strict=True), start=1):
        rle = proposals.masks[mask]
        entry = {"id": n, "image_id": 7, "category_id": 1 + n % 2, "segmentation": rle, "score": float(score)}
        results.dataset["annotations"].append(entry | {"area": float(decode_mask(rle).sum()), "iscrowd": 0})
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        results.createIndex()
        evaluation = COCOeval(truth, results, "segm")
        evaluation.params.useCats = 0
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[8]
