"""EoMT (Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025).

Axis letters: L blocks that process the queries, B images, Q queries, P class and register tokens, N patches, T all
tokens, K classes, C channels of the vision transformer, h x w pixels of the masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from m2f.model.attention import resize_for_attention
from m2f.model.backbones.plain_vit import Grid, PlainVit, with_unrotated
from m2f.model.config import ModelConfig
from m2f.model.eomt.annealing import mask_probabilities, uniform_draws
from m2f.model.eomt.config import EomtDecoderConfig
from m2f.model.errors import ConfigError
from m2f.model.layers import DoubleSize, Table, run_layer
from m2f.model.segmenter import Segmenter, TrainingContext
from m2f.model.structures import Predictions


class Upscale(nn.Sequential):
    """Turns patch tokens, as a map [B, C, ., .], into per-pixel embeddings.

    The stride is 4 for patches of 16 pixels.
    """

    def __init__(self, dim: int, patch: int) -> None:
        self.steps = max(1, int(math.log2(patch)) - 2)
        super().__init__(*(_UpscaleStep(dim) for _ in range(self.steps)))
        self.stride = patch // 2**self.steps


class _UpscaleStep(nn.Module):
    """Doubles the size. The norm is the last operation; no activation follows it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = DoubleSize(dim, dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, features: Tensor) -> Tensor:
        # The backward pass repeats the activation, which is cheaper than to keep the largest maps of the model twice.
        return self.norm(run_layer(self._activate_and_filter, True, self.conv1(features)))

    def _activate_and_filter(self, features: Tensor) -> Tensor:
        return self.conv2(F.gelu(features))


