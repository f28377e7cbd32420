"""Memory that answers needed for a moment goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

GROWTH = """
import re, torch
from concurrent.futures import ThreadPoolExecutor
from swarm.gateway.allocation import return_large_buffers

def resident():
    "Of its own: pages of libraries come and go."
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def work():
    "Logits of batches of any size, and among them what lives as long as an answer."
    lasting = []
    for rows in range(1, 65):
        logits = torch.zeros(rows * 49_152), torch.zeros((65 - rows) * 49_152)
        lasting.append([torch.tensor([1]) for _ in range(64)])
        del logits
        lasting.append([torch.tensor([1]) for _ in range(64)])
    return lasting

{before}
torch.zeros(8_000_000)  # as in loading a model: by itself, malloc takes the next ones from heaps
with ThreadPoolExecutor(1) as pool:
    at_first = resident()
    lasting = pool.submit(work).result()
    print(resident() - at_first)
"""


def grown_bytes(before: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", GROWTH.format(before=before)], capture_output=True, text=True, timeout=120, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have bounds of their own")
def test_large_buffers_leave_nothing_behind_among_small_ones() -> None:
    assert grown_bytes("return_large_buffers()") < 12_000_000
    assert grown_bytes("") > 24_000_000, "else glibc does it by itself by now"
