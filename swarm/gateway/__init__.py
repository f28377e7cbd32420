"""An HTTP server that speaks OpenAI's API and answers through a swarm. Needs the extra `gateway`.

Owns requests, keys, limits and the driving of many answers at once; the sequences themselves are `swarm.session`'s.
"""
