"""The composition root of a node: what it is told, the order in which its parts start and stop, what people hear of it.

Two kinds: a bootstrap (DHT and dial-back only, no model) and a server peer. Every decision is made elsewhere.
"""

from peers.platform import let_threads_sleep

THREADS_SLEEP = let_threads_sleep()
"""Programs that embed a peer come in here; false where they had loaded torch before."""
