"""The compiled products equal the exact ones for every shape, dtype, thread count and processor, and replace torch's
only where they do and are faster."""

from __future__ import annotations

import copy
import ctypes
import logging
import platform
import shutil
import subprocess
import threading
from array import array
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peers.model.kernels import FastLinear, accelerate, accelerating, build, experts, linear, pool_for
from peers.model.kernels.build import NoLibrary
from peers.model.kernels.packed import Format, PackedLinear, packed, whole
from peers.model.kernels.pool import Pool, Visits
from tests.helpers.families import FAMILIES, random_model

DTYPES = (torch.float32, torch.bfloat16)
ERROR = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
THREADS = (1, 2, 3)
POOLS = {threads: Pool(threads) for threads in THREADS}


def matrix(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_exact(product_MN: Tensor, input_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> None:
    right_MN = input_MK.double() @ weight_NK.double().T + (0 if bias_N is None else bias_N.double())
    summed_MN = input_MK.double().abs() @ weight_NK.double().abs().T  # where the terms cancel, their size tells
    assert (product_MN.double() - right_MN).norm() <= ERROR[
        product_MN.dtype
    ] * right_MN.norm() + 1e-6 * summed_MN.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=150, deadline=None)
@given(
    st.one_of(st.integers(1, 40), st.integers(60, 150)),
    st.integers(1, 70),
    st.integers(1, 300),
    st.booleans(),
    st.sampled_from(THREADS),
    st.integers(0, 1 << 16),
)
def test_products_of_any_shape_are_exact(
    dtype: torch.dtype, rows: int, outputs: int, inputs: int, biased: bool, threads: int, seed: int
) -> None:
    input_MK, weight_NK = matrix(rows, inputs, seed, dtype), matrix(outputs, inputs, seed + 1, dtype)
    bias_N = matrix(1, outputs, seed + 2)[0] if biased else None
    assert_exact(POOLS[threads].linear(input_MK, weight_NK, bias_N), input_MK, weight_NK, bias_N)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_that_are_shared_out_are_exact(dtype: torch.dtype, threads: int) -> None:
    for rows in (1, 7, 300):  # several slices of the input, several parts of the weights
        input_MK, weight_NK = matrix(rows, 517, rows, dtype), matrix(1003, 517, 1, dtype)
        assert_exact(POOLS[threads].linear(input_MK, weight_NK, None), input_MK, weight_NK, None)


@pytest.mark.parametrize("threads", THREADS)
@settings(max_examples=60, deadline=None)
@given(st.integers(5, 90), st.integers(1, 9), st.integers(1, 12), st.booleans(), st.integers(0, 1 << 16))
def test_products_that_a_matrix_unit_would_make_are_exact(
    threads: int, rows: int, outputs: int, inputs: int, biased: bool, seed: int
) -> None:
    input_MK = matrix(rows, 32 * inputs, seed, torch.bfloat16)
    weight_NK = matrix(16 * outputs, 32 * inputs, seed + 1, torch.bfloat16)
    bias_N = matrix(1, 16 * outputs, seed + 2)[0] if biased else None
    assert_exact(POOLS[threads].linear(input_MK, weight_NK, bias_N), input_MK, weight_NK, bias_N)
    for format_ in Format:
        codes, scales = packed(weight_NK, format_)
        right_NK = whole(codes, scales, format_, 32 * inputs, torch.float32)
        seen_NK = right_NK if format_ is Format.INT8 or rows <= 6 else right_NK.bfloat16()
        product_MN = POOLS[threads].linear(input_MK, codes, bias_N, scales, format_.value)
        right_MN = input_MK.double() @ seen_NK.double().T + (0 if bias_N is None else bias_N.double())
        assert (product_MN.double() - right_MN).norm() <= 2 * ERROR[torch.bfloat16] * right_MN.norm()


@pytest.mark.parametrize("threads", THREADS)
def test_products_of_more_rows_than_the_cache_holds_are_exact(threads: int) -> None:
    input_MK, weight_NK = matrix(701, 1536, 0, torch.bfloat16), matrix(208, 1536, 1, torch.bfloat16)
    assert_exact(POOLS[threads].linear(input_MK, weight_NK, None), input_MK, weight_NK, None)


def test_callers_in_several_threads_get_their_own_products() -> None:
    failures: list[AssertionError] = []

    def work(seed: int) -> None:
        input_MK, weight_NK = matrix(3, 400, seed), matrix(900, 400, seed + 50)
        for _ in range(200):
            try:
                assert_exact(POOLS[3].linear(input_MK, weight_NK, None), input_MK, weight_NK, None)
            except AssertionError as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("target", ["-march=x86-64-v3", "-march=x86-64-v2"])
@pytest.mark.skipif(platform.machine() != "x86_64", reason="targets of another processor family")
def test_what_other_processors_run_is_compiled_once_and_exact_too(
    target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HIVESWARM_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-O1", *build.FLAGS[1:]))  # half as long, and as exact
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    library = build._compiled(compiler, ((target,),))
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build._compiled(compiler, ((target,),)) == library
    other = build._declared(ctypes.CDLL(str(library)))
    monkeypatch.setattr("peers.model.kernels.pool.library", lambda: other)
    pool = Pool(2)
    for dtype in DTYPES:
        for rows, outputs, inputs in ((1, 5, 3), (2, 64, 96), (9, 33, 130), (40, 300, 301), (75, 131, 517)):
            input_MK, weight_NK = matrix(rows, inputs, rows, dtype), matrix(outputs, inputs, 9, dtype)
            assert_exact(pool.linear(input_MK, weight_NK, None), input_MK, weight_NK, None)
            for format_ in Format:
                codes, scales = packed(weight_NK, format_)
                right_NK = whole(codes, scales, format_, inputs, torch.float32)
                product_MN = pool.linear(input_MK, codes, None, scales, format_.value)
                assert_exact(product_MN, input_MK, right_NK.to(dtype) if rows > 9 else right_NK, None)
                unpacked_NK = pool.unpack(codes, scales, format_.value, inputs, dtype).float()
                assert (unpacked_NK - right_NK).norm() <= ERROR[dtype] * right_NK.norm()
        for tokens, slots, heads, K, V in ((1, 9, 4, 8, 16), (20, 20, 2, 24, 10), (150, 340, 6, 33, 70)):
            q, k, v = (
                torch.randn(1, rows, length, width, generator=torch.Generator().manual_seed(width)).to(dtype)
                for rows, length, width in ((heads, tokens, K), (2, slots, K), (2, slots, V))
            )
            out_THV = torch.empty(tokens, heads, V, dtype=dtype)
            visits = Visits(array("q", (0, tokens, 0, 1)), array("q", (0, slots)), slots, array("q"))
            pool.attend(q, k, v, out_THV, visits, 0.2, None, None)
            right_HTV = F.scaled_dot_product_attention(
                q[0].double(),
                *(each[0].double().repeat_interleave(heads // 2, 0) for each in (k, v)),
                attn_mask=torch.ones(tokens, slots).tril(slots - tokens) > 0,
                scale=0.2,
            )
            error = (out_THV.transpose(0, 1) - right_HTV).norm() / right_HTV.norm()
            assert error <= 1.5 * ERROR[dtype]  # the weights are rounded, too


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HIVESWARM_CACHE", str(tmp_path))
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'cannot do it' >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(NoLibrary, match="cannot do it"):
        build._compiled(str(broken))


def test_a_compiler_that_a_busy_machine_keeps_waiting_is_not_asked_for_a_slower_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compilations = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        if "--version" not in command:
            compilations.append(command)
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, 0, b"")

    monkeypatch.setenv("HIVESWARM_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(NoLibrary, match="did not end"):
        build._compiled("busy")
    assert len(compilations) == 1
    assert not list(tmp_path.rglob("*.so"))


class Layers(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def eager_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the library wins at every size."""
    monkeypatch.setattr(linear, "_fastest_s", lambda *_: (0.0, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("eager_library")
def test_accelerated_layers_say_the_same_and_stay_what_they_were(dtype: torch.dtype) -> None:
    layers = Layers(dtype)
    names, x = list(layers.state_dict()), matrix(5, 64, 0, dtype)
    before = layers(x)
    assert accelerate(layers, POOLS[1]) == 2
    assert isinstance(layers.first, FastLinear)
    assert isinstance(layers.first, nn.Linear)
    assert list(layers.state_dict()) == names
    for module in (layers, copy.deepcopy(layers)):
        torch.testing.assert_close(
            module(x.view(5, 1, 64))[:, 0], before, atol=2e-2 if dtype.itemsize == 2 else 1e-5, rtol=0
        )
    assert layers(x[:0]).shape == (0, 64)
    assert layers(matrix(64, 5, 1, dtype).T).shape == (5, 64)  # an input that is not contiguous


@pytest.mark.usefixtures("eager_library")
def test_products_of_more_rows_than_are_to_be_timed_are_torchs() -> None:
    accelerate(layers := Layers(), POOLS[1], rows=16)
    assert isinstance(layers.first, FastLinear)
    assert layers.first.rows_max == 16


@pytest.mark.parametrize(("product_s", "timed"), [(0.04, list(linear.ROWS_TIMED)), (0.06, [1, 4, 8, 12, 16])])
def test_between_products_others_may_compute_and_where_one_takes_long_fewer_rows_tell(
    product_s: float, timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def fastest_s(_: object, input_MK: Tensor, layers: list[nn.Module]) -> tuple[float, float]:
        rows.append(len(input_MK))
        return 0.0, product_s * len(layers)

    monkeypatch.setattr(linear, "_fastest_s", fastest_s)
    layers = Layers()
    steps = sum(1 for _ in accelerating(layers, POOLS[1]))
    assert rows == timed
    assert steps == len(timed) - 1
    assert isinstance(layers.first, FastLinear)
    assert layers.first.rows_max == linear.UNLIMITED


@pytest.mark.parametrize("outputs", [3 * linear.OUTPUTS_CHECKED, 16 * linear.OUTPUTS_CHECKED + 5])
@pytest.mark.parametrize("wrong", [*(slice(lane, None, 16) for lane in (0, 5, 15)), slice(-1, None)])
@pytest.mark.parametrize("format_", [None, *Format])
def test_an_output_is_checked_wherever_a_large_layer_has_it_and_not_all_of_them_at_once(
    monkeypatch: pytest.MonkeyPatch, outputs: int, wrong: slice, format_: Format | None
) -> None:
    """One lane of sixteen is wrong, or the last output."""
    right, double, exact = Pool.linear, Tensor.double, list[int]()

    def product(*arguments: Tensor) -> Tensor:
        output_MN = right(*arguments)
        output_MN[:, wrong] *= 1.1
        return output_MN

    def noted(tensor: Tensor) -> Tensor:
        exact.append(tensor.numel())
        return double(tensor)

    layer = nn.Linear(64, outputs).requires_grad_(False)
    layers = nn.Sequential(layer if format_ is None else PackedLinear(layer, format_))
    monkeypatch.setattr(Pool, "linear", product)
    monkeypatch.setattr(Tensor, "double", noted)
    assert accelerate(layers, POOLS[1]) == 0
    assert 0 < max(exact) <= 64 * linear.OUTPUTS_CHECKED


@pytest.mark.usefixtures("eager_library")
def test_gradients_and_other_dtypes_are_torchs_own() -> None:
    layers = Layers()
    accelerate(layers, POOLS[1])
    x = matrix(2, 64, 0).requires_grad_()
    layers(x).sum().backward()
    assert x.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert layers(matrix(2, 64, 0)).dtype is torch.bfloat16
    layers.to(torch.bfloat16)
    assert layers(matrix(2, 64, 0, torch.bfloat16)).dtype is torch.bfloat16


@pytest.mark.usefixtures("eager_library")
def test_hollow_weights_and_subclasses_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    layers = nn.ModuleList([Own(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, device="meta")]).requires_grad_(False)
    layers[1].weight.data = torch.zeros(()).expand(8, 8)
    assert accelerate(layers, POOLS[1]) == 0
    assert [type(layer) for layer in layers] == [Own, nn.Linear, nn.Linear]


@pytest.mark.usefixtures("eager_library")
def test_a_library_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    right = Pool.linear
    monkeypatch.setattr(Pool, "linear", lambda *arguments: right(*arguments) * 1.01)
    assert accelerate(layers := Layers(), POOLS[1]) == 0
    assert type(layers.first) is nn.Linear
    assert "wrong on this machine" in caplog.text


def test_a_library_that_is_slower_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_fastest_s", lambda *_: (2.0, 1.0))
    assert accelerate(Layers(), POOLS[1]) == 0


def test_without_a_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def none() -> None:
        raise NoLibrary("there is no C++ compiler (install g++ or clang)")

    monkeypatch.setattr("peers.model.kernels.pool.library", none)
    with caplog.at_level(logging.INFO):
        assert pool_for(torch.device("cpu"), 1) is None
    assert caplog.text.count("install g++ or clang") == 1


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "olmoe", "deepseek-v3"])
def test_experts_say_the_same_through_the_library(family: str) -> None:
    model = random_model(FAMILIES[family].config()).requires_grad_(False)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    mixtures = [module for module in model.modules() if experts.suits(module)]
    for mixture in mixtures:
        experts.install(mixture, POOLS[1], 1 << 30)
    assert mixtures
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5 * float(before.abs().max()), rtol=0)
    for mixture in mixtures:
        experts.install(mixture, POOLS[1], 0)  # too many rows: transformers' own
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5 * float(before.abs().max()), rtol=0)
