from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from peers.transport.hivemind_p2p import folder
from peers.transport.hivemind_p2p.folder import SocketFolder, remove_abandoned

PROGRAM = """
import pathlib, runpy, sys
made = runpy.run_path(sys.argv[1])["SocketFolder"](pathlib.Path(sys.argv[2]))
(made.path / "control").touch()
print(made.path, flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    line = [sys.executable, "-c", PROGRAM, folder.__file__, str(tmp_path)]
    mine, others = SocketFolder(tmp_path), [tmp_path / "hiveswarm-of-somebody-else", tmp_path / "hiveswarm-node-file"]
    others[0].mkdir()
    others[1].touch()
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        remove_abandoned(tmp_path)
        assert set(tmp_path.iterdir()) == {mine.path, theirs, *others}
        process.kill()
    remove_abandoned(tmp_path)
    assert set(tmp_path.iterdir()) == {mine.path, *others}
    mine.remove()
    mine.remove()
    assert set(tmp_path.iterdir()) == set(others)


def test_a_link_that_looks_like_a_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "hiveswarm-node-link").symlink_to(tmp_path / "real")
    remove_abandoned(tmp_path)
    assert (tmp_path / "real").is_dir()
