"""Weights in fewer bits: the format's own error and no more, in less memory, for layers and experts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peers.capacity import plan_capacity
from peers.model.catalog import resolve
from peers.model.kernels import Pool, accelerate, accelerate_by_torch, linear
from peers.model.kernels.packed import NF4_LEVELS, Format, PackedLinear, nf4_levels, packed, times_row, whole
from peers.model.loading import load_span
from peers.model.quantization import QUANTIZATIONS, quantize
from routing.errors import CallerError
from routing.ids import BlockSpan
from tests.helpers.families import FAMILIES, save_checkpoint

POOL = Pool(2)
FORMATS = [format_.value for format_ in Format]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(FORMATS),
    *(st.integers(1, top) for top in (20, 40, 200)),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_library_multiplies_by_the_weights_that_the_codes_stand_for(
    dtype: torch.dtype, name: str, rows: int, outputs: int, inputs: int, biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = PackedLinear(nn.Linear(inputs, outputs, bias=biased).to(dtype).requires_grad_(False), Format(name))
    x = torch.randn(rows, inputs).to(dtype)
    weight = layer.whole(torch.float32).double()
    right, summed = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    right += 0 if layer.bias is None else layer.bias.double()
    by_torch = layer(x)
    layer.pool, layer.rows_max = POOL, 1 << 30
    for product, error in ((layer(x), 4e-3 if dtype.itemsize == 2 else 1e-6), (by_torch, 2e-2)):
        assert product.dtype is dtype
        assert (product.double() - right).norm() <= error * right.norm() + error / 10 * summed.norm() + 1e-6


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 40), st.integers(1, 200), st.integers(0, 99))
def test_a_row_times_codes_is_a_row_times_the_weights_that_they_stand_for(
    name: str, outputs: int, inputs: int, seed: int
) -> None:
    """What a GPU runs compiled."""
    torch.manual_seed(seed)
    layer, row_K = PackedLinear(nn.Linear(inputs, outputs).requires_grad_(False), Format(name)), torch.randn(inputs)
    weight_NK = layer.whole(torch.float32)
    product_N = times_row(row_K, layer.codes, layer.scales, layer.format, nf4_levels(row_K.device))
    assert (product_N - weight_NK @ row_K).norm() <= 1e-5 * (weight_NK.abs() @ row_K.abs()).norm()


@given(st.sampled_from(["int8", "nf4"]), st.integers(1, 100), st.integers(0, 99))
@settings(deadline=None)
def test_a_weight_is_off_by_half_a_level_at_most(name: str, inputs: int, seed: int) -> None:
    weight = _weight(inputs, seed)
    codes, scales = packed(weight, Format(name))
    off = (whole(codes, scales, Format(name), inputs, torch.float32) - weight).abs()
    if name == "int8":
        level = scales[:, None]
    else:
        widest = max(b - a for a, b in pairwise(NF4_LEVELS))
        level = (widest * scales.float()).repeat_interleave(32, 1)[:, :inputs]
    assert (off <= 0.5001 * level + 2**-8 * weight.abs().amax(1, keepdim=True)).all()  # scales are rounded too


@given(st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None)
def test_the_levels_of_int4_are_no_further_off_than_from_the_least_weight_to_the_greatest(
    groups: int, seed: int
) -> None:
    weight = _weight(32 * groups, seed)
    codes, scales = packed(weight, Format.INT4)
    ours = whole(codes, scales, Format.INT4, 32 * groups, torch.float32).view(5, groups, 32)
    weight = weight.view(ours.shape)
    least, most = weight.aminmax(dim=-1, keepdim=True)
    scale = (most - least).clamp_min(1e-30) / 15
    plain = ((weight - least) / scale).round() * scale + least
    rounding = 2**-7 * weight.abs().amax(-1) * 32**0.5  # of scales and least weights
    assert ((ours - weight).norm(dim=-1) <= (plain - weight).norm(dim=-1) + rounding).all()
    evened, scales = packed(plain.flatten(1), Format.INT4)  # what has 16 even levels keeps them
    again = whole(evened, scales, Format.INT4, 32 * groups, torch.float32).view(ours.shape)
    assert ((again - plain).norm(dim=-1) <= rounding).all()


def _weight(inputs: int, seed: int) -> torch.Tensor:
    weight = torch.randn(5, inputs, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
    weight[2] = 0
    return weight


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt-oss", "gpt-neox", "phi3", "gpt2"])
def test_a_quantized_span_says_nearly_the_same_in_less_memory(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(FAMILIES[family], tmp_path)
    checkpoint, span = resolve(str(tmp_path), cache=tmp_path / "cache"), BlockSpan(1, 3)
    exact = load_span(checkpoint, span, dtype=torch.float32, device="cpu")
    model = load_span(checkpoint, span, dtype=torch.float32, device="cpu", quantization=name)
    assert model.weight_bytes < 0.45 * exact.weight_bytes  # norms and scales weigh much in tiny layers
    assert model.dtype is torch.float32
    hidden, positions = torch.randn(1, 7, exact.hidden_size), torch.arange(7)[None]
    right, alone = exact.forward(hidden, positions), model.forward(hidden, positions)
    off = {"int8": 0.1, "int4": 0.8, "nf4": 0.8}[name]  # random weights, drawn large
    assert (alone - right).norm() < off * (right - hidden).norm()
    monkeypatch.setattr(linear, "_fastest_s", lambda *_: (0.0, 1.0))
    assert accelerate(model.module, POOL)
    same = {"atol": 2e-5 * float(right.abs().max()), "rtol": 0}
    torch.testing.assert_close(model.forward(hidden, positions), alone, **same)
    for module in model.module.modules():
        for rows_max in ("rows_max", "hive_rows_max"):  # of layers and of experts: too many rows for the library
            if hasattr(module, rows_max):
                setattr(module, rows_max, 0)
    torch.testing.assert_close(model.forward(hidden, positions), alone, **same)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_kernel_multiplies_few_rows_where_it_is_right_and_faster(
    dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU, but for the compiler."""
    caplog.set_level("INFO")
    module = nn.Sequential(*(nn.Linear(64, 64, bias=biased) for biased in (True, False))).to(dtype)
    quantize(module.requires_grad_(False), name)
    x, rows = torch.randn(2, 2, 64).to(dtype), list[torch.Tensor]()
    plain, many = module(x), module(x.repeat(3, 1, 1))

    def counted(row_K: torch.Tensor, *weights: Any) -> torch.Tensor:
        rows.append(row_K)
        return times_row(row_K, *weights)

    monkeypatch.setattr(linear, "_ways", lambda *_: [linear._by_a_compiled_kernel])
    monkeypatch.setattr(linear, "_fastest_s", lambda _, rows_MK, __: (len(rows_MK) / 4, 1.0))
    for kernel in (lambda row_K, *_: torch.ones(64), lambda *_: 1 / 0):  # one that is wrong, one that fails
        monkeypatch.setattr(linear, "_compiled_times_row", lambda *_, kernel=kernel: kernel)
        assert accelerate_by_torch(module) == 0
    assert "division by zero" in caplog.text
    monkeypatch.setattr(linear, "_compiled_times_row", lambda *_: counted)
    assert accelerate_by_torch(module) == 2
    rows.clear()
    error = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(module(x), plain, atol=error, rtol=error)
    assert len(rows) == 2 * 4
    assert torch.equal(module(x.repeat(3, 1, 1)), many), "more rows than it was faster for"
    assert len(rows) == 2 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_there_is_no_library_torch_multiplies_by_8_bits_if_that_is_faster(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocks() -> nn.Sequential:
        torch.manual_seed(0)
        module = nn.Sequential(*(nn.Linear(64, 64, bias=biased) for biased in (True, False))).to(dtype)
        quantize(module.requires_grad_(False), "int8")
        return module

    plain, changed, x = blocks(), blocks(), torch.randn(2, 3, 64).to(dtype)
    monkeypatch.setattr(linear, "_fastest_s", lambda _, rows_MK, __: (len(rows_MK) / 12, 1.0))
    assert accelerate_by_torch(changed) == 2
    products, scales, multiply = list[int](), set[torch.Tensor](), torch._weight_int8pack_mm

    def counted(rows_MK: torch.Tensor, codes: torch.Tensor, scales_N: torch.Tensor) -> torch.Tensor:
        products.append(len(rows_MK))
        scales.add(scales_N)
        return multiply(rows_MK, codes, scales_N)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", counted)
    error = {"atol": 4 * torch.finfo(dtype).eps, "rtol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(changed(x), plain(x), **error)
    torch.testing.assert_close(changed(x), plain(x), **error)
    assert products == [6, 6] * 2
    assert len(scales) == 2, "one tensor for each layer, not one for each product"
    torch.testing.assert_close(changed(x.repeat(3, 1, 1)), plain(x.repeat(3, 1, 1)))  # more rows than it was faster for
    with torch.enable_grad():
        changed(x.float().to(dtype).requires_grad_()).sum().backward()
    assert products == [6, 6] * 2


def test_where_torch_has_no_product_of_8_bits_weights_are_made_whole(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("Could not run 'aten::_weight_int8pack_mm'")

    layer = nn.Sequential(nn.Linear(64, 64).requires_grad_(False))
    quantize(layer, "int8")
    monkeypatch.setattr(torch, "_weight_int8pack_mm", missing)
    caplog.set_level("INFO")
    assert accelerate_by_torch(layer) == 0
    assert caplog.text.count("made whole") == 1
    assert layer(torch.ones(1, 64)).isfinite().all()


def test_embeddings_and_other_modules_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    blocks = nn.ModuleDict({"own": Own(8, 8), "plain": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    quantize(blocks, "int8")
    assert [type(module) for module in blocks.values()] == [Own, PackedLinear, nn.LayerNorm]
    assert blocks["plain"].weight.dtype is torch.float32


def test_a_quantization_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path)
    checkpoint = resolve(str(tmp_path), cache=tmp_path / "cache")
    with pytest.raises(CallerError, match="int3") as caught:
        load_span(checkpoint, BlockSpan(0, 1), dtype=torch.float32, device="cpu", quantization="int3")
    assert "int8" in caught.value.hint


def test_fewer_bits_plan_for_more_blocks() -> None:
    config = FAMILIES["llama"].config()
    config.update({"num_hidden_layers": 100, "hidden_size": 512, "intermediate_size": 1024})
    plans = {
        quantization: plan_capacity(
            config, device="cpu", dtype="float32", max_memory_bytes=850_000_000, quantization=quantization
        )
        for quantization in QUANTIZATIONS
    }
    blocks = [plans[name].max_blocks for name in ("none", "int8", "int4", "nf4")]
    assert blocks == sorted(set(blocks))
    assert {name: plan.quantization for name, plan in plans.items()} == {name: name for name in QUANTIZATIONS}
