"""Programs say what forwards say, and tapes what programs say, for any mixture of sessions, whatever the family."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from peers.model.kernels import Pool, accelerate, linear, opaque
from peers.model.quantization import NONE, quantize
from peers.runtime.cache import Chunk, PagedCache, open_cache
from routing.ids import BlockSpan
from tests.helpers.families import FAMILIES
from tests.peers.runtime.spans import Local

NOT_FLAT = {"llama-dynamic", "jetmoe"}
"""Families whose Python looks at values that follow from its inputs: at the longest position, at how many rows each
expert has. (BioGPT looks at a mask that it has made itself.)"""
WITHOUT = {
    *NOT_FLAT,  # no program either
    "phi3-longrope",  # writes into what is not its own
    "gpt-oss",  # torch does not say beforehand what its experts' products look like
}
LIBRARY = Pool(1)
ERROR_MAX = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def opened(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, *, quantization: str = NONE, pages: int = 64
) -> PagedCache:
    monkeypatch.setattr(linear, "_fastest_s", lambda *_: (0.0, 1.0))  # every layer is the library's
    model = Local(family, BlockSpan(1, 3)).cut()
    model.module.to(dtype)
    model.dtype = dtype
    quantize(model.module, quantization)
    accelerate(model.module, LIBRARY)
    with torch.inference_mode():
        cache, _ = open_cache(model, pages, 4, LIBRARY)
        for _ in cache.prepare():
            pass
    assert isinstance(cache, PagedCache)
    return cache


@torch.inference_mode()
def assert_same_with_and_without(cache: PagedCache, dtype: torch.dtype, seed: int) -> None:
    """Sessions that grow by a token or a few, in any company; rows of one session are runs of pages that lie apart."""
    rng, pages, tapes = random.Random(seed), cache._pages, cache._tapes
    lengths = dict.fromkeys(range(4), 0)
    for session in lengths:
        pages.open(session)
    ran = 0
    for _ in range(12):
        chosen = rng.sample(sorted(lengths), rng.randint(1, 4))
        chunks = []
        for session in chosen:
            tokens = rng.choice([1, 1, 1, 3, 16])
            pages.slide(session)
            pages.grow(session, lengths[session] + tokens)
            chunks.append(Chunk(session=session, start=lengths[session], tokens=tokens))
            lengths[session] += tokens
        total = sum(chunk.tokens for chunk in chunks)
        hidden_TH = torch.randn(total, cache._model.hidden_size).to(dtype)
        outputs: list[Tensor] = []
        for some in (None, tapes):
            cache._tapes = some
            outputs.append(cache.forward(chunks, hidden_TH, cache._model.span, 0).double())
        program, tape = outputs
        assert (tape - program).norm() <= ERROR_MAX[dtype] * program.norm()
        assert tapes is not None
        ran += tapes._tapes.get(total) is not None
    assert ran


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.pluggable])
def test_a_family_has_a_program_and_a_tape_that_say_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened(family, torch.float32, monkeypatch)
    assert (cache._programs is None) == (family in NOT_FLAT)
    assert (cache._tapes is None) == (family in WITHOUT)
    if cache._tapes is not None:
        assert_same_with_and_without(cache, torch.float32, seed=0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "gpt-neox", "opt"])
def test_in_bfloat16_too(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_with_and_without(opened(family, torch.bfloat16, monkeypatch), torch.bfloat16, seed=1)


@pytest.mark.parametrize("quantization", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_weights_in_fewer_bits_too(dtype: torch.dtype, quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_with_and_without(opened("llama", dtype, monkeypatch, quantization=quantization), dtype, seed=2)


@pytest.mark.parametrize(("family", "has_a_line"), [("llama", True), ("gpt-neox", False)])
def test_where_the_librarys_activation_is_slow_with_many_numbers_pieces_do_not_go_by_tape(
    family: str, has_a_line: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tapes = opened(family, torch.float32, monkeypatch)._tapes
    assert tapes is not None
    assert (tapes._line is not None) == has_a_line


@torch.inference_mode()
def test_a_tape_is_whole_also_while_another_engine_records(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened("llama", torch.float32, monkeypatch)
    assert cache._programs is not None
    with opaque.through(lambda product, _, *inputs: product(*inputs)):
        checking = cache._checked_tapes(cache._programs)
        found = []

        def keep() -> Iterator[None]:
            found.append((yield from checking))

        assert list(keep())
        (tapes,) = found
        assert tapes is not None
        tape = tapes._write(1, {})
    assert tape is not None
    assert all(isinstance(part, Tensor) for part in tape.parts)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("opt", torch.float32), ("llama", torch.bfloat16)]
)
@torch.inference_mode()
def test_where_tapes_are_linear_in_positions_none_need_be_written(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of any size, between whose blocks others run."""
    cache = opened(family, dtype, monkeypatch, pages=256)
    tapes, span, pages = cache._tapes, cache._model.span, cache._pages
    assert tapes is not None
    written = tapes._write
    monkeypatch.setattr(tapes, "_write", lambda *_: pytest.fail("written again"))

    def forward(session: int, hidden_TH: Tensor, between: Callable[[], None] | None = None) -> Tensor:
        start = pages.length(session)
        pages.grow(session, start + len(hidden_TH))
        chunk = Chunk(session=session, start=start, tokens=len(hidden_TH))
        return cache.forward([chunk], hidden_TH, span, 0, between).double()

    others: list[Tensor] = []
    short_TH = torch.randn(3, cache._model.hidden_size).to(dtype)

    def another() -> None:
        session = 1000 + len(others)
        pages.open(session)
        others.append(forward(session, short_TH))
        pages.release(session)

    for number, tokens in enumerate((2, 7, 33, 63, 64, 101, 160), 1):
        long_TH = torch.randn(tokens, cache._model.hidden_size).to(dtype)
        outputs = []
        for way, between in enumerate((None, None, another)):
            session = 3 * number + way
            pages.open(session)
            cache._tapes = tapes if way else None
            outputs.append(torch.cat([forward(session, part, between) for part in (long_TH, long_TH[:2])]))
            pages.release(session)
        right, at_once, with_others = outputs
        assert (at_once - right).norm() <= ERROR_MAX[dtype] * right.norm()
        assert torch.equal(with_others, at_once)
        assert len(others) == 2 * len(span) * number
        assert all(torch.equal(other, others[0]) for other in others)
    monkeypatch.setattr(tapes, "_write", written)
    for tokens in (64, 128, 320):  # to the bit, where places are at multiples of the same bytes
        mine, own = tapes._on_the_line(tokens), written(tokens, {})
        assert mine is not None
        assert own is not None
        assert mine.code is not None
        assert own.code is not None
        assert torch.equal(mine.code, own.code)
        assert mine.arena_bytes == own.arena_bytes
