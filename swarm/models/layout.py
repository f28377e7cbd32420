"""Where the columns of a padded batch stand in sequences that have no padding.

Owns the meaning of attention masks and position ids: which columns travel, and at which position each row continues.
What remote layers cannot reproduce raises UnsupportedMask; nothing is ignored. Knows neither sessions nor models.

Remote layers count the tokens of a sequence 0, 1, 2, …; a constant offset between that count and the position ids (left
padding, say) changes the embedding only, since layers see relative positions.

Tensor names: B rows, T new columns, C all columns (cached and new), N kept new columns of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peers.wire.messages import Jumps
from swarm.errors import ContextTooLong, UnsupportedMask


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionRules:
    """How one architecture counts."""

    takes_position_ids: bool
    """Whether its forward has a `position_ids` argument."""
    counts_kept: bool
    """Whether its own default positions count kept tokens (OPT) rather than columns (Llama)."""
    embeds_positions: bool = True
    """Whether what enters its first layer depends on them."""
    max_positions: int | None
    """Positions it was made for, or None when nothing bounds them."""
    window: int | None
    """The smallest sliding window or attention chunk, which a local model measures in columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One forward, seen as sequences."""

    past: int
    """Cached columns."""
    width: int
    """New columns."""
    kept_BC: Tensor | None
    """True where a column is a token, on the CPU; None when all are."""
    columns: tuple[Tensor | None, ...]
    """Per row, the new columns that are tokens (`[N]`, on the CPU); None when all are."""
    first_positions: tuple[int, ...]
    """Per row, the position id of its first kept new column; 0 when it has none."""
    regime_length: int
    """Highest position id plus one, padding included, as a local forward would see it."""
    jumps: tuple[Jumps, ...]
    """Per row, kept new columns, counted without padding, before which position ids are left out, and how many."""


def lay_out(
    rules: PositionRules,
    *,
    batch: int,
    width: int,
    past: int,
    cached_BC: Tensor | None,
    lengths: Sequence[int],
    offsets: Sequence[int | None],
    mask: object,
    position_ids: Tensor | None,
    gaps: bool = False,
    alone: bool = False,
) -> Layout:
    """Lay out `width` new columns behind `past` cached ones.

    `cached_BC` is the `kept_BC` of the previous layout; `lengths` and `offsets` say how many tokens each row holds
    and how far its position ids run ahead of that count (None while it holds none). `gaps`: whether the position ids
    of a row may leave some out. `alone`: where no position ids are given and nothing but layers sees them, a row counts
    its tokens as it would without padding, wherever that stands in it. Raises UnsupportedMask and ContextTooLong.
    """
    kept_BC = _kept_columns(mask, batch=batch, past=past, width=width, cached_BC=cached_BC)
    counts_kept = rules.counts_kept or (alone and not rules.embeds_positions)
    ids_BT = _position_ids(rules, position_ids, kept_BC, batch=batch, past=past, width=width, counts_kept=counts_kept)
    if kept_BC is not None:
        _refuse_gaps(rules, kept_BC, has_position_ids=ids_BT is not None)

    all_kept_B = [True] * batch if kept_BC is None else kept_BC[:, past:].all(1).tolist()
    first_ids_B = [past] * batch if ids_BT is None else ids_BT[:, 0].tolist()
    columns: list[Tensor | None] = []
    first_positions: list[int] = []
    jumps: list[Jumps] = []
    for row in range(batch):
        columns_N, count, first_position = None, width, first_ids_B[row]
        positions_N = None if ids_BT is None or width == 1 else ids_BT[row]
        if not all_kept_B[row]:
            assert kept_BC is not None
            columns_N = kept_BC[row, past:].nonzero().flatten()
            count = len(columns_N)
            if count:
                positions_N = columns_N + past if ids_BT is None else ids_BT[row, columns_N]
                first_position = int(positions_N[0])
        columns.append(columns_N)
        jumps.append(())
        if not count:
            first_positions.append(0)
            continue
        if not rules.takes_position_ids:
            first_position = lengths[row] + (offsets[row] or 0)
        elif positions_N is not None and count > 1 and ((skipped_N := positions_N.diff() - 1) != 0).any():
            if not gaps or (skipped_N < 0).any():
                raise UnsupportedMask(
                    f"the position ids of row {row} do not count its kept tokens one by one",
                    hint="give it a call of its own without padding, where the gap is padding behind a learned prompt; "
                    "else pass a 2-D mask of the whole sequence, and position ids without gaps",
                )
            jumps[row] = tuple((at, skipped) for at, skipped in enumerate(skipped_N.tolist(), 1) if skipped)
        if (offset := offsets[row]) is not None and first_position != lengths[row] + offset:
            raise UnsupportedMask(
                f"row {row} goes on at position {first_position}, but the next one after its cached tokens is "
                f"{lengths[row] + offset}"
            )
        end = first_position + count + sum(skipped for _, skipped in jumps[row])
        if rules.max_positions is not None and end > rules.max_positions:
            raise ContextTooLong(f"the sequence reaches {end} positions; the model's context has {rules.max_positions}")
        first_positions.append(first_position)
    highest = past + width - 1
    if ids_BT is not None:
        highest = max(first_ids_B) if width == 1 else int(ids_BT.max())
    return Layout(
        past=past,
        width=width,
        kept_BC=kept_BC,
        columns=tuple(columns),
        first_positions=tuple(first_positions),
        regime_length=highest + 1,
        jumps=tuple(jumps),
    )


def _kept_columns(mask: object, *, batch: int, past: int, width: int, cached_BC: Tensor | None) -> Tensor | None:
    if mask is None:
        if cached_BC is not None:
            raise UnsupportedMask("the cached columns hold padding, so the mask of the whole sequence is needed")
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise UnsupportedMask("only 2-D attention masks, one number per token, can travel")
    if mask.shape not in ((batch, past + width), (1, past + width)):
        raise UnsupportedMask(
            f"the attention mask is {tuple(mask.shape)}; {batch} rows of {past} cached and {width} new columns need "
            f"{(batch, past + width)}"
        )
    kept_BC = mask.to(device="cpu", dtype=torch.bool).expand(batch, -1)
    before_BC = kept_BC[:, :past]
    if not (before_BC.all() if cached_BC is None else torch.equal(before_BC, cached_BC)):
        raise UnsupportedMask("the mask changes columns that are already cached")
    return None if kept_BC.all() else kept_BC


def _position_ids(
    rules: PositionRules,
    position_ids: Tensor | None,
    kept_BC: Tensor | None,
    *,
    batch: int,
    past: int,
    width: int,
    counts_kept: bool,
) -> Tensor | None:
    if position_ids is not None:
        if position_ids.shape not in ((batch, width), (1, width)):
            raise UnsupportedMask(f"position ids of shape {tuple(position_ids.shape)} do not fit {(batch, width)}")
        return position_ids.cpu().expand(batch, -1)
    if kept_BC is not None and rules.takes_position_ids and counts_kept:
        return (kept_BC.long().cumsum(1) - 1).clamp(min=0)[:, past:]
    return None


def _refuse_gaps(rules: PositionRules, kept_BC: Tensor, *, has_position_ids: bool) -> None:
    """Masked columns between kept ones vanish from a sequence; refuse them where a local model would notice."""
    total = kept_BC.shape[1]
    if has_position_ids and (rules.window is None or total <= rules.window):
        return
    if rules.takes_position_ids and not has_position_ids:
        return  # the rows' own positions show them
    kept = kept_BC.int()
    first_B, last_B = kept.argmax(1), total - 1 - kept.flip(1).argmax(1)
    if ((last_B - first_B + 1 != kept.sum(1)) & kept_BC.any(1)).any():
        reason = "slide its attention window past them" if has_position_ids else "count them as positions"
        raise UnsupportedMask(f"the mask has holes between tokens, and a local model would {reason}")
