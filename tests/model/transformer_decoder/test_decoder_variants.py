"""Every variant of the transformer decoder against a slow reference implementation."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from m2f.model.config import MaskedTransformerDecoderConfig
from m2f.model.errors import ConfigError
from m2f.model.position_encoding import sine_position_embedding
from m2f.model.transformer_decoder.masked import MaskedTransformerDecoder

DIM, HEADS, QUERIES, CLASSES, MASK_DIM = 16, 2, 4, 3, 8
SIZES = ((2, 3), (4, 6), (8, 12))
SMALL = MaskedTransformerDecoderConfig(
    num_queries=QUERIES, num_layers=4, hidden_dim=DIM, num_heads=HEADS, feedforward_dim=20
)
LEVELS = {
    "multi_scale": [[0], [1], [2], [0]],
    "naive_multi_scale": [[0, 1, 2]] * 4,
    "stride_32": [[0]] * 4,
    "stride_16": [[1]] * 4,
    "stride_8": [[2]] * 4,
}
VARIANTS = [
    *(dataclasses.replace(SMALL, attention=attention) for attention in ("cross", "smca", "mask_pooling")),
    *(dataclasses.replace(SMALL, features=features) for features in LEVELS),
    *(dataclasses.replace(SMALL, queries=queries) for queries in ("learnable", "zero")),
    dataclasses.replace(SMALL, cross_attention_first=False),
    dataclasses.replace(SMALL, pre_norm=True),
    dataclasses.replace(SMALL, attention="smca", features="naive_multi_scale", pre_norm=True),
    dataclasses.replace(SMALL, attention="mask_pooling", features="stride_8", cross_attention_first=False),
    dataclasses.replace(SMALL, attention="cross", features="stride_32", queries="zero", cross_attention_first=False),
    dataclasses.replace(SMALL, num_queries=50),
]


def name_of(config):
    different = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(SMALL, f.name)]
    return "-".join(f"{name}={getattr(config, name)}" for name in different) or "default"


def build(config, in_dim=DIM, seed=0):
    torch.manual_seed(seed)
    decoder = MaskedTransformerDecoder(config, in_dim, MASK_DIM, CLASSES)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # so that biases and scales matter
    return decoder.eval()


def inputs(in_dim=DIM, batch=2):
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(batch, in_dim, *size, generator=generator) for size in SIZES]
    return features, torch.randn(batch, MASK_DIM, 16, 24, generator=generator)


class Reference:
    """Reference decoder for one image, in the order of the paper's text."""

    def __init__(self, decoder, config):
        self.decoder, self.config = decoder, config

    def run(self, features, mask_features):
        """Return the class logits and mask logits of every prediction."""
        config, decoder = self.config, self.decoder
        position = decoder.query_embed.weight
        queries = torch.zeros_like(position) if config.queries == "zero" else decoder.query_feat.weight
        reference = decoder.reference(queries + position) if config.attention == "smca" else None
        predictions = [self.predict(queries, mask_features)] if config.queries == "supervised" else []
        schedule = LEVELS[config.features]
        next_slot = {}
        for index, levels in enumerate(schedule):
            slot = next_slot.setdefault(str(levels), 0)
            next_slot[str(levels)] += 1
            cross_attention = self.cross_attention(
                index, slot, levels, features, mask_features, queries, position, reference
            )
            queries = self.layer(decoder.layers[index], queries, position, cross_attention)
            predictions.append(self.predict(queries, mask_features))
        return predictions

    def predict(self, queries, mask_features):
        normalised = self.decoder.norm(queries)
        masks = torch.einsum("qc,chw->qhw", self.decoder.mask_embed(normalised), mask_features)
        return self.decoder.class_embed(normalised), masks

    def cross_attention(self, index, slot, levels, features, mask_features, queries, position, reference):
        """Return the cross-attention of a layer as a function of the queries, normalised or not."""
        config, decoder, layer = self.config, self.decoder, self.decoder.layers[index]
        used = sorted({level for group in LEVELS[config.features] for level in group})
        memory = decoder.memories[index % len({str(group) for group in LEVELS[config.features]})]
        tokens, positions = [], []
        for level in levels:
            embedding = decoder.level_embed.weight[used.index(level)]
            tokens.append(memory.input_proj(features[level][None])[0].flatten(1).T + embedding)
            positions.append(sine_position_embedding(*SIZES[level], DIM).flatten(0, 1))
        tokens, positions = torch.cat(tokens), torch.cat(positions)
        masks = self.predict(queries, mask_features)[1][None]
        logits = torch.cat([F.interpolate(masks, SIZES[n], mode="bilinear")[0].flatten(1) for n in levels], dim=1)
        blocked = logits.sigmoid() < 0.5
        blocked[blocked.all(1)] = False
        if config.attention == "mask_pooling":
            return lambda source: layer.cross.output(torch.stack([tokens[~row].mean(0) for row in blocked]))
        bias = torch.zeros(HEADS, len(queries), len(tokens))
        if config.attention == "masked":
            bias = bias.masked_fill(blocked, -torch.inf)
        if config.attention == "smca":
            bias = self.gaussian(decoder.priors[index], queries + position, reference, levels)
        rows = slice(slot * DIM, (slot + 1) * DIM)
        key = F.linear(tokens + positions, memory.key.weight[rows], memory.key.bias[rows])
        value = F.linear(tokens, memory.value.weight[rows], memory.value.bias[rows])
        return lambda source: attention(layer.cross, layer.cross_query(source + position), key, value, bias)

    def gaussian(self, prior, queries, reference, levels):
        """Return the logarithm of the prior [heads, Q, T], computed pixel by pixel for every head and query."""
        hidden = prior.norm(queries)
        offset, scale = (linear(hidden).view(-1, HEADS, 2) for linear in (prior.offset, prior.scale))
        rows, columns = SIZES[0]
        bias = torch.zeros(HEADS, len(queries), sum(SIZES[level][0] * SIZES[level][1] for level in levels))
        for head, query in itertools.product(range(HEADS), range(len(queries))):
            centre_x = reference[query, 0] * columns + offset[query, head, 0]
            centre_y = reference[query, 1] * rows + offset[query, head, 1]
            pixel = 0
            for level in levels:
                height, width = SIZES[level]
                for i, j in itertools.product(range(height), range(width)):
                    x, y = (j + 0.5) / width * columns, (i + 0.5) / height * rows
                    squares = ((x - centre_x) * scale[query, head, 0]) ** 2
                    squares = squares + ((y - centre_y) * scale[query, head, 1]) ** 2
                    bias[head, query, pixel] = -squares / 8
                    pixel += 1
        return bias

    def layer(self, layer, queries, position, cross_attention):
        def self_attention(source):
            query, key = layer.self_query_key(source + position).chunk(2, dim=-1)
            return attention(layer.self_attention, query, key, layer.self_value(source), 0.0)

        def feed_forward(source):
            return layer.linear2(layer.linear1(source).relu())

        blocks = [(cross_attention, layer.cross.norm), (self_attention, layer.self_attention.norm)]
        if not self.config.cross_attention_first:
            blocks.reverse()
        for block, norm in [*blocks, (feed_forward, layer.norm)]:
            queries = queries + block(norm(queries)) if self.config.pre_norm else norm(queries + block(queries))
        return queries


