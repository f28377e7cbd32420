from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from swarm.gateway.text import MAX_UNFINISHED, TextStream


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def stream(data: bytes, stops: Sequence[str] = ()) -> tuple[list[str], bool]:
    text, pieces = TextStream(decode, stops), []
    for byte in data:
        pieces.append(text.push(byte))
        if text.stopped:
            return pieces, True
    pieces.append(text.end())
    return pieces, text.stopped


@given(st.text())
def test_the_pieces_together_are_the_text(text: str) -> None:
    pieces, stopped = stream(text.encode())
    assert "".join(pieces) == text
    assert not stopped


@given(st.text(alphabet="ab é", max_size=40), st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_sequence_however_it_is_cut_into_tokens(text: str, stops: list[str]) -> None:
    pieces, stopped = stream(text.encode(), stops)
    # the stop that is complete first wins, as nothing behind it has been generated yet
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first_end = min(ends)[0] if ends else None
    expected = text if first_end is None else text[: min(at for end, at in ends if end == first_end)]
    assert "".join(pieces) == expected
    assert stopped == bool(ends)


def test_a_character_is_shown_when_it_is_whole() -> None:
    pieces, _ = stream("aé€".encode())
    assert pieces == ["a", "", "é", "", "", "€", ""]


def test_bytes_that_are_no_character_are_shown_in_the_end() -> None:
    pieces, _ = stream(b"\xff" * (MAX_UNFINISHED + 1))
    assert "".join(pieces) == "�" * (MAX_UNFINISHED + 1)
    assert pieces[MAX_UNFINISHED - 1]


def test_what_begins_like_a_stop_sequence_is_held_back_until_it_differs() -> None:
    pieces, stopped = stream(b"a<en<end>b", ["<end>"])
    assert (pieces, stopped) == (["a", "", "", "", "<en", "", "", "", ""], True)
    assert stream(b"a<en", ["<end>"])[0] == ["a", "", "", "", "<en"]
