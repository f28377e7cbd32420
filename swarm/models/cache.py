"""The cache that `generate` sees: how many columns there are, and which remote session each row continues.

Owns the life of those sessions: each one is released as soon as no row names it, at the latest when the cache is
closed or collected. Holds no keys or values; those stand at the peers.

Tensor names: B rows, T new columns, C all columns, N kept new columns of one row, D the model's hidden size.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable
from typing import NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from peers.model.adapters import Adapter, same
from swarm.errors import SessionClosed, UnsupportedCache, UnsupportedMask
from swarm.models.adapters import Attached
from swarm.models.layout import Layout
from swarm.models.rows import UNKNOWN_TOKEN, Extension, Row, Strand, extend
from swarm.session.remote import Remote, Resilience


class SwarmCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """A `past_key_values` whose keys and values stand at peers; for one thread at a time.

    Columns are what `generate` counts, padding included; only a row's tokens travel.
    """

    def __init__(
        self,
        remote: Remote,
        num_layers: int,
        held: list[Strand] | None = None,
        *,
        resilience: Resilience | None = None,
        prefix: Attached | None = None,
    ) -> None:
        """Rows may start from the strands in `held`; those that they do start from are taken out of the list.

        `prefix`: what stands before every row, in columns of its own; it is the caller's to put it into `adapter`.
        """
        super().__init__(layers=[])
        self.remote = remote
        self.rows: list[Row] = []
        self.kept_BC: Tensor | None = None
        """The columns that are tokens; None when all are."""
        self.expects = 0
        """Columns that there may come to be; 0 where nobody knows."""
        self._closed = False
        self._num_layers = num_layers
        self._resilience = resilience
        self.prefix = prefix
        self._columns = self.before = 0 if prefix is None else prefix.targets[0].rank
        self._held = held if held is not None else []
        self._strands: set[Strand] = set()
        weakref.finalize(self, _release, remote, self._strands).atexit = False  # then the network is going anyway

    def prepare(self, remote: Remote, batch: int) -> None:
        """Make sure that a forward of `batch` rows may use this cache. Raises SessionClosed and UnsupportedCache."""
        if self._closed:
            raise SessionClosed("this cache was closed; what it held at the peers is gone")
        if self.remote is not remote:
            raise UnsupportedCache("this cache belongs to another model")
        if not self.rows:
            self.rows = [Row()] * batch
        if len(self.rows) != batch:
            raise UnsupportedCache(f"this cache holds {len(self.rows)} rows and the batch has {batch}")

    def advance(
        self,
        hidden_BTD: Tensor,
        layout: Layout,
        *,
        token_ids_BT: Tensor | None,
        want_from: int,
        repeat_last: bool,
        regime: Hashable,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """Run one forward through the remote layers, with `adapter` in them, and hold its columns.

        Returns `[B, T, D]`: outputs from column `want_from` on, zeros before it and where there is padding. With
        `repeat_last`, a padded last column gets the output of its row's last token instead. Raises UnsupportedCache
        where another adapter computed what is held, UnsupportedMask where positions do not go on behind a prefix.
        """
        self.rows = [_going_on(row, adapter) for row in self.rows]
        self._check_beginnings(layout)
        if token_ids_BT is None:
            unknown = [UNKNOWN_TOKEN] * layout.width
            inputs: Iterable[tuple[Tensor | None, list[int]]] = [(None, unknown)] * len(layout.columns)
        else:
            inputs = zip(token_ids_BT.unbind(), token_ids_BT.tolist(), strict=True)
        extensions: list[Extension | None] = []
        for columns_N, first_position, hidden_ND, (ids_N, tokens) in zip(
            layout.columns, layout.first_positions, hidden_BTD.unbind(), inputs, strict=True
        ):
            want = want_from
            if columns_N is not None:
                chosen = columns_N.tolist()
                if not chosen:
                    extensions.append(None)
                    continue
                hidden_ND, ids_N = hidden_ND[chosen], None if ids_N is None else ids_N[chosen]
                tokens = [tokens[column] for column in chosen]
                want = sum(column < want_from for column in chosen)
                if repeat_last:
                    want = min(want, len(chosen) - 1)
            extensions.append(
                Extension(
                    hidden_TD=hidden_ND,
                    token_ids_T=ids_N,
                    tokens=tokens,
                    first_position=first_position,
                    want_from=want,
                )
            )
        rows, outputs = extend(
            self.remote,
            self.rows,
            extensions,
            regime_length=layout.regime_length,
            regime=regime,
            held=self._held,
            resilience=self._resilience,
            adapter=adapter,
            expects=self.expects,
        )
        self._replace_rows(rows)
        self._columns = layout.past + layout.width
        self.kept_BC = layout.kept_BC

        if want_from == 0 and all(columns_N is None for columns_N in layout.columns):
            return torch.stack([output for output in outputs if output is not None])
        out_BTD = torch.zeros_like(hidden_BTD)
        for row, (columns_N, output) in enumerate(zip(layout.columns, outputs, strict=True)):
            if output is None or not len(output):
                continue
            if columns_N is None:
                out_BTD[row, want_from:] = output
            else:
                out_BTD[row, columns_N[-len(output) :].to(output.device)] = output
                if repeat_last:
                    out_BTD[row, -1] = output[-1]
        return out_BTD

    def _check_beginnings(self, layout: Layout) -> None:
        """Raises UnsupportedMask where a row does not begin right behind the prefix."""
        for row, first, columns_N in zip(self.rows, layout.first_positions, layout.columns, strict=True):
            if self.before and first != self.before and not row.length and (columns_N is None or len(columns_N)):
                raise UnsupportedMask(f"a row begins at position {first}, and its prefix ends at {self.before}")

    def close(self) -> None:
        """Release what the rows hold. Idempotent."""
        self._closed = True
        self._replace_rows([])

    def take_strands(self) -> list[Strand]:
        """Close without releasing: the strands are the caller's from now on."""
        strands = list(self._strands)
        self._strands.clear()
        self.close()
        return strands

    def _replace_rows(self, rows: list[Row]) -> None:
        live = {row.strand for row in rows if row.strand is not None}
        unused = self._strands - live
        self.rows = rows
        self._strands.clear()
        self._strands |= live
        if self._held:
            self._held[:] = [strand for strand in self._held if strand not in live]
        if unused:
            self.remote.release([strand.session for strand in unused])

    # What generation asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        return -1  # what transformers before 5.2x calls get_max_length

    @property
    def max_cache_len(self) -> int:
        return -1  # PEFT asks before it puts a prefix in its place, which then says that it cannot

    def crop(self, tokens_to_remove: int) -> None:
        """Drop columns from the end: `-n` drops n, a positive number keeps that many."""
        drop = -tokens_to_remove if tokens_to_remove <= 0 else self._columns - tokens_to_remove
        drop = min(drop, self._columns)
        if drop <= 0:
            return
        self._columns -= drop
        dropped = [drop] * len(self.rows)
        if self.kept_BC is not None:
            dropped = self.kept_BC[:, self._columns :].sum(1).tolist()
            self.kept_BC = _unless_all(self.kept_BC[:, : self._columns])
        self.rows = [Row(row.strand, row.length - count) for row, count in zip(self.rows, dropped, strict=True)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on as row `beam_idx[i]` did; sessions fork only when two rows really part."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        chosen = indices.tolist()
        self._replace_rows([self.rows[index] for index in chosen])
        if self.kept_BC is not None:
            self.kept_BC = _unless_all(self.kept_BC[chosen])

    def reset(self) -> None:
        self._columns, self.kept_BC = 0, None
        self._replace_rows([])

    def activate_past_recording(self) -> None:
        """Nothing to do: a step that starts lower truncates at the peers."""

    def update(self, *args: object, **kwargs: object) -> NoReturn:
        raise UnsupportedCache("this cache holds no keys and values here; it works only with the model that made it")

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise UnsupportedCache(
            "a cache at peers cannot be copied", hint="use model.session() to start several prompts from one prefix"
        )

    def __len__(self) -> int:
        return self._num_layers

    def __repr__(self) -> str:
        return f"SwarmCache(rows={len(self.rows)}, columns={self._columns})"

    @property
    def batch_size(self) -> int:
        return len(self.rows) or -1

    @property
    def is_initialized(self) -> bool:
        return bool(self._columns)

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self._num_layers

    @property
    def is_linear(self) -> list[bool]:
        return [False] * self._num_layers

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * self._num_layers


def _going_on(row: Row, adapter: Adapter | None) -> Row:
    """What goes on with `adapter`: the row, or a new one in place of an empty one. Raises UnsupportedCache."""
    if row.strand is None or same(row.strand.adapter, adapter):
        return row
    if row.length:
        raise UnsupportedCache(
            "the adapter inside the layers is not the one that computed what this cache holds",
            hint="go on with the same adapter, or begin with a new cache; a session() begins anew by itself",
        )
    return Row()


def _unless_all(kept_BC: Tensor) -> Tensor | None:
    return None if kept_BC.all() else kept_BC


def _release(remote: Remote, strands: set[Strand]) -> None:
    remote.release([strand.session for strand in strands])
