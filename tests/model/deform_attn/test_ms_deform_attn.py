import math
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import m2f.model.deform_attn.module as own
from m2f.model.deform_attn.module import (
    MSDeformAttn,
    SamplingGrid,
    ms_deform_attn,
    ms_deform_attn_embedding_bag,
    ms_deform_attn_grid_sample,
)

FORMS = [ms_deform_attn_embedding_bag, ms_deform_attn_grid_sample]


def random_problem(shapes, *, batch=2, queries=7, heads=2, dim=4, points=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(batch, pixels, heads, dim, generator=generator, dtype=dtype)
    locations = torch.rand(batch, queries, heads, levels, points, 2, generator=generator, dtype=dtype) * 1.6 - 0.3
    weights = torch.rand(batch, queries, heads, levels, points, generator=generator, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (value, locations, weights)]


def pixel_loop(value, shapes, locations, weights):
    """Compute deformable attention from its definition, one sample and one corner at a time."""
    batch, queries, heads, levels, points, _ = locations.shape
    output = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    for b, q, g, level, p in np.ndindex(batch, queries, heads, levels, points):
        height, width = shapes[level]
        start = sum(h * w for h, w in shapes[:level])
        x = locations[b, q, g, level, p, 0].item() * width - 0.5
        y = locations[b, q, g, level, p, 1].item() * height - 0.5
        for row in (int(np.floor(y)), int(np.floor(y)) + 1):
            for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[b, q, g, level, p]
                    output[b, q, g] += share * value[b, start + row * width + column, g]
    return output.flatten(2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_attention_and_its_gradients_equal_the_official_operator(goldens, case, form):
    golden = np.load(goldens / "a_msda.npz")
    names = ("value", "sampling_locations", "attention_weights")
    inputs = [torch.from_numpy(golden[f"{case}_{name}"]).requires_grad_() for name in names]
    shapes = [tuple(row) for row in golden[f"{case}_spatial_shapes"].tolist()]
    output = form(inputs[0], shapes, *inputs[1:])
    torch.testing.assert_close(output, torch.from_numpy(golden[f"{case}_output"]), rtol=0, atol=1e-10)
    output.backward(torch.from_numpy(golden[f"{case}_grad_output"]))
    for name, tensor in zip(names, inputs, strict=True):
        expected = torch.from_numpy(golden[f"{case}_grad_{name}"])
        torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=1e-10, msg=name)


def test_module_equals_the_official_module_and_its_gradients(goldens):
    golden = {key: torch.from_numpy(value) for key, value in np.load(goldens / "a_msda.npz").items()}
    module = MSDeformAttn(32, levels=3, heads=4, points=4).double()
    module.load_state_dict({key[5:]: value for key, value in golden.items() if key.startswith("modw_")})
    query = golden["mod_query"].requires_grad_()
    source = golden["mod_input_flatten"].requires_grad_()
    shapes = [tuple(row) for row in golden["mod_spatial_shapes"].tolist()]
    sizes = golden["mod_spatial_shapes"].flip(-1).double()[:, None]
    output = module(query, source, SamplingGrid(shapes, sizes, golden["mod_reference_points"]))
    torch.testing.assert_close(output, golden["mod_output"], rtol=0, atol=1e-10)
    output.backward(golden["mod_grad_output"])
    torch.testing.assert_close(query.grad, golden["mod_grad_query"], rtol=0, atol=1e-10)
    torch.testing.assert_close(source.grad, golden["mod_grad_input_flatten"], rtol=0, atol=1e-10)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, golden[f"modg_{name}"], rtol=0, atol=1e-10, msg=name)


