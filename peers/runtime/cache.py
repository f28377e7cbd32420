"""Keys and values of every session on the device, and the forward of a span that reads and writes them.

Owns the tensors; knows neither queues nor users. Two kinds stand behind one interface:

- `PagedCache`: a pool for each layer, any mixture of sessions in one forward, attention by `attention`.
- `SoloCache`: for architectures whose attention cannot be replaced (ALiBi families, GPT-J, Falcon, …): every session
  alone, with the model's own attention and a cache of its own. The same pages are counted, so limits hold all the same.

Which kind a model gets is found out, not looked up: `open_cache` runs a few random positions through both and takes the
paged one only if it understands every layer and says the same.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import causal_mask_function

from peers.errors import UnsupportedModel
from peers.model.adapters import Adapter
from peers.model.cutting import SpanModel
from peers.model.kernels import Pool
from peers.model.support import one_line
from peers.runtime.adapting import Adapting, Fittings, Place, noting_adaptable
from peers.runtime.arrangement import Arrangement, Shape, arrange
from peers.runtime.attention import (
    RAGGED,
    Attender,
    LayerPool,
    NotPluggable,
    Pattern,
    RaggedBatch,
    Segment,
    Whole,
    attend_one,
    attending,
    look,
    register,
)
from peers.runtime.flex import Flex, compiled
from peers.runtime.graphs import DIFFERENCE, GRAPH_BYTES, NOBODYS, Graphs, Record, fastest_s
from peers.runtime.memory import give_back
from peers.runtime.pages import PagePool, SlotCopy
from peers.runtime.program import TOKENS_MAX, NotFlat, Programs, record
from peers.runtime.scheduler import STEP_TOKENS
from peers.runtime.tape import Tapes
from peers.wire.messages import MAX_POSITIONS
from routing.ids import BlockSpan

logger = logging.getLogger(__name__)

SAMPLE = ((500, 1), (40, 1), (0, 150), (260, 1), (100, 50))
"""Positions that sessions hold, and those that are new, of a forward in which ways to attend are compared."""
STEPS = ((500, 1), (40, 1), (260, 4), (100, 1))
"""Likewise, of steps alone."""
PIECES = ((0, 64), (256, 64))
"""Likewise, of pieces of prompts."""


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """`tokens` new positions of a session from `start` on; the session's pages already reach to their end."""

    session: int
    start: int
    tokens: int
    adapter: Adapter | None = None
    """Of its client's own, which adds to these positions alone; a prefix of it was begun with."""


class SpanCache(Protocol):
    """What the engine needs of the device. Sessions are the integers of the `PagePool`."""

    shares_pages: bool
    """Whether a forked session really uses its parent's memory."""
    packs_sessions: bool
    """Whether one forward may hold several sessions."""
    adaptable: frozenset[Place]
    """Linear layers to which a chunk's adapter may add."""

    def forward(
        self,
        chunks: Sequence[Chunk],
        hidden_TH: Tensor,
        span: BlockSpan,
        regime_length: int,
        between: Callable[[], None] | None = None,
    ) -> Tensor:
        """Run the chunks, packed in order, through `span`. [T, H] on the model's device in and out.

        `between` is called between blocks, and behind attention that is not the model's own; it may run a forward of
        other sessions.
        """

    def at_once(self, chunk: Chunk, rows: memoryview, span: BlockSpan, regime_length: int) -> memoryview | None:
        """As `forward` of one chunk without an adapter, as bytes in the model's dtype, where that is one call of the
        library, which any thread may make; else None, and nothing has happened."""

    def prepare(self) -> Iterator[None]:
        """What makes later forwards faster and takes a second, in steps between which forwards may run; again whenever
        it is not `prepared`."""

    @property
    def prepared(self) -> bool:
        """False where forwards showed after `prepare` what else would make others like them faster."""

    def copy(self, copies: Iterable[SlotCopy]) -> None:
        """Move slots as `PagePool.grow` asks, before the next forward."""

    def begin(self, session: int, prefix: Adapter, length: int) -> None:
        """Fill the session's first `length` positions, which it has pages for, with what the adapter puts there."""

    def fork(self, parent: int, child: int, length: int) -> None:
        """May be called while a forward is running, whoever is in it."""

    def truncate(self, session: int, length: int) -> None: ...

    def release(self, session: int) -> None: ...

    def give_back(self) -> None:
        """No session holds a page: memory that keys and values took is the machine's, until others are written."""


