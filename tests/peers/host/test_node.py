from __future__ import annotations

from pathlib import Path

import pytest

from peers.host import node


@pytest.mark.parametrize(
    ("content", "port"), [(b"4001\n", "4001"), (b"99999", ""), (b"0", ""), (b"\xff\xfe", ""), (b"", "")]
)
def test_only_a_port_is_remembered_as_one(tmp_path: Path, content: bytes, port: str) -> None:
    (tmp_path / "peer.port").write_bytes(content)
    assert node._remembered(tmp_path / "peer.port") == port


def test_nothing_is_remembered_where_there_is_no_file(tmp_path: Path) -> None:
    assert node._remembered(tmp_path) == node._remembered(tmp_path / "none") == ""
