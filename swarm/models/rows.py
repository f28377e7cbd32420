"""Batch rows as sequences at remote layers.

Owns which remote session a row continues, forks or shares. Rows may share a session for as long as they hold the same
tokens: beams, parallel samples and repeated prompts are computed once and fork where they part. Knows neither masks
nor columns (see `swarm.models.layout`), and no network behind `Remote`.

Tensor names: T new positions of one row, D the model's hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from peers.model.adapters import Adapter, same
from swarm.session.remote import Remote, RemoteSession, Resilience, RowStep

UNKNOWN_TOKEN = -1
"""Stands in `Strand.tokens` for an embedding that came from no token; equal to nothing, itself included."""


@dataclass(slots=True, eq=False)
class Strand:
    """A remote session and what it holds."""

    session: RemoteSession
    tokens: list[int] = field(default_factory=list)
    offset: int = 0
    """Position id minus index, for every token."""
    regimes: set[Hashable] = field(default_factory=set)
    """The rotary regimes under which the tokens were computed."""
    adapter: Adapter | None = None
    """With which they were."""

    def truncate(self, length: int) -> None:
        del self.tokens[length:]
        if not length:
            self.regimes.clear()


@dataclass(frozen=True, slots=True)
class Row:
    """The first `length` tokens of a strand; several rows may name one strand."""

    strand: Strand | None = None
    length: int = 0

    @property
    def offset(self) -> int | None:
        return self.strand.offset if self.strand is not None and self.length else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """What one row adds in one forward."""

    hidden_TD: Tensor
    token_ids_T: Tensor | None
    tokens: list[int]
    first_position: int
    want_from: int

    def without(self, count: int) -> Extension:
        """The same, less its first `count` positions, of which no output may be wanted."""
        return replace(
            self,
            hidden_TD=self.hidden_TD[count:],
            token_ids_T=None if self.token_ids_T is None else self.token_ids_T[count:],
            tokens=self.tokens[count:],
            first_position=self.first_position + count,
            want_from=self.want_from - count,
        )


def extend(
    remote: Remote,
    rows: Sequence[Row],
    extensions: Sequence[Extension | None],
    *,
    regime_length: int,
    regime: Hashable,
    held: Sequence[Strand] = (),
    resilience: Resilience | None = None,
    adapter: Adapter | None = None,
    expects: int = 0,
) -> tuple[list[Row], list[Tensor | None]]:
    """Run what the rows add; return the rows as they then are and each one's wanted outputs, `[T − want_from, D]`.

    An empty row starts from the strand in `held` with which it shares the longest prefix; no row may be using those.
    `adapter` is that of all rows, `expects` the length that each may come to have.
    When this raises, nothing new is open, and strands are as before except that they may be shorter: cut down to what
    the rows still need.
    """
    rows, extensions = list(rows), list(extensions)
    if held:
        for index, extension in enumerate(extensions):
            if extension is not None and not rows[index].length:
                rows[index] = _longest_prefix(held, extension, regime, adapter)
                extensions[index] = extension.without(rows[index].length)

    leaders = _leaders(rows, extensions)
    needed: dict[Strand, int] = {}
    for row in rows:
        if row.strand is not None:
            needed[row.strand] = max(row.length, needed.get(row.strand, 0))

    steps: list[RowStep] = []
    strands: dict[int, Strand] = {}
    opened: list[RemoteSession] = []
    for index, leader in enumerate(leaders):
        extension, row = extensions[index], rows[index]
        if extension is None or leader != index:
            continue
        if row.strand is not None and needed.get(row.strand) == row.length:
            # Nobody needs what comes behind this row's length, so it may go on in place; the others fork below it.
            strand = row.strand
            del needed[strand]
            strand.truncate(row.length)
        else:
            strand = _fork(remote, row, resilience, adapter)
            opened.append(strand.session)
        if not row.length:
            strand.offset = extension.first_position
        strands[index] = strand
        steps.append(
            RowStep(
                session=strand.session,
                start=row.length,
                hidden_TD=extension.hidden_TD,
                token_ids_T=extension.token_ids_T,
                position_offset=strand.offset,
                want_from=extension.want_from,
                regime_length=regime_length,
                expects=expects,
            )
        )
    try:
        outputs = dict(zip(strands, remote.run(steps), strict=True)) if steps else {}
    except BaseException:
        remote.release(opened)
        raise

    for index, strand in strands.items():
        extension = extensions[index]
        assert extension is not None
        strand.tokens += extension.tokens
        strand.regimes.add(regime)
        rows[index] = Row(strand, len(strand.tokens))
    return (
        [rows[leader] for leader in leaders],
        [None if extensions[index] is None else outputs[leader] for index, leader in enumerate(leaders)],
    )


def _fork(remote: Remote, row: Row, resilience: Resilience | None, adapter: Adapter | None) -> Strand:
    if row.strand is None or not row.length:
        return Strand(remote.open(resilience=resilience, adapter=adapter), adapter=adapter)
    parent = row.strand
    session = remote.open(parent.session, row.length)
    return Strand(session, parent.tokens[: row.length], parent.offset, set(parent.regimes), parent.adapter)


def _leaders(rows: Sequence[Row], extensions: Sequence[Extension | None]) -> list[int]:
    """For each row, the first row that is in the same state and adds the same; its outputs serve both."""
    leaders = list(range(len(rows)))
    if len(rows) == 1:
        return leaders
    first: dict[Hashable, int] = {}
    for index, (row, extension) in enumerate(zip(rows, extensions, strict=True)):
        if extension is None:
            continue
        key = (row, extension.first_position, extension.want_from, tuple(extension.tokens))
        leader = first.setdefault(key, index)
        other = extensions[leader]
        assert other is not None
        if torch.equal(other.hidden_TD, extension.hidden_TD):
            leaders[index] = leader
    return leaders


def _longest_prefix(held: Sequence[Strand], extension: Extension, regime: Hashable, adapter: Adapter | None) -> Row:
    """The longest prefix of `extension` that a strand holds, was computed as it would be now, and gives no output."""
    best = Row()
    limit = min(extension.want_from, len(extension.tokens) - 1)
    for strand in held:
        if strand.offset != extension.first_position or strand.regimes != {regime}:
            continue
        if not same(strand.adapter, adapter):
            continue
        length = 0
        for ours, theirs in zip(extension.tokens[:limit], strand.tokens, strict=False):
            if ours != theirs or ours == UNKNOWN_TOKEN:
                break
            length += 1
        if length > best.length:
            best = Row(strand, length)
    return best