class LayerShape(NamedTuple):
    """What one layer keeps per position."""

    shape: Shape
    dtype: torch.dtype
    heads: int
    """That query it."""


class PagedCache:
    """A pool of slots for each layer, shared by all sessions of `pages`, and with layers in other tables."""

    shares_pages = True
    packs_sessions = True

    def __init__(
        self,
        model: SpanModel,
        arrangement: Arrangement,
        dtypes: Sequence[torch.dtype],
        pages: PagePool,
        library: Pool | None = None,
        recorder: Record | None = None,
        adaptable: frozenset[Place] = frozenset(),
        graph_bytes: int = GRAPH_BYTES,
        *,
        attends: int = MAX_POSITIONS,
    ) -> None:
        """`dtypes`: of what is kept, in each frame of `arrangement`. `attends`: up to how many new positions of a
        session `library` does so in forwards that are not a tape."""
        self.adaptable = adaptable
        self._fittings = Fittings(model.device)
        self._model = model
        self._pages = pages
        self._library = library
        self._attends = attends
        self._programs: Programs | None = None
        self._tapes: Tapes | None = None
        self._recorder = recorder
        self._graph_bytes = graph_bytes
        self._graphs: Graphs | None = None
        self._whole: Whole | None = None
        self._arrangement = arrangement
        slots, nobodys = pages.num_pages * pages.page_size, NOBODYS if recorder else 0
        self._frames = [
            _allocate(frame, dtype, slots, model.device, nobodys=nobodys)
            for frame, dtype in zip(arrangement.frames, dtypes, strict=True)
        ]
        self._pools = _pools(arrangement, self._frames)

    def forward(
        self,
        chunks: Sequence[Chunk],
        hidden_TH: Tensor,
        span: BlockSpan,
        regime_length: int,
        between: Callable[[], None] | None = None,
    ) -> Tensor:
        tables = self._segments(chunks)
        adapting = _adapting(self._model, span, chunks, self._fittings)
        recorded = self._is_recorded(span, regime_length)
        programs = self._programs if recorded and between is None and len(hidden_TH) <= TOKENS_MAX else None
        tapes = self._tapes if recorded else None
        if programs is not None and self._graphs is not None and adapting is None:
            output_1TH = self._graphs(hidden_TH[None], tables)
            if output_1TH is not None:
                return output_1TH[0]
        pools = self._pools[span.start - self._model.span.start :]
        attends = MAX_POSITIONS if programs is not None and tapes is not None else self._attends
        batch = RaggedBatch(tables, pools, self._model.device, self._library, self._whole, attends)
        output_TH = None if tapes is None else tapes(hidden_TH, batch, adapting, between)
        if output_TH is None and programs is not None and adapting is None:
            output_TH = programs(hidden_TH[None], batch.positions_T[None], batch)[0]
        if output_TH is not None:
            return output_TH
        between = between if adapting is None else adapting.around(between)
        with attending(batch, between) as cache, adapting or nullcontext():
            return self._model.forward(
                hidden_TH[None],
                batch.positions_T[None],
                span=span,
                past_key_values=cache,
                regime_length=regime_length,
                between=between,
            )[0]

    def at_once(self, chunk: Chunk, rows: memoryview, span: BlockSpan, regime_length: int) -> memoryview | None:
        tapes = self._tapes
        if tapes is None or not (tapes.is_plain(chunk.tokens) and self._is_recorded(span, regime_length)):
            return None
        batch = RaggedBatch(self._segments([chunk]), (), self._model.device, self._library)
        return tapes.at_once(rows, chunk.tokens, batch)

    def _segments(self, chunks: Sequence[Chunk]) -> list[list[Segment]]:
        """Of each table."""
        return [
            [
                Segment(
                    start=chunk.start,
                    tokens=chunk.tokens,
                    runs=self._pages.runs(chunk.session, chunk.start + chunk.tokens, table),
                    first=self._pages.first(chunk.session, table),
                )
                for chunk in chunks
            ]
            for table in range(len(self._pages.windows))
        ]

    def _is_recorded(self, span: BlockSpan, regime_length: int) -> bool:
        """Whether a program, where there is one, says the same as the model for such a forward."""
        regime = self._model.regime
        return span == self._model.span and regime.key(regime_length) == regime.key(1)

    def prepare(self) -> Iterator[None]:
        """Afterwards short forwards of the whole span go by a program, where there is one, by tape or by graph."""
        if self._graphs is not None:
            yield from self._graphs.prepare()
            return
        model = self._model

        def forward(hidden_1TH: Tensor, position_ids_1T: Tensor, attender: Attender) -> Tensor:
            with attending(attender) as cache:
                return model.forward(hidden_1TH, position_ids_1T, past_key_values=cache, regime_length=1)

        try:
            self._programs = yield from record(forward, _random_hidden(model, 1)[0], _Observer(), model.max_positions)
        except NotFlat as error:
            logger.info("%s: short forwards run its own code: %s", model.config.model_type, error)
        else:
            self._tapes = yield from self._checked_tapes(self._programs)
            if self._tapes is not None:
                yield from self._tapes.prepare()
            if self._recorder is not None:
                like_H = _random_hidden(model, 1)[0]
                self._graphs = Graphs(self._programs, self._pools, like_H, self._recorder, self._graph_bytes)
                yield from self._graphs.prepare()
        if model.device.type == "cuda":  # a compiler takes its time, for which nobody waits
            threading.Thread(target=self.attend_at_once, args=(Flex(compiled()),), name="compile", daemon=True).start()

    @property
    def prepared(self) -> bool:
        return self._graphs is None or self._graphs.complete

    @torch.inference_mode()
    def attend_at_once(self, whole: Whole) -> None:
        """Let `whole` attend from now on, if it says the same for some sessions as they do one by one, and is faster.

        In any thread, while forwards run.
        """
        model, segments, slots = self._model, [], 0
        for start, tokens in SAMPLE:
            tokens = min(tokens, model.max_positions)
            start = min(start, model.max_positions - tokens)
            segments.append(Segment(start=start, tokens=tokens, runs=[(slots, start + tokens)]))
            slots += start + tokens
        pools = self._pools_of(slots + 1)  # one layer after another uses them
        hidden_TH = _random_hidden(model, sum(segment.tokens for segment in segments))

        def run(backend: Whole | None) -> Tensor:
            tables = [segments] * len(self._pages.windows)
            batch = RaggedBatch(tables, pools, model.device, self._library, backend, self._attends)
            positions_1T, longest = batch.positions_T[None], max(segment.end for segment in segments)
            with attending(batch) as cache:
                return model.forward(hidden_TH[None], positions_1T, past_key_values=cache, regime_length=longest)[0]

        name = model.config.model_type
        try:
            difference = (run(whole) - (right_TH := run(None))).float().norm()
            whole_s, usual_s = (fastest_s(functools.partial(run, backend), model.device) for backend in (whole, None))
        except Exception as error:  # whatever a compiler, or what it makes, may raise
            logger.info("%s: sessions attend one by one: %s", name, one_line(error))
            logger.debug("flex attention failed", exc_info=True)
            return
        times = f"{1000 * whole_s:.1f} ms at once, {1000 * usual_s:.1f} ms one by one"
        if difference <= DIFFERENCE * (right_TH - hidden_TH).float().norm() and whole_s <= usual_s:
            self._whole = whole
        logger.info("%s: sessions attend %s: %s", name, "at once" if self._whole else "one by one", times)

    def _checked_tapes(self, programs: Programs) -> Generator[None, None, Tapes | None]:
        """Tapes, if they say over a small cache of their own what programs and torch's attention do, of a few tokens
        with a past and of a piece for which no tape was written."""
        model, library = self._model, self._library
        if library is None:
            return None
        like_H = _random_hidden(model, 1)[0]
        past, piece = 8, min(40, model.max_positions - 8)
        pools = self._pools_of(past + max(piece, 6))
        tapes = Tapes(programs, like_H, pools, library)
        yield from tapes.prepare()
        for start, sessions, tokens in ((0, 3, 1), (1, 3, 1), (1, 1, 1), (0, 1, past), (past, 1, piece)):
            segments = [Segment(start=start, tokens=tokens, runs=[(2 * n, start + tokens)]) for n in range(sessions)]
            tables = [segments] * len(self._pages.windows)
            batch, again = (RaggedBatch(tables, pools, model.device, each) for each in (library, None))
            hidden_1TH = _random_hidden(model, sessions * tokens)[None]
            yield
            expected_1TH = programs(hidden_1TH, again.positions_T[None], again)
            if not tapes.agree(hidden_1TH, batch, expected_1TH, needed=tokens == 1):
                logger.info("%s: short forwards run as programs", model.config.model_type)
                return None
        layers = dict(zip(model.span, model.layers(), strict=True))
        places = {id(layers[block].get_submodule(path)): (block, path) for block, path in self.adaptable}
        return Tapes(programs, like_H, self._pools, library, places)

    def _pools_of(self, slots: int) -> list[LayerPool]:
        """Pools like this cache's, of so many slots, zero."""

        def fresh(like_1JSX: Tensor) -> Tensor:
            _, rows, _, width = like_1JSX.shape
            return like_1JSX.new_zeros(1, rows, slots, width)

        return _pools(self._arrangement, [(fresh(keys), fresh(values)) for keys, values in self._frames])

    def copy(self, copies: Iterable[SlotCopy]) -> None:
        for move in copies:
            for tensor in chain.from_iterable(self._frames):
                tensor.narrow(2, move.target, move.slots).copy_(tensor.narrow(2, move.source, move.slots))

    def begin(self, session: int, prefix: Adapter, length: int) -> None:
        prefixes = self._fittings.of(prefix).prefixes
        for block, pool in zip(self._model.span, self._pools, strict=True):
            if block not in prefixes:
                continue
            runs = self._pages.runs(session, length, pool.table)
            slots = torch.tensor([slot for first, count in runs for slot in range(first, first + count)])
            for tensor_1JSX, rows in zip((pool.keys_1JSK, pool.values_1JSV), prefixes[block], strict=True):
                given_1JPX = rows.view(length, tensor_1JSX.shape[1], -1).transpose(0, 1)[None]
                tensor_1JSX.index_copy_(2, slots.to(tensor_1JSX.device), given_1JPX.to(tensor_1JSX.dtype))

    def fork(self, parent: int, child: int, length: int) -> None:
        pass  # the block table says it all

    def truncate(self, session: int, length: int) -> None:
        pass

    def release(self, session: int) -> None:
        pass

    def give_back(self) -> None:
        give_back(chain.from_iterable(self._frames))


