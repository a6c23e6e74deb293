"""Pilots equal a slow reference, depend on the image's position, and do not depend on other images of the batch."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2f.model.config import (
    FPNPixelDecoderConfig,
    LossConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    PilotConfig,
    StandardTransformerDecoderConfig,
    TimmBackboneConfig,
)
from m2f.model.eomt.config import EomtDecoderConfig, UpscalePixelDecoderConfig
from m2f.model.errors import ConfigError
from m2f.model.loss.criterion import Normalizers, compute_losses, count_normalizers, point_counts
from m2f.model.loss.points import CounterPoints, RowIndex
from m2f.model.mask2former import build_model
from m2f.model.pilots import PilotGuides, PilotQueries, choose, covered_cells, flip_cells, padded_number
from m2f.model.segmenter import TrainingContext
from m2f.model.structures import Predictions, Targets
from m2f.model.target_pixels import pixel_owners
from m2f.model.transformer_decoder.masked import MaskedTransformerDecoder
from tests.model.loss_oracle import CLASSES, make_targets, one_hot

DIM, HEADS, QUERIES, MASK_DIM = 16, 2, 5, 8
SIZE = (64, 96)
SIZES = ((2, 3), (4, 6), (8, 12))
"""Map sizes of the levels for an input of SIZE."""
DECODER = MaskedTransformerDecoderConfig(
    num_queries=QUERIES, num_layers=4, hidden_dim=DIM, num_heads=HEADS, feedforward_dim=20
)
DECODERS = {
    "masked": DECODER,
    "mask pooling, self-attention first": replace(DECODER, attention="mask_pooling", cross_attention_first=False),
    "all levels, learnable, pre-norm": replace(
        DECODER, features="naive_multi_scale", queries="learnable", pre_norm=True
    ),
}
LEVELS = {"multi_scale": [[0], [1], [2], [0]], "naive_multi_scale": [[0, 1, 2]] * 4}
CONFIG = ModelConfig(
    backbone=TimmBackboneConfig(name="resnet10t", options={"channels": (8, 8, 16, 16)}),
    pixel_decoder=FPNPixelDecoderConfig(conv_dim=DIM, mask_dim=MASK_DIM),
    transformer_decoder=DECODER,
    loss=LossConfig(num_points=50),
    pilots=PilotConfig(max_targets=20, label_noise=0.5, mask_noise=0.3),
    num_classes=CLASSES,
)
NORMALIZERS = Normalizers(torch.tensor(9.0), torch.tensor(7.0), torch.tensor(1.0))


def targets_of(*counts, **options) -> Targets:
    return make_targets(counts, size=SIZE, pad=8 - max(counts) % 8, **options)


def images_of(targets: Targets, images: list[int]) -> Targets:
    """Return a batch of these images only, with targets padded as in a separate batch."""
    most = int(targets.valid[images].sum(1).max())
    width = max(1, -(-most // 8)) * 8
    part = Targets(*(getattr(targets, field.name)[images] for field in fields(targets)))
    return replace(part, **{name: getattr(part, name)[:, :width] for name in ("labels", "layer", "local_id", "valid")})


def pilots_of(targets: Targets, config: ModelConfig = CONFIG):
    torch.manual_seed(0)
    return PilotQueries(config, seed=3)(targets)


def decoder_of(config: MaskedTransformerDecoderConfig) -> MaskedTransformerDecoder:
    torch.manual_seed(0)
    decoder = MaskedTransformerDecoder(config, DIM, MASK_DIM, CLASSES)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return decoder


def maps_of(positions: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return random features of three levels and mask features, seeded by position."""
    generators = [torch.Generator().manual_seed(position) for position in positions.tolist()]
    shapes = [(DIM, *size) for size in SIZES] + [(MASK_DIM, 16, 24)]
    *features, pixels = [torch.stack([torch.randn(shape, generator=g) for g in generators]) for shape in shapes]
    return features, pixels


