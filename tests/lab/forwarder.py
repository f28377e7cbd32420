"""The process that is the network: a TUN device in every namespace, and packets held back until they are due.

Owns the devices, the packets under way and the clock. What becomes of a packet `fabric` decides. Started by `network`,
which tells it what to do in JSON lines on standard input, one answer line each; ends with its standard input.

    python -m tests.lab.forwarder '{"hosts": {NAME: [NAMESPACE, ADDRESS]}, "seed": 1, "profile": {…}}'
"""

from __future__ import annotations

import fcntl
import heapq
import ipaddress
import json
import os
import select
import struct
import sys
import time
from contextlib import suppress
from typing import Any, Final

from tests.lab.fabric import Fabric
from tests.lab.links import LinkProfile
from tests.lab.namespaces import entered

DEVICE: Final = "lab0"
MTU: Final = 1500
BATCH: Final = 64
"""Packets read from one host before the others, and the packets that are due, have their turn."""
MAX_UNDER_WAY: Final = 100_000
"""Packets held back at once, of at most MTU bytes each; more are dropped and counted."""
LATE_S: Final = 0.005
AHEAD_S: Final = 0.0005
"""With a packet that is due go those that will be so soon, as network cards do: waking for each packet of 100 Mbit/s
costs a quarter of a core, which those who compute here then lack."""

_TUNSETIFF: Final = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


class Forwarder:
    """Runs until standard input ends."""

    def __init__(self, hosts: dict[str, tuple[str, str]], *, profile: LinkProfile, seed: int) -> None:
        self._devices = {name: open_device(namespace) for name, (namespace, _) in hosts.items()}
        addresses = {name: ipaddress.IPv4Address(address).packed for name, (_, address) in hosts.items()}
        self._fabric = Fabric(addresses, profile=profile, seed=seed)
        self._under_way: list[tuple[float, int, int, bytes]] = []
        """A heap of (due, serial, device, packet)."""
        self._serial = 0
        self._dropped = 0
        """For want of room here or in the kernel."""
        self._late = 0
        self._late_s_max = 0.0

    def run(self) -> None:
        watched, under_way = [0, *self._devices.values()], self._under_way
        lines = b""
        while True:
            self._deliver()
            # select counts in microseconds, where poll and epoll do in milliseconds
            timeout_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            for ready in select.select(watched, (), (), timeout_s)[0]:
                if ready:
                    self._collect(ready)
                    continue
                read = os.read(0, 1 << 16)
                if not read:
                    return
                *whole, lines = (lines + read).split(b"\n")
                for line in whole:
                    os.write(1, json.dumps(self._obey(json.loads(line))).encode() + b"\n")

    def _collect(self, device: int) -> None:
        accept, under_way, now_s = self._fabric.accept, self._under_way, time.monotonic()
        for _ in range(BATCH):
            try:
                packet = os.read(device, MTU)
            except BlockingIOError:
                return
            delivery = accept(now_s, packet)
            if delivery is None:
                continue
            if len(under_way) >= MAX_UNDER_WAY:
                self._dropped += 1
                continue
            self._serial += 1
            heapq.heappush(under_way, (delivery.due_s, self._serial, self._devices[delivery.host], delivery.packet))

    def _deliver(self) -> None:
        under_way, now_s = self._under_way, time.monotonic()
        if not under_way or under_way[0][0] > now_s:
            return
        until_s = now_s + AHEAD_S
        while under_way and under_way[0][0] <= until_s:
            due_s, _, device, packet = heapq.heappop(under_way)
            if now_s - due_s > LATE_S:
                self._late += 1
                self._late_s_max = max(self._late_s_max, now_s - due_s)
            try:
                os.write(device, packet)
            except BlockingIOError:
                self._dropped += 1

    def _obey(self, order: dict[str, Any]) -> dict[str, Any]:
        fabric = self._fabric
        match order.pop("do"):
            case "shape":
                fabric.shape(LinkProfile(**order["profile"]), source=order["source"], target=order["target"])
            case "cut":
                fabric.cut([(source, target) for source, target in order["pairs"]])
            case "heal":
                pairs = order["pairs"]
                fabric.heal(None if pairs is None else [(source, target) for source, target in pairs])
            case "nat":
                fabric.put_behind_nat(order["host"], ipaddress.IPv4Address(order["outside"]).packed)
            case "refuse":
                fabric.refuse(order["host"], on=order["on"])
            case "counts":
                own = {"dropped": self._dropped, "late": self._late, "late_s_max": self._late_s_max}
                return fabric.counts() | {"forwarder": own}
            case unknown:
                raise ValueError(f"no such order: {unknown}")
        return {}


def open_device(namespace: str) -> int:
    """A new TUN device in a namespace, which lives until the descriptor is closed."""
    with entered(namespace):
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


def main() -> None:
    settings = json.loads(sys.argv[1])
    forwarder = Forwarder(settings["hosts"], profile=LinkProfile(**settings["profile"]), seed=settings["seed"])
    with suppress(PermissionError):  # packets should be late for nobody else's computing
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    os.write(1, b"{}\n")
    forwarder.run()


if __name__ == "__main__":
    main()
