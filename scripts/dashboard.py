#!/usr/bin/env python3
"""Watch a swarm's health with the Python API.

    python scripts/dashboard.py swarm://… [--every 5]

Needs no model files. `swarm dashboard` shows the same, and much more, in a browser.
"""

import argparse
import time

from swarm import SwarmHealth

arguments = argparse.ArgumentParser(description="Watch a swarm's health.")
arguments.add_argument("invite", help="a swarm://… link, as `swarm bootstrap` prints it")
arguments.add_argument("--every", type=float, default=0.0, metavar="SECONDS", help="look again; default: once")
options = arguments.parse_args()

with SwarmHealth(invite=options.invite) as health:
    while True:
        view = health.look()
        for model in view.models:
            missing = ", ".join(map(str, model.gaps)) or "none"
            print(
                f"{model.model_name}: {len(model.peers)} peers, rarest block ×{model.replication}, missing: {missing}"
            )
            for peer in model.peers:
                rtt_s = view.rtt_s.get(peer.peer_id)
                latency = "no answer" if rtt_s is None else f"{rtt_s * 1000:.1f} ms"
                print(f"  {peer.peer_id[-6:]} {peer.state} blocks {peer.spans} free {peer.free_tokens} {latency}")
        if not options.every:
            break
        time.sleep(options.every)
