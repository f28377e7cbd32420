"""The most that the users of a simulated swarm can have together, whoever deals: a linear program over all routes.

A route that carries f tokens per second takes f · blocks · seconds of each of its peers, which have one per second, and
keeps f · t of its client's users busy, where a token takes t without any wait (Little's law). Whatever routers do, and
however they come to know what they know, they stay within these limits. What is left out only makes it worse: prompts
of less than a chunk, openings, replays, what links carry, and that sessions are whole.

Columns are made as they are needed (Gilmore, Gomory 1961): under the prices of peers and users the cheapest route of
each client, a shortest path over blocks where every trip between two peers has its own price. That also bounds it.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import linprog

from routing.flow import BATCH
from routing.records import PeerState
from swarm.simulation.run import Simulation
from swarm.simulation.sharing import TOKEN
from swarm.simulation.users import CHUNK
from swarm.simulation.world import round_trip_s

CLOSE = 0.001


def most_tokens_per_s(simulation: Simulation, users: int, *, rounds: int = 1000) -> float:
    """With so many users, as many at each client, at the peers as they are now; at most CLOSE less than the optimum."""
    peers = [peer for peer in simulation.peers.values() if peer.state is PeerState.ONLINE]
    places = [peer.where for peer in peers]
    half_s_PP = np.array([[round_trip_s(a, b) / 2 for b in places] for a in places])
    half_s_CP = np.array([[round_trip_s(client.where, b) / 2 for b in places] for client in simulation._clients])
    decode_s_P = np.array([peer.decode_s for peer in peers])
    holds_BP = np.array([[any(b in s for s in p.spans) for p in peers] for b in range(simulation.config.blocks)])
    prompt, new = simulation.config.prompt_tokens, simulation.config.new_tokens
    trip_part = (prompt / CHUNK + new) / (prompt + new)
    decode_part = (prompt * (1 + (CHUNK - 1) / BATCH) / CHUNK + new) / (prompt + new)
    clients, count = len(half_s_CP), len(peers)
    has = np.concatenate((np.ones(count), np.full(clients, users / clients)))

    def cheapest(client: int, price: np.ndarray) -> tuple[float, list[int]]:
        """What its cheapest route costs for a token per second, and the peer of each block."""
        trip = price[count + client] * trip_part
        block_P = decode_s_P * (TOKEN * price[:count] + price[count + client] * decode_part)
        cost_P, before = np.where(holds_BP[0], trip * half_s_CP[client] + block_P, np.inf), []
        for holds_P in holds_BP[1:]:
            (able,) = np.nonzero(np.isfinite(cost_P))
            entered_PP = cost_P[able, None] + trip * half_s_PP[able]
            entered_PP[np.arange(len(able)), able] = cost_P[able]  # it stays
            best_P = entered_PP.argmin(0)
            before.append(able[best_P])
            cost_P = np.where(holds_P, entered_PP[best_P, np.arange(count)] + block_P, np.inf)
        cost_P = cost_P + trip * half_s_CP[client]
        route = [int(cost_P.argmin())]
        for back_P in reversed(before):
            route.append(int(back_P[route[-1]]))
        return float(cost_P.min()), route[::-1]

    def takes(client: int, route: list[int]) -> np.ndarray:
        busy_P = np.bincount(route, minlength=count) * decode_s_P
        trips_s = half_s_CP[client, route[0]] + half_s_CP[client, route[-1]]
        trips_s += sum(half_s_PP[a, b] for a, b in itertools.pairwise(route) if a != b)
        column = np.concatenate((busy_P * TOKEN, np.zeros(clients)))
        column[count + client] = trip_part * trips_s + decode_part * busy_P.sum()
        return column

    price, bound, columns = np.ones(len(has)), np.inf, list[np.ndarray]()
    best = price
    for _ in range(rounds):
        costs = []
        for at in (price, (price + best) / 2):  # between the prices of now and of the bound: steadier
            found = [cheapest(client, at) for client in range(clients)]
            columns += [takes(client, route) for client, (_, route) in enumerate(found)]
            costs.append((at @ has / max(1e-12, min(cost for cost, _ in found)), at))
        bound, best = min([(bound, best), *costs], key=lambda pair: pair[0])
        solved = linprog(-np.ones(len(columns)), A_ub=np.array(columns).T, b_ub=has, method="highs")
        if -solved.fun >= (1 - CLOSE) * bound:
            return float(-solved.fun)
        price = -solved.ineqlin.marginals
    raise AssertionError(f"no optimum after {rounds} rounds: between {-solved.fun:.1f} and {bound:.1f}")
