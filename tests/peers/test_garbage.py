"""What stays in a process is not looked through again and again, and can still be let go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from peers.garbage import spare, spare_nothing


class Ring:
    """Holds itself, as models do."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    spare_nothing()


def test_what_is_garbage_goes_and_what_stays_is_looked_through_no_more() -> None:
    gone, kept = Ring(), Ring()
    watched = weakref.ref(gone)
    del gone
    before = len(gc.get_objects())
    spare()
    assert watched() is None
    assert len(gc.get_objects()) < before / 10
    assert kept.itself is kept


def test_what_became_garbage_while_it_was_spared_goes_once_it_is_no_more() -> None:
    ring = Ring()
    watched = weakref.ref(ring)
    spare()
    del ring
    gc.collect()
    assert watched() is not None
    assert spare_nothing()
    gc.collect()
    assert watched() is None
    assert not spare_nothing()