class SoloCache:
    """A cache of its own for every session, as transformers would keep it.

    transformers' layers never write into a tensor that they hold, they replace it; so copies of a cache share tensors,
    and a forward works on a copy that becomes the session's cache when it has ended well.
    """

    shares_pages = False
    packs_sessions = False

    def __init__(self, model: SpanModel, adaptable: frozenset[Place] = frozenset()) -> None:
        self.adaptable = adaptable
        self._model = model
        self._fittings = Fittings(model.device)
        self._caches: dict[int, DynamicCache] = {}

    def forward(
        self,
        chunks: Sequence[Chunk],
        hidden_TH: Tensor,
        span: BlockSpan,
        regime_length: int,
        between: Callable[[], None] | None = None,
    ) -> Tensor:
        (chunk,) = chunks
        model, end = self._model, chunk.start + chunk.tokens
        if chunk.session in self._caches:
            cache = _copy(self._caches[chunk.session], chunk.start)
        else:
            cache = model.new_cache(span)
            # a sliding layer would forget what a rollback needs
            cache.layers = [DynamicLayer() if layer.is_sliding else layer for layer in cache.layers]
        adapting = _adapting(model, span, chunks, self._fittings)
        with adapting or nullcontext():
            output_1TH = model.forward(
                hidden_TH[None],
                torch.arange(chunk.start, end, device=model.device)[None],
                span=span,
                past_key_values=cache,
                attention_mask=torch.ones(1, end, dtype=torch.long, device=model.device),  # ALiBi is built from it
                regime_length=regime_length,
                between=between if adapting is None else adapting.around(between),
            )
        self._caches[chunk.session] = cache
        return output_1TH[0]

    def at_once(self, chunk: Chunk, rows: memoryview, span: BlockSpan, regime_length: int) -> memoryview | None:
        return None

    def prepare(self) -> Iterator[None]:
        return iter(())

    @property
    def prepared(self) -> bool:
        return True

    def copy(self, copies: Iterable[SlotCopy]) -> None:
        pass

    def begin(self, session: int, prefix: Adapter, length: int) -> None:
        raise AssertionError("a prefix stands in pages, which sessions do not share here")

    def fork(self, parent: int, child: int, length: int) -> None:
        self._caches[child] = _copy(self._caches[parent], length)

    def truncate(self, session: int, length: int) -> None:
        if length == 0:
            self.release(session)
        elif session in self._caches and self._caches[session].get_seq_length() > length:
            self._caches[session] = _copy(self._caches[session], length)

    def release(self, session: int) -> None:
        self._caches.pop(session, None)

    def give_back(self) -> None:
        give_back(())

    def bytes_per_token(self, session: int) -> int:
        """What the session keeps per position. Raises UnsupportedModel when that is nothing or cannot be cut short."""
        cache = self._caches[session]
        if not cache.is_croppable or not all(layer.get_seq_length() for layer in cache.layers):
            raise UnsupportedModel("some of its layers keep no keys and values that a rollback could shorten")
        tensors = [part for layer in cache.layers for part in vars(layer).values() if isinstance(part, Tensor)]
        return -(-sum(tensor.nbytes for tensor in tensors) // int(cache.get_seq_length()))


def _copy(cache: DynamicCache, length: int) -> DynamicCache:
    """The first `length` positions; shares tensors with `cache`."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    copied.crop(length - copied.get_seq_length())
    return copied


def open_cache(
    model: SpanModel,
    num_pages: int,
    page_size: int,
    library: Pool | None = None,
    recorder: Record | None = None,
    *,
    slack: int = 0,
    graph_bytes: int = GRAPH_BYTES,
) -> tuple[SpanCache, PagePool]:
    """The cache that this model can have, and its books; selects the attention to go with it.

    It takes the memory of `num_pages` pages of all layers, which layers that slide leave to others (see `arrangement`;
    `slack` is of a `PagePool`). With `library`, sessions attend through it where that was found to say the same
    and is no slower; with `recorder`, steps of single positions run as graphs (`graphs`) where these do, in
    `graph_bytes`.

    Raises UnsupportedModel when its layers keep nothing that could be rolled back.
    """
    observed = _observe(model)
    if observed is not None:
        layers, adaptable = observed
        shapes, dtypes, _ = zip(*layers, strict=True)
        # layers can share memory only in one dtype
        arrangement = arrange(model.windows if len(set(dtypes)) == 1 else [None] * len(shapes), shapes)
        dtypes = dtypes[: len(arrangement.frames)]
        for backend in dict.fromkeys((library, None)):
            if _agrees(model, arrangement, dtypes, backend):
                pages = PagePool(arrangement.pages(num_pages), page_size, arrangement.windows, slack)
                own = model, arrangement, dtypes, pages, backend, recorder, adaptable, graph_bytes
                attends = 0 if backend is None else _attends(backend, layers[0])
                if attends is None:
                    logger.error("the compiled attention is wrong on this machine; torch's is used")
                    continue
                if backend is not None and attends < MAX_POSITIONS:
                    what = "pieces of prompts" if attends else "steps and pieces of prompts"
                    logger.info("%s of %s attend by torch, which is faster here", what, model.config.model_type)
                return PagedCache(*own, attends=attends), pages
        logger.warning("ragged attention changes what %s computes: sessions run alone", model.config.model_type)
        model.set_attention(None)
    _, adaptable = _observe_alone(model)
    return SoloCache(model, adaptable), PagePool(num_pages, page_size)


def bytes_per_token(model: SpanModel) -> int:
    """What one position costs at all layers of the span. Raises UnsupportedModel when nothing is kept."""
    observed = _observe(model)
    if observed is None:
        return _observe_alone(model)[0]
    layers, _ = observed
    return sum(layer.shape.elements * layer.dtype.itemsize for layer in layers)


def _adapting(model: SpanModel, span: BlockSpan, chunks: Sequence[Chunk], fittings: Fittings) -> Adapting | None:
    """None where no chunk has an adapter that adds to a layer."""
    if all(chunk.adapter is None for chunk in chunks):
        return None
    adapting = Adapting(model.layers(span), span, [(chunk.tokens, chunk.adapter) for chunk in chunks], fittings)
    return adapting if adapting.layers else None


@torch.inference_mode()
def _observe_alone(model: SpanModel) -> tuple[int, frozenset[Place]]:
    """Bytes per token, and which layers can be adapted. Raises UnsupportedModel when nothing is kept."""
    cache = SoloCache(model)
    with noting_adaptable(model, 4) as adaptable:
        cache.forward([Chunk(session=0, start=0, tokens=4)], _random_hidden(model, 4), model.span, 4)
    return cache.bytes_per_token(0), frozenset(adaptable)


class _Observer:
    """Attends over the forward's own keys and notes what each layer keeps."""

    def __init__(self) -> None:
        self.shapes: list[LayerShape] = []

    def attend(
        self,
        q_1HTK: Tensor,
        k_1JTK: Tensor,
        v_1JTV: Tensor,
        pattern: Pattern,
        scale: float,
        softcap: float | None,
        sinks_H: Tensor | None,
    ) -> Tensor:
        _, H, T, K = q_1HTK.shape
        _, J, _, V = v_1JTV.shape
        self.shapes.append(LayerShape(Shape(J, K, V), k_1JTK.dtype, H))
        mask_nL = look(Segment(start=0, tokens=T, runs=[(0, T)]), pattern.function, q_1HTK).mask_nL
        q_TJGK = q_1HTK[0].transpose(0, 1).reshape(T, J, H // J, K)
        return attend_one(q_TJGK, k_1JTK, v_1JTV, mask_nL, scale, softcap, sinks_H).reshape(1, T, H, V).contiguous()


@torch.inference_mode()
def _observe(model: SpanModel) -> tuple[list[LayerShape], frozenset[Place]] | None:
    """Shapes per layer, what can be adapted, and ragged attention selected; None, and the model's own, where it does
    not understand the layers."""
    if model.pluggable:
        register()
        model.set_attention(RAGGED)
        observer = _Observer()
        positions_1T = torch.arange(4, device=model.device)[None]
        try:
            with attending(observer) as cache, noting_adaptable(model, 4) as adaptable:
                model.forward(_random_hidden(model, 4)[None], positions_1T, past_key_values=cache, regime_length=4)
            if len(observer.shapes) == len(model.span):
                return observer.shapes, frozenset(adaptable)
            logger.warning("%s attends otherwise than once per block: sessions run alone", model.config.model_type)
        except NotPluggable as error:
            logger.warning("%s: sessions run alone: %s", model.config.model_type, error)
    model.set_attention(None)
    return None


@torch.inference_mode()
def _agrees(model: SpanModel, arrangement: Arrangement, dtypes: Sequence[torch.dtype], library: Pool | None) -> bool:
    """Whether two sessions packed together, piece by piece, come out as each of them alone and at once.

    A position agrees when it differs by less than 2 % of what the span adds to it, or by a few roundings of its dtype.
    Two of the six that have a past need not: in low precision a token may go to another expert.
    """
    given_2LH = _random_hidden(model, 12).view(2, 6, -1)
    pages = PagePool(8 * len(arrangement.windows), 2, arrangement.windows)
    paged, solo = PagedCache(model, arrangement, dtypes, pages, library), SoloCache(model)
    packed = []
    for session in (0, 1):
        pages.open(session)
    for start, end in ((0, 3), (3, 5), (5, 6)):
        for session in (0, 1):
            pages.slide(session)
            pages.grow(session, end)
        chunks = [Chunk(session=session, start=start, tokens=end - start) for session in (0, 1)]
        output_TH = paged.forward(chunks, given_2LH[:, start:end].flatten(0, 1), model.span, 6)
        packed.append(output_TH.view(2, end - start, -1))
    model.set_attention(None)
    chunk_of = [Chunk(session=session, start=0, tokens=6) for session in (0, 1)]
    alone_2LH = torch.stack([solo.forward([chunk_of[i]], given_2LH[i], model.span, 6) for i in (0, 1)])
    model.set_attention(RAGGED)
    allowed_2L = 0.02 * (alone_2LH - given_2LH).float().norm(dim=2)
    allowed_2L += 4 * torch.finfo(model.dtype).eps * alone_2LH.float().norm(dim=2)
    distance_2L = (torch.cat(packed, 1) - alone_2LH).float().norm(dim=2)
    return int((distance_2L < allowed_2L)[:, 3:].sum()) >= 4


@torch.inference_mode()
def _attends(library: Pool, layer: LayerShape) -> int | None:
    """Up to how many new positions of a session `library` attends in a layer in no more time than torch: none, those of
    steps, or any; None where it does not say the same."""
    if not (steps := _pays(library, layer, STEPS)):
        return None if steps is None else 0
    if (pieces := _pays(library, layer, PIECES)) is None:
        return None
    return MAX_POSITIONS if pieces else STEP_TOKENS


def _pays(library: Pool, layer: LayerShape, sample: Sequence[tuple[int, int]]) -> bool | None:
    """Whether it takes no longer than torch; None where it says something else."""
    segments, slots = [], 0
    for start, tokens in sample:
        segments.append(Segment(start=start, tokens=tokens, runs=[(slots, start + tokens)]))
        slots += start + tokens
    (J, K, V), tokens = layer.shape, sum(segment.tokens for segment in segments)

    def random(rows: int, positions: int, width: int) -> Tensor:
        return torch.randn(1, rows, positions, width, generator=torch.Generator().manual_seed(rows)).to(layer.dtype)

    pool = LayerPool(keys_1JSK=random(J, slots, K), values_1JSV=random(J, slots, V))
    given = random(layer.heads, tokens, K), random(J, tokens, K), random(J, tokens, V)

    def attend(backend: Pool | None) -> Tensor:
        batch = RaggedBatch([segments], [pool], torch.device("cpu"), backend)
        return batch.attend(*given, Pattern(causal_mask_function), K**-0.5, None, None)

    right = attend(None).float()
    if not (attend(library).float() - right).norm() <= DIFFERENCE * right.norm():
        return None
    library_s, torch_s = (fastest_s(functools.partial(attend, each), torch.device("cpu")) for each in (library, None))
    return library_s <= torch_s


def _random_hidden(model: SpanModel, tokens: int) -> Tensor:
    hidden_TH = torch.randn(tokens, model.hidden_size, generator=torch.Generator().manual_seed(0))
    return hidden_TH.to(model.device, model.dtype)


def _pools(arrangement: Arrangement, frames: Sequence[tuple[Tensor, Tensor]]) -> list[LayerPool]:
    """Of each layer: its part of its frame's keys and values."""
    pools = []
    for (rows, K, V), place in zip(arrangement.shapes, arrangement.places, strict=True):
        keys, values = (tensor.narrow(1, place.row, rows) for tensor in frames[place.frame])
        keys, values = keys.narrow(3, place.key_column, K), values.narrow(3, place.value_column, V)
        pools.append(LayerPool(keys_1JSK=keys, values_1JSV=values, table=place.table))
    return pools


def _allocate(
    frame: Shape, dtype: torch.dtype, slots: int, device: torch.device, *, nobodys: int = 0
) -> tuple[Tensor, Tensor]:
    """Only `nobodys` slots at the end are zeroed: others are written before they are read, and untouched memory costs
    nothing until then."""

    def allocated(width: int) -> Tensor:
        tensor = torch.empty(1, frame.rows, slots + nobodys, width, dtype=dtype, device=device)
        tensor[:, :, slots:] = 0
        return tensor

    return allocated(frame.key_width), allocated(frame.value_width)
