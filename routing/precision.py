"""How precisely peers compute: one order over what their announcements say of dtype and quantization.

Quantized weights are what limits a peer that has them, else its dtype does. The order is that of the error which each
adds to the weights: 9, 7 and 0.9 % of normally distributed ones for `nf4`, `int4` and `int8`, half a unit in the last
place for the dtypes.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

from routing.errors import CallerError

Precision = Literal["nf4", "int4", "int8", "bfloat16", "float16", "float32"]
PRECISIONS: Final[tuple[str, ...]] = get_args(Precision)
"""From the least precise on."""
_UNQUANTIZED: Final = "none"


def check_precision(name: str) -> None:
    """Raises CallerError for a name that is not among PRECISIONS."""
    if name not in PRECISIONS:
        raise CallerError(f"unknown precision {name!r}", hint=f"from the least on: {', '.join(PRECISIONS)}")


def precision(dtype: str, quantization: str) -> str:
    """The name of what limits a peer that announces these; strangers may announce names that nobody here knows."""
    return dtype if quantization == _UNQUANTIZED else quantization


def is_at_least(dtype: str, quantization: str, least: str | None) -> bool:
    """Whether such a peer is as precise as `least`, one of PRECISIONS, or None for any; the unknown is not."""
    own = precision(dtype, quantization)
    return least is None or (own in PRECISIONS and PRECISIONS.index(own) >= PRECISIONS.index(least))
