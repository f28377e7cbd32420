from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import CallerError
from swarm.gateway.keys import ANYBODY, Account, Keys, accounts_of, hash_key, read_keys

KEY = "a-key-of-at-least-16-characters"


def test_only_a_known_key_finds_its_account() -> None:
    keys = Keys([Account(name="a", digest=hash_key(KEY)), Account(name="b", digest=hash_key(KEY[::-1]))])
    found = keys.find(f"Bearer {KEY[::-1]}")
    assert found is not None
    assert found.name == "b"
    for header in (
        None,
        "",
        KEY,
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        "Bearer ",
        f"Bearer {KEY} {KEY}",
        "Bearer " + "x" * 9999,
    ):
        assert keys.find(header) is None


def test_without_keys_everybody_is_one_account() -> None:
    account = Keys([]).find(None)
    assert account is not None
    assert account.name == ANYBODY


@given(st.lists(st.floats(0, 30), max_size=60), st.integers(1, 10))
def test_no_minute_sees_more_than_twice_its_requests(gaps_s: list[float], per_minute: int) -> None:
    account, now_s, taken = Account(name="a", digest=b"", requests_per_minute=per_minute), 1000.0, list[float]()
    for gap_s in gaps_s:
        now_s += gap_s
        wait_s = account.wait_s(now_s)
        if not wait_s:
            taken.append(now_s)
        else:
            assert 0 < wait_s <= 60 / per_minute
    for end_s in taken:
        assert sum(end_s - 60 < at <= end_s for at in taken) <= 2 * per_minute


def test_a_refused_request_is_let_in_after_the_wait_that_it_was_told() -> None:
    account = Account(name="a", digest=b"", requests_per_minute=2)
    assert [account.wait_s(5.0), account.wait_s(5.0)] == [0, 0]
    assert account.wait_s(5.0 + account.wait_s(5.0) + 1e-6) == 0


def test_a_file_holds_names_hashes_and_limits(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nalice {hash_key(KEY).hex()} 30\n\nbob {hash_key('b' * 16).hex()}  # no limit\n")
    alice, bob = read_keys(file)
    assert (alice.name, alice.digest, alice.requests_per_minute) == ("alice", hash_key(KEY), 30)
    assert (bob.name, bob.requests_per_minute) == ("bob", None)
    assert KEY not in repr(alice)


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        "alice 12",
        "a/b " + "0" * 64,
        "a " + "0" * 64 + " many",
        "a " + "0" * 64 + " 0",
        "a " + "0" * 64 + " 1 2",
        "",
    ],
)
def test_a_line_that_is_no_key_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(line)
    with pytest.raises(CallerError, match="keys"):
        read_keys(file)


def test_short_keys_and_equal_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="16"):
        accounts_of(["short"], None)
    with pytest.raises(CallerError, match="cannot be read"):
        accounts_of([], tmp_path / "none")
    twice = Account(name="a", digest=b"")
    with pytest.raises(CallerError, match="same name"):
        Keys([twice, twice])