def test_starts_with_the_official_offsets(goldens):
    expected = np.load(goldens / "a_msda.npz")["init_sampling_offsets_bias_h8_l3_p4"]
    bias = MSDeformAttn(256, levels=3, heads=8, points=4).sampling_offsets.bias
    torch.testing.assert_close(bias.detach(), torch.from_numpy(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shapes", [[(3, 5)], [(1, 1), (1, 7), (4, 2)]])
def test_both_forms_follow_the_definition(form, shapes):
    value, locations, weights = random_problem(shapes, batch=1, queries=3)
    torch.testing.assert_close(
        form(value, shapes, locations, weights), pixel_loop(value, shapes, locations, weights), rtol=0, atol=1e-12
    )


def test_both_forms_have_equal_gradients_in_float32():
    shapes = [(5, 3), (2, 9)]
    inputs = random_problem(shapes, dtype=torch.float32, seed=3)
    gradients = []
    for form in FORMS:
        output = form(inputs[0], shapes, *inputs[1:])
        gradients.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form):
    shapes = [(3, 4), (2, 2)]
    inputs = random_problem(shapes, batch=1, queries=2, dim=2, points=2, seed=5)
    assert torch.autograd.gradcheck(lambda v, x, w: form(v, shapes, x, w), inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("far", [-3.0, 4.0, 1e12])
def test_samples_outside_the_maps_are_zero(form, far):
    shapes = [(3, 4)]
    value, locations, weights = random_problem(shapes)
    assert form(value, shapes, torch.full_like(locations, far), weights).abs().max() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_location_gives_a_non_finite_result(bad):
    shapes = [(3, 4), (2, 2)]
    value, locations, weights = random_problem(shapes)
    with torch.no_grad():
        locations[0, 1, 0, 0, 0, 0] = bad
    output = ms_deform_attn_embedding_bag(value, shapes, locations, weights)
    assert output[0, 1, :4].isnan().all()
    assert output[1].isfinite().all()
    output.sum().backward()


def test_operator_on_cpu_uses_the_embedding_bag_form():
    shapes = [(3, 5), (2, 2)]
    inputs = random_problem(shapes)
    expected = ms_deform_attn_embedding_bag(inputs[0], shapes, *inputs[1:])
    assert torch.equal(ms_deform_attn(inputs[0], shapes, *inputs[1:]), expected)


def test_reference_points_are_pixel_centres_in_float32(goldens):
    expected = torch.from_numpy(np.load(goldens / "b_position_embedding.npz")["ref_points"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grid = SamplingGrid.of_pixels([(2, 3), (4, 5)])
    assert grid.reference.dtype == grid.sizes.dtype == torch.float32
    assert grid.sizes.flatten().tolist() == [3, 2, 5, 4]
    torch.testing.assert_close(grid.reference.expand_as(expected), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["autocast", "parameters"])
def test_coordinates_stay_float32_in_bfloat16(monkeypatch, mode):
    seen = {}

    def spy(value, shapes, locations, weights):
        seen.update(value=value.dtype, locations=locations.dtype, weights=weights.dtype)
        return ms_deform_attn_embedding_bag(value, shapes, locations, weights)

    monkeypatch.setattr("m2f.model.deform_attn.module.ms_deform_attn", spy)
    torch.manual_seed(0)
    module = MSDeformAttn(16, levels=1, heads=2, points=2)
    query, source = torch.randn(1, 6, 16), torch.randn(1, 6, 16)
    grid = SamplingGrid.of_pixels([(2, 3)])
    exact = module(query, source, grid)
    if mode == "parameters":
        module, query, source = module.bfloat16(), query.bfloat16(), source.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        output = module(query, source, grid)
    assert seen == {"value": torch.bfloat16, "locations": torch.float32, "weights": torch.float32}
    assert output.dtype == torch.bfloat16
    assert output.shape == exact.shape
    assert output.isfinite().all()


@pytest.mark.parametrize(("worst", "chosen"), [(0.0, "kernel"), (1.0, "plain"), (math.nan, "plain")])
def test_the_kernel_check_is_a_constant_of_compiled_graphs(worst, chosen, monkeypatch):
    """torch.compile traces through caches, but the kernel check must not become part of a graph."""
    pytest.importorskip("triton")
    torch.compiler.reset()
    checked = []
    monkeypatch.setattr(own, "_kernel_error", lambda *sizes: checked.append(sizes) or worst)
    own._checked_kernel.cache_clear()

    def take(value):
        return value + 1 if own._kernel_agrees(value.dtype, 3, 2, 4, 8, value.device) else value - 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = torch.compile(take, backend="eager", fullgraph=True)(torch.zeros(1))
    own._checked_kernel.cache_clear()
    assert result.item() == (1 if chosen == "kernel" else -1)
    assert [sizes[1:] for sizes in checked] == [(torch.float32, 3, 2, 4, 8, torch.device("cpu"))]


def test_kernels_are_launched_on_the_device_of_their_input(monkeypatch):
    pytest.importorskip("triton")
    import m2f.model.deform_attn.triton_op as operator

    current, launches = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(operator, "_launch", lambda kernel, *_, **__: launches.append((kernel, len(current))))
    grid = SamplingGrid.of_pixels([(2, 3)])
    value, offsets, logits = torch.ones(1, 6, 2, 4), torch.ones(1, 6, 2, 1, 3, 2), torch.ones(1, 6, 2, 1, 3)
    inputs = [tensor.requires_grad_() for tensor in (value, offsets, logits)]
    operator.fused_ms_deform_attn(value, grid.shapes, grid.reference.squeeze(2), offsets, logits).sum().backward()
    assert launches == [(operator.forward_kernel, 1), (operator.backward_kernel, 1)]
    assert all(tensor.grad is not None for tensor in inputs)


def attend_by_grid_sample(value, shapes, reference, offsets, logits):
    weights = logits.flatten(-2).softmax(-1).view(logits.shape)
    locations = reference[:, :, None, None, None] + offsets / SamplingGrid.of_pixels(shapes).sizes
    return ms_deform_attn_grid_sample(value, shapes, locations, weights)


def test_the_kernel_check_accepts_a_correct_kernel_in_inference_mode():
    with torch.inference_mode():
        assert own._kernel_error(attend_by_grid_sample, torch.float32, 2, 2, 2, 4, device="cpu") < 1e-6


def test_the_kernel_check_finds_nan_in_any_gradient():
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.full_like(grad, torch.nan)

    def fused(value, shapes, reference, offsets, logits):
        return attend_by_grid_sample(value, shapes, reference, offsets, WrongGradient.apply(logits))

    error = own._kernel_error(fused, torch.float32, 2, 2, 2, 4, device="cpu")
    assert math.isnan(error)


def test_running_out_of_memory_in_the_kernel_check_is_no_verdict(monkeypatch):
    pytest.importorskip("triton")

    def fail(*sizes):
        raise torch.OutOfMemoryError("CUDA out of memory")

    own._checked_kernel.cache_clear()
    monkeypatch.setattr(own, "_kernel_error", fail)
    with pytest.raises(torch.OutOfMemoryError):
        own._checked_kernel(torch.float32, 3, 2, 4, 8)
    monkeypatch.setattr(own, "_kernel_error", lambda *sizes: 0.0)
    assert own._checked_kernel(torch.float32, 3, 2, 4, 8)
    own._checked_kernel.cache_clear()