def attention(module, query, key, value, bias):
    outputs = []
    for head in range(HEADS):
        part = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
        logits = query[:, part] @ key[:, part].T / (DIM // HEADS) ** 0.5
        logits = logits + (bias if isinstance(bias, float) else bias[head])
        outputs.append(logits.softmax(-1) @ value[:, part])
    return module.output(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize("config", VARIANTS, ids=name_of)
@torch.no_grad()
def test_decoder_variants_equal_the_reference_arithmetic(config):
    decoder = build(config)
    features, mask_features = inputs()
    predictions = decoder(features, mask_features)
    for image in range(2):
        expected = Reference(decoder, config).run([feature[image] for feature in features], mask_features[image])
        assert len(predictions.class_logits) == len(expected) == 4 + (config.queries == "supervised")
        for layer, (classes, masks) in enumerate(expected):
            torch.testing.assert_close(predictions.class_logits[layer, image], classes, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(predictions.mask_logits(layer)[image], masks, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_dim", [DIM, 12])
@pytest.mark.parametrize("config", VARIANTS, ids=name_of)
def test_every_parameter_gets_a_gradient_in_every_variant(config, in_dim):
    decoder = build(config, in_dim)
    predictions = decoder(*inputs(in_dim))
    sum(p.square().sum() for p in predictions[:2]).backward()
    assert [name for name, parameter in decoder.named_parameters() if parameter.grad is None] == []
    zero = {name for name, parameter in decoder.named_parameters() if not parameter.grad.any()}
    # A key bias shifts all logits of a query equally. Zero queries give zero values in the first self-attention.
    unused = {"layers.0.self_value.weight"} if config.queries == "zero" and not config.cross_attention_first else set()
    assert {name for name in zero if "key.bias" not in name} <= unused


@pytest.mark.parametrize("config", VARIANTS, ids=name_of)
@pytest.mark.parametrize("mode", ["autocast", "parameters", "float64"])
def test_other_precisions_are_close_to_float32(config, mode):
    decoder = build(config)
    features, mask_features = inputs()
    with torch.no_grad():
        expected = decoder(features, mask_features)
        dtype = {"autocast": torch.float32, "parameters": torch.bfloat16, "float64": torch.float64}[mode]
        decoder = decoder.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            actual = decoder([feature.to(dtype) for feature in features], mask_features.to(dtype))
    difference = (actual.class_logits.double() - expected.class_logits.double()).abs()
    assert actual.class_logits.dtype == (torch.bfloat16 if mode == "autocast" else dtype)
    # A flipped mask bit changes a whole query, so the median is compared for bfloat16.
    assert difference.median() < (1e-5 if mode == "float64" else 0.1)
    assert difference.isfinite().all()


@pytest.mark.parametrize("attention", ["smca", "mask_pooling"])
def test_exported_graph_gives_the_same_outputs(attention):
    config = dataclasses.replace(SMALL, num_layers=2, attention=attention, features="naive_multi_scale")
    decoder, arguments = build(config), inputs(batch=1)
    exported = torch.export.export(decoder, arguments).module()(*arguments)
    for actual, expected in zip(exported, decoder(*arguments), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_spatial_prior_is_equal_for_all_queries_at_start_and_scales_with_the_level():
    decoder = build(dataclasses.replace(SMALL, attention="smca"))
    prior = decoder.priors[0]
    torch.nn.init.zeros_(prior.offset.weight)
    torch.nn.init.zeros_(prior.offset.bias)
    torch.nn.init.zeros_(prior.scale.weight)
    torch.nn.init.ones_(prior.scale.bias)
    reference = torch.tensor([[0.5, 0.25]]).expand(1, QUERIES, 2)
    coarse, fine = (
        prior(torch.randn(1, QUERIES, DIM), reference, [(8, 8), (side, side)]).unflatten(-1, (side, side))
        for side in (8, 32)
    )
    assert torch.equal(coarse[0, 0, 0], coarse[0, 1, 3])
    # The four fine pixels around the centre are half a fine pixel, 0.125 coarse pixels, away along each axis.
    torch.testing.assert_close(coarse[0, 0, 0, 5, 2], torch.tensor(-(1.5**2 + 3.5**2) / 8))
    torch.testing.assert_close(fine[0, 0, 0, 8, 16], torch.tensor(-2 * 0.125**2 / 8))


def test_dropout_acts_only_in_training():
    decoder = build(dataclasses.replace(SMALL, dropout=0.5))
    arguments = inputs()
    assert torch.equal(decoder(*arguments).class_logits, decoder(*arguments).class_logits)
    decoder.train()
    assert not torch.equal(decoder(*arguments).class_logits, decoder(*arguments).class_logits)


def test_variants_have_no_unused_parameters():
    names = {config: set(build(config).state_dict()) for config in VARIANTS}
    default = names[SMALL]
    changed = {name_of(config): (found - default, default - found) for config, found in names.items()}
    assert {n.split(".")[0] for n in changed["attention=smca"][0]} == {"reference", "priors"}
    assert changed["attention=smca"][1] == set()
    assert {n.split(".")[-2] for n in changed["attention=mask_pooling"][1]} == {"key", "value", "cross_query"}
    assert changed["queries=zero"] == (set(), {"query_feat.weight"})
    assert {n.split(".")[1] for n in changed["features=stride_8"][1]} == {"1", "2"}
    for same in ("attention=cross", "queries=learnable", "cross_attention_first=False", "pre_norm=True"):
        assert changed[same] == (set(), set())


def test_pre_norm_of_mask_pooling_is_refused():
    with pytest.raises(ConfigError, match="pre_norm is true"):
        dataclasses.replace(SMALL, attention="mask_pooling", pre_norm=True)