class QueryHeads(nn.Module):
    """The queries, their class and mask heads, and the mask probability of each block."""

    def __init__(self, num_queries: int, num_layers: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.query_feat = Table(num_queries, dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        hidden = (nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU())
        self.mask_embed = nn.Sequential(*hidden, nn.Linear(dim, dim))
        self.register_buffer("attn_mask_probs", torch.ones(num_layers))
        self.probabilities = (1.0,) * num_layers
        """Copy of the buffer `attn_mask_probs` on the host, because Python code branches on the values."""

    def set_probabilities(self, probabilities: tuple[float, ...]) -> None:
        """Set the mask probability of each block for the following steps."""
        if probabilities != self.probabilities:
            self.probabilities = probabilities
            for place, probability in enumerate(probabilities):
                self.attn_mask_probs[place].fill_(probability)  # a copy from the host would wait for the device

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.attn_mask_probs.is_meta:
            self.probabilities = tuple(self.attn_mask_probs.tolist())

    def tokens(self, images: int) -> Tensor:
        """Return the queries [B, Q, C] for a number of images."""
        return self.query_feat().expand(images, -1, -1)


class Encoded(NamedTuple):
    """Tokens of images before the queries join them."""

    tokens: Tensor
    """[B, P + N, C] class, register and patch tokens."""
    table: Tensor | None
    """Table of rotary positions without rows for the queries, or None."""
    grid: Grid
    """Rows and columns of patches."""
    size: tuple[int, int]
    """Height and width of the images."""


class _Prediction(NamedTuple):
    class_logits: Tensor
    mask_embeddings: Tensor
    features: Tensor
    """[B, C, ., .] per-pixel embeddings of the padded image."""


class QuerySegmenter(Segmenter):
    """Learned queries that pass through blocks together with the tokens of a plain vision transformer.

    In training, a prediction is made before each of these blocks and after the last. The masks predicted before a block
    limit the patches that each query may attend to in it. A query is masked with a probability that falls to 0 during
    training. Evaluation masks all queries in blocks whose probability is at least 0.5, and returns only the last
    prediction.
    """

    scheduled_buffers = ("transformer_decoder.attn_mask_probs",)
    backbone: PlainVit
    pixel_decoder: Upscale
    transformer_decoder: QueryHeads

    def decode(
        self, blocks: Sequence[nn.Module], norm: nn.Module, encoded: Encoded, context: TrainingContext | None
    ) -> Predictions:
        """Pass the queries through `blocks` and return the predictions. `norm` is applied for predictions only."""
        heads, grid, tokens = self.transformer_decoder, encoded.grid, encoded.tokens
        queries = heads.tokens(tokens.shape[0])
        tokens = torch.cat([queries, tokens], dim=1)
        table = with_unrotated(encoded.table, queries.shape[1])
        draws = None
        if self.training and context is not None:
            draws = uniform_draws(context, heads.num_layers, queries.shape[1])
        predictions = []
        for index, block in enumerate(blocks):
            mask, probability = None, heads.probabilities[index]
            if self.training or probability >= 0.5:
                predictions.append(self._predict(norm(tokens), grid))
            if probability >= 0.5 or (self.training and probability > 0):
                mask = self._attention_mask(predictions[-1], tokens, grid)
                if draws is not None and probability < 1:
                    released = draws[index] > probability
                    mask[:, 0, : queries.shape[1]] |= released[..., None]
            tokens = self.backbone.run(block, tokens, table, mask)
        predictions.append(self._predict(norm(tokens), grid))
        return self._joined(predictions if self.training else predictions[-1:], encoded.size)

    def _predict(self, normalised: Tensor, grid: Grid) -> _Prediction:
        """Return the prediction of normalised tokens [B, T, C] for a grid of patches."""
        heads, patches = self.transformer_decoder, math.prod(grid)
        queries = normalised[:, : heads.query_feat.num_embeddings]
        features = normalised[:, normalised.shape[1] - patches :].transpose(1, 2).unflatten(2, grid)
        return _Prediction(heads.class_embed(queries), heads.mask_embed(queries), self._upscale(features))

    def _upscale(self, features: Tensor) -> Tensor:
        if not self.pixel_decoder_fp32:
            return self.pixel_decoder(features)
        with torch.autocast(features.device.type, enabled=False):
            return self.pixel_decoder(features.float())

    @torch.no_grad()
    def _attention_mask(self, prediction: _Prediction, tokens: Tensor, grid: Grid) -> Tensor:
        """Return which tokens (columns) each token (row) may attend to, bool [B, 1, T, T].

        Queries are restricted to patches inside their masks. Resizing and the product with embeddings are both linear,
        so resizing features gives the same result as resizing logits. A query with an empty mask attends to no patch.
        """
        resized = resize_for_attention(prediction.features, grid)
        with torch.autocast(tokens.device.type, enabled=False):
            allowed = prediction.mask_embeddings.to(resized.dtype) @ resized > 0
        mask = torch.ones(tokens.shape[0], 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device)
        mask[:, 0, : allowed.shape[1], tokens.shape[1] - allowed.shape[2] :] = allowed
        return mask

    def _joined(self, predictions: list[_Prediction], size: tuple[int, int]) -> Predictions:
        """Combine the predictions and remove the padding. `size` is (height, width) of the images."""
        rows, columns = (-(-side // self.pixel_decoder.stride) for side in size)
        classes, embeddings, features = zip(*predictions, strict=True)
        *earlier, last = (feature[..., :rows, :columns] for feature in features)
        return Predictions(torch.stack(classes), torch.stack(embeddings), last, tuple(earlier))


class Eomt(QuerySegmenter):
    """A plain vision transformer whose last L blocks also process the queries."""

    def __init__(self, config: ModelConfig, backbone: PlainVit, num_classes: int) -> None:
        super().__init__(config)
        assert isinstance(config.transformer_decoder, EomtDecoderConfig)
        self._config = config.transformer_decoder
        queries, layers = self._config.num_queries, self._config.num_layers
        if layers > len(backbone.blocks):
            raise ConfigError(
                f"model.transformer_decoder.num_layers is {layers}, but the backbone has only {len(backbone.blocks)} "
                "blocks"
            )
        self.backbone = backbone
        self.pixel_decoder = Upscale(backbone.width, backbone.embed.patch)
        self.transformer_decoder = QueryHeads(queries, layers, backbone.width, num_classes)
        blocks = (f"backbone.blocks.{index}" for index in range(len(backbone.blocks)))
        self.regions = ("backbone.embed", *blocks, "pixel_decoder")

    def set_progress(self, step: int, max_steps: int) -> None:
        """Set the mask probabilities for the next step; see Segmenter."""
        self.transformer_decoder.set_probabilities(mask_probabilities(self._config, step, max_steps))

    def forward(self, images: Tensor, context: TrainingContext | None = None) -> Predictions:
        """Return predictions; see Segmenter. Images may have any size; masks have ceil(H / stride) rows."""
        vit = self.backbone
        first, blocks = len(vit.blocks) - self.transformer_decoder.num_layers, list(vit.blocks)
        tokens, table, grid = vit.embed(images)
        for block in blocks[:first]:
            tokens = vit.run(block, tokens, table)
        encoded = Encoded(tokens, table, grid, (images.shape[-2], images.shape[-1]))
        return self.decode(blocks[first:], vit.norm, encoded, context)