# Construction


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_mask_cell_is_covered_if_any_of_its_pixels_is(layers, dtype):
    targets = targets_of(5, 0, 3, layers=layers, dtype=dtype)
    targets.id_maps[0, targets.layer[0, 4], 17, 35] = targets.local_id[0, 4]  # at least one pixel
    number = targets.valid.shape[1]
    owners = pixel_owners(targets, torch.arange(number).expand(3, -1), number)
    for size in (*SIZES, (3, 5)):
        cells = covered_cells(owners, number, size)
        for image in range(3):
            masks = one_hot(targets, image)
            rows, columns = (torch.arange(n) * cells_of // n for n, cells_of in zip(SIZE, size, strict=True))
            for n in range(number):
                expected = torch.zeros(size, dtype=torch.bool)
                for y, x in masks[n].nonzero().tolist() if n < len(masks) else []:
                    expected[rows[y], columns[x]] = True
                assert torch.equal(cells[image, n], expected.flatten())


def test_a_pilot_starts_from_the_class_of_its_target():
    targets, config = targets_of(6, 0, 2), replace(CONFIG, pilots=PilotConfig(max_targets=20, label_noise=0.0))
    torch.manual_seed(0)
    queries = PilotQueries(config, seed=3)
    pilots = queries(targets)
    assert pilots.content.shape == (3, 8, DIM)
    for image, n in targets.valid.nonzero().tolist():
        assert torch.equal(pilots.content[image, n], queries.class_query.weight[targets.labels[image, n]])
        assert pilots.target[image, n] == n
    assert torch.equal(pilots.valid, targets.valid)
    assert not pilots.content[~targets.valid].any()
    assert torch.equal(pilots.at(SIZES).attention_mask(0, [2])[:, 0][~targets.valid], torch.ones(16, 96) > 0)


@pytest.mark.parametrize(("chosen", "most", "number"), [(0, 100, 8), (8, 100, 8), (9, 100, 16), (24, 100, 32)])
def test_number_of_pilots_is_padded_to_few_values(chosen, most, number):
    assert padded_number(chosen, most) == number
    assert padded_number(3, 3) == 8
    assert padded_number(100, 100) == 104


def test_hash_selects_the_targets_of_a_crowded_image():
    targets, config = targets_of(37, 3, 0), replace(CONFIG, pilots=PilotConfig(max_targets=11))
    chosen = [pilots_of(replace(targets, position=targets.position + p), config) for p in range(300)]
    assert {tuple(pilots.target.shape) for pilots in chosen} == {(3, 16)}
    counts = torch.zeros(37)
    for pilots in chosen:
        target, valid = pilots.target[0], pilots.valid[0]
        assert valid.sum() == 11
        assert torch.equal(target[valid].unique(), target[valid])
        assert pilots.target[1][pilots.valid[1]].tolist() == [0, 1, 2]
        assert not pilots.valid[2].any()
        counts[target[valid]] += 1
    expected = 300 * 11 / 37
    assert (counts - expected).abs().max() < 4.5 * (expected * (1 - 11 / 37)) ** 0.5
    owned = {int(n) for n in chosen[0].owners[0].unique()} - {16}
    assert owned <= set(range(11))


def test_targets_are_selected_in_the_order_of_their_hash():
    valid = torch.tensor([[True, True, True, False]])
    keys = torch.randint(-(2**62), 2**62, (200, 4), generator=torch.Generator().manual_seed(0))
    two = choose(valid.expand(200, -1), keys, 2)
    three = choose(valid.expand(200, -1), keys, 3)
    assert (three == torch.arange(3)).all()
    assert len(two.unique(dim=0)) == 3


def test_noise_occurs_at_the_configured_rates():
    targets = targets_of(*[24] * 64)
    config = replace(CONFIG, pilots=PilotConfig(max_targets=24, label_noise=0.3))
    torch.manual_seed(0)
    queries = PilotQueries(config, seed=3)
    content = queries(targets).content[:, :24]
    changed = (content != queries.class_query(targets.labels[:, :24])).any(-1).float()
    rate = 0.3 * (1 - 1 / CLASSES)
    assert abs(float(changed.mean()) - rate) < 4.5 * (rate * (1 - rate) / changed.numel()) ** 0.5

    cells = torch.zeros(1, 500, 96, dtype=torch.bool)
    cells[..., :12] = True
    keys = torch.arange(500)[None]
    flipped = (flip_cells(cells, keys, 0.4) ^ cells).float()
    rate = 0.4 * 12 / 96
    assert abs(float(flipped.mean()) - rate) < 4.5 * (rate * (1 - rate) / flipped.numel()) ** 0.5
    assert torch.equal(flip_cells(torch.zeros_like(cells), keys, 1.0), torch.zeros_like(cells))


def test_noise_differs_between_layers_and_levels():
    guides = pilots_of(targets_of(6, 2)).at(SIZES)
    masks = [guides.attention_mask(layer, [2])[guides.valid[:, None]] for layer in range(3)]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
    together = guides.attention_mask(0, [1, 2])
    assert torch.equal(together[..., 24:][guides.valid[:, None]], masks[0])


def test_pilots_depend_on_the_position_and_not_on_other_images():
    targets, most = targets_of(13, 4, 0, 30), CONFIG.pilots.max_targets
    whole = pilots_of(targets)
    for images in ([0], [1], [2], [3], [1, 0], [3, 2, 1]):
        part = pilots_of(images_of(targets, images))
        for row, image in enumerate(images):
            count = min(most, int(targets.valid[image].sum()))
            for name in ("content", "target", "keys"):
                assert torch.equal(getattr(part, name)[row, :count], getattr(whole, name)[image, :count])
            part_mask, whole_mask = (pilots.at(SIZES).attention_mask(5, [0, 1, 2]) for pilots in (part, whole))
            assert torch.equal(part_mask[row, :, :count], whole_mask[image, :, :count])
    shifted = pilots_of(replace(targets, position=targets.position + 1))
    assert not torch.equal(shifted.content, whole.content)


# Decoder


def attend(module, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the attention output of one query [C], after the output projection."""
    heads = [slice(head * DIM // HEADS, (head + 1) * DIM // HEADS) for head in range(HEADS)]
    logits = [keys[:, part] @ query[part] / (DIM // HEADS) ** 0.5 for part in heads]
    return module.output(torch.cat([row.softmax(0) @ values[:, part] for row, part in zip(logits, heads, strict=True)]))


class ReferenceDecoder:
    """Slow reference decoder for one image without padded pilots, one query at a time."""

    def __init__(self, decoder, config, guides: PilotGuides, image: int) -> None:
        self.decoder, self.config = decoder, config
        self.valid = guides.valid[image].nonzero().flatten()
        self.image, self.guides = image, guides

    def run(self, features, pixels) -> list[tuple[Tensor, Tensor]]:
        decoder, first = self.decoder, len(self.valid)
        memories = self.memories(features)
        queries = torch.cat((self.guides.content[self.image, self.valid], decoder.query_feat.weight))
        position = torch.cat((torch.zeros(first, DIM), decoder.query_embed.weight))
        found = [self.predict(queries, pixels)] if self.config.queries == "supervised" else []
        for index, levels in enumerate(LEVELS[self.config.features]):
            allowed = self.allowed(index, levels, queries, pixels)
            memory = memories[index % len(decoder.memories)][index // len(decoder.memories)]
            queries = self.layer(decoder.layers[index], queries, position, memory, allowed)
            found.append(self.predict(queries, pixels))
        return found

    def memories(self, features):
        used = sorted({level for group in LEVELS[self.config.features] for level in group})
        groups = [[0, 1, 2]] if self.config.features == "naive_multi_scale" else [[level] for level in used]
        embeddings = self.decoder.level_embed.weight
        pairs = zip(self.decoder.memories, groups, strict=True)
        found = [memory([features[n][None] for n in group], embeddings[group]) for memory, group in pairs]
        return [[tuple(part[0] for part in parts) for parts in memory] for memory in found]

    def predict(self, queries, pixels):
        normalised = self.decoder.norm(queries)
        masks = torch.einsum("qc,chw->qhw", self.decoder.mask_embed(normalised), pixels)
        return self.decoder.class_embed(normalised), masks

    def allowed(self, index, levels, queries, pixels) -> list[Tensor]:
        """Return, for every query, the indices of the cells that it may attend to."""
        first = len(self.valid)
        pilot_masks = self.guides.attention_mask(index, levels)[self.image, 0, self.valid]
        masks = self.predict(queries[first:], pixels)[1][None]
        logits = torch.cat([F.interpolate(masks, SIZES[n], mode="bilinear")[0].flatten(1) for n in levels], dim=1)
        rows = [*pilot_masks, *(logits >= 0)]
        return [(row if row.any() else ~row).nonzero().flatten() for row in rows]

    def layer(self, layer, queries, position, memory, allowed):
        first = len(self.valid)

        def cross_attention(source):
            if self.config.attention == "mask_pooling":
                return torch.stack([layer.cross.output(memory[0][cells].mean(0)) for cells in allowed])
            projected = layer.cross_query(source + position)
            pairs = zip(projected, allowed, strict=True)
            return torch.stack([attend(layer.cross, q, *(part[cells] for part in memory)) for q, cells in pairs])

        def self_attention(source):
            query, key = layer.self_query_key(source + position).chunk(2, dim=-1)
            value = layer.self_value(source)
            visible = [slice(0, None) if n < first else slice(first, None) for n in range(len(source))]
            pairs = zip(query, visible, strict=True)
            return torch.stack([attend(layer.self_attention, q, key[rows], value[rows]) for q, rows in pairs])

        def feed_forward(source):
            return layer.linear2(layer.linear1(source).relu())

        blocks = [(cross_attention, layer.cross.norm), (self_attention, layer.self_attention.norm)]
        if not self.config.cross_attention_first:
            blocks.reverse()
        for block, norm in [*blocks, (feed_forward, layer.norm)]:
            queries = queries + block(norm(queries)) if self.config.pre_norm else norm(queries + block(queries))
        return queries


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoder_with_pilots_equals_the_reference_arithmetic(name):
    config, targets = DECODERS[name], targets_of(3, 0, 9)
    decoder = decoder_of(config)
    guides = pilots_of(targets, replace(CONFIG, transformer_decoder=config)).at(SIZES)
    features, pixels = maps_of(targets.position)
    predictions = decoder(features, pixels, guides)
    assert predictions.class_logits.shape[2] == 16 + QUERIES
    for image in range(3):
        expected = ReferenceDecoder(decoder, config, guides, image).run([f[image] for f in features], pixels[image])
        rows = [*guides.valid[image].nonzero().flatten().tolist(), *range(16, 16 + QUERIES)]
        for layer, (classes, masks) in enumerate(expected):
            torch.testing.assert_close(predictions.class_logits[layer, image, rows], classes, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(predictions.mask_logits(layer)[image, rows], masks, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_queries_do_not_see_pilots(name):
    config, targets = DECODERS[name], targets_of(3, 0, 9)
    decoder = decoder_of(config)
    guides = pilots_of(targets, replace(CONFIG, transformer_decoder=config)).at(SIZES)
    inputs = maps_of(targets.position)
    without_pilots, with_pilots = decoder(*inputs), decoder(*inputs, guides)
    for expected, actual in zip(without_pilots[:2], with_pilots[:2], strict=True):
        torch.testing.assert_close(actual[:, :, 16:], expected, rtol=1e-5, atol=1e-5)


# Losses


def losses_of(targets: Targets, config: ModelConfig = CONFIG, seed: int = 3):
    """Return the losses, the mask features, the pilot queries, the predictions and the pilots."""
    decoder = decoder_of(config.transformer_decoder)
    torch.manual_seed(1)
    queries = PilotQueries(config, seed)
    pilots = queries(targets)
    features, pixels = maps_of(targets.position)
    pixels.requires_grad_()
    predictions = decoder(features, pixels, pilots.at(SIZES))
    losses = compute_losses(predictions, targets, CounterPoints(seed), NORMALIZERS, config.loss, CLASSES, pilots)
    return losses, pixels, queries, predictions, pilots


def reference_losses(logits: Tensor, mask: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return BCE and dice of one mask [h, w] with its target [H, W], at points [P, 2] or on every pixel."""
    if points is None:
        values = F.interpolate(logits[None, None], mask.shape, mode="bilinear", align_corners=False).flatten()
        labels = mask.flatten()
    else:
        values, labels = (
            F.grid_sample(m[None, None], points[None, None] * 2 - 1, align_corners=False).flatten()
            for m in (logits, mask)
        )
    probabilities = values.sigmoid()
    bce = -(labels * F.logsigmoid(values) + (1 - labels) * F.logsigmoid(-values)).mean()
    dice = 1 - (2 * (probabilities * labels).sum() + 1) / (probabilities.sum() + labels.sum() + 1)
    return bce, dice


def reference_points(row: RowIndex, drawn, logits: Tensor, loss: LossConfig) -> Tensor:
    candidates, fresh = (points[:][0] for points in drawn.of_rows(row))
    values = F.grid_sample(logits[None, None], candidates[None, None] * 2 - 1, align_corners=False).flatten()
    kept = values.abs().argsort()[: loss.num_points - len(fresh)]
    return torch.cat((candidates[kept], fresh))


@pytest.mark.parametrize("supervision", ["points", "masks"])
@pytest.mark.parametrize("queries", ["supervised", "learnable"])
def test_losses_equal_the_reference_arithmetic(supervision, queries):
    config = replace(
        CONFIG,
        transformer_decoder=replace(DECODER, queries=queries),
        loss=LossConfig(num_points=50, supervision=supervision),
        pilots=replace(CONFIG.pilots, max_targets=6),
    )
    targets = targets_of(3, 0, 9)
    losses, _, _, predictions, pilots = losses_of(targets, config)
    drawn = CounterPoints(3).draw(targets.position, len(predictions.class_logits), point_counts(config.loss))
    expected, count = torch.zeros(3, 3), 0
    for layer in range(1 if queries == "supervised" else 0, len(predictions.class_logits)):
        masks = predictions.mask_logits(layer)
        for image, slot in pilots.valid.nonzero().tolist():
            target, count = int(pilots.target[image, slot]), count + 1
            label = targets.labels[image, target]
            mask = one_hot(targets, image)[target]
            points = None
            if supervision == "points":
                row = RowIndex(*(torch.tensor([n]) for n in (layer, image, target + 2**32)))
                points = reference_points(row, drawn, masks[image, slot].detach(), config.loss)
            bce, dice = reference_losses(masks[image, slot], mask, points)
            cross_entropy = -predictions.class_logits[layer, image, slot].log_softmax(-1)[label]
            expected[image] += torch.stack((2 * cross_entropy, 5 * bce, 5 * dice)).detach() / NORMALIZERS.num_masks
    assert count == 4 * (3 + 6)
    matched = compute_losses(
        predictions._replace(
            class_logits=predictions.class_logits[:, :, -QUERIES:],
            mask_embeddings=predictions.mask_embeddings[:, :, -QUERIES:],
        ),
        targets,
        CounterPoints(3),
        NORMALIZERS,
        config.loss,
        CLASSES,
    )
    torch.testing.assert_close(losses.terms, matched.terms, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.per_image - matched.per_image, expected.sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses.total, losses.per_image.sum())


@pytest.mark.parametrize("loss", [LossConfig(num_points=50), LossConfig(num_points=50, supervision_box_share=0.5)])
def test_loss_of_an_image_does_not_depend_on_other_images(loss):
    targets, config = targets_of(30, 3, 0, 12), replace(CONFIG, loss=loss)
    whole, pixels, *_ = losses_of(targets, config)
    (gradient,) = torch.autograd.grad(whole.total, pixels)
    for images in ([1], [2], [1, 0], [3, 1, 2]):
        part, own_pixels, *_ = losses_of(images_of(targets, images), config)
        torch.testing.assert_close(part.per_image, whole.per_image[images], rtol=1e-5, atol=1e-6)
        (own,) = torch.autograd.grad(part.total, own_pixels)
        torch.testing.assert_close(own, gradient[images], rtol=1e-4, atol=1e-5)


def test_without_targets_the_gradient_is_zero_and_not_missing():
    targets = targets_of(0, 0)
    losses, _, queries, *_ = losses_of(targets)
    losses.total.backward()
    torch.testing.assert_close(losses.total, losses.terms.sum())
    assert queries.class_query.weight.grad is not None
    assert not queries.class_query.weight.grad.any()


def test_fillers_have_no_pilots():
    targets = targets_of(3, 3)
    filled = replace(targets, weight=torch.tensor([1.0, 0.0]))
    losses, *_ = losses_of(filled)
    assert losses.per_image[1] == 0
    alone, *_ = losses_of(images_of(targets, [0]))
    torch.testing.assert_close(losses.total, alone.total, rtol=1e-5, atol=1e-6)


def test_class_queries_get_gradients_only_from_their_pilots():
    targets, config = targets_of(5, 2), replace(CONFIG, pilots=PilotConfig(max_targets=20, label_noise=0.0))
    losses, _, queries, *_ = losses_of(targets, config)
    (losses.total - losses.terms.sum()).backward()
    present = set(targets.labels[targets.valid].tolist())
    assert {n for n in range(CLASSES) if queries.class_query.weight.grad[n].any()} == present


def test_model_uses_pilots_only_in_training():
    targets = targets_of(3, 9)
    torch.manual_seed(0)
    model = build_model(CONFIG, pretrained_backbone=False).eval()
    queries = PilotQueries(CONFIG, seed=3)
    assert not any("pilot" in name for name in model.state_dict())
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        without_pilots = model(images)
        with_pilots = model(images, TrainingContext(targets, 3, queries(targets)))
    assert isinstance(with_pilots, Predictions)
    assert without_pilots.class_logits.shape[2] == QUERIES
    assert with_pilots.class_logits.shape[2] == 16 + QUERIES
    torch.testing.assert_close(with_pilots.class_logits[:, :, 16:], without_pilots.class_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_decoder_with_pilots_supports_other_precisions(dtype):
    targets = targets_of(3, 9)
    decoder, guides = decoder_of(DECODER).to(dtype), pilots_of(targets).at(SIZES)
    features, pixels = maps_of(targets.position)
    predictions = decoder([f.to(dtype) for f in features], pixels.to(dtype), guides)
    assert predictions.class_logits.dtype == dtype
    assert predictions.class_logits.isfinite().all()


# Settings


def test_pilots_are_off_by_default():
    assert ModelConfig().pilots == PilotConfig(max_targets=0, label_noise=0.2, mask_noise=0.0)
    assert count_normalizers(targets_of(3, 0), QUERIES, CONFIG.loss).num_masks == 3


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (StandardTransformerDecoderConfig(), "standard"),
        (replace(DECODER, attention="cross"), "masked with attention cross"),
        (replace(DECODER, attention="smca"), "masked with attention smca"),
    ],
)
def test_decoder_without_attention_masks_refuses_pilots(decoder, named):
    with pytest.raises(ConfigError, match=rf"model\.pilots\.max_targets is 20, .* is {named}, .* set max_targets=0"):
        replace(CONFIG, transformer_decoder=decoder)


def test_eomt_refuses_pilots():
    parts = {
        "backbone": TimmBackboneConfig(name="vit_small_patch14_dinov2", features="tokens"),
        "pixel_decoder": UpscalePixelDecoderConfig(),
        "transformer_decoder": EomtDecoderConfig(),
    }
    assert ModelConfig(**parts).pilots.max_targets == 0
    with pytest.raises(ConfigError, match=r"model\.pilots\.max_targets is 8, but .* is eomt, which does not support"):
        ModelConfig(**parts, pilots=PilotConfig(max_targets=8))


@pytest.mark.parametrize(("name", "value"), [("label_noise", 0.1), ("mask_noise", 0.2)])
def test_noise_without_pilots_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"model\.pilots\.{name} is {value}, .* set model\.pilots\.max_targets=100"):
        PilotConfig(**{name: value})
