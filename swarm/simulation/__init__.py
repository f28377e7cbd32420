"""A swarm on a virtual clock: thousands of peers and users, the router and the placement that real nodes run.

    world ──▶ run ──▶ report

What is not here: sessions' own failover (a user whose route broke is charged REPAIR_S and goes on) and frames. Steps
are not simulated one by one: within a second every user advances at the rate that trips, compute and queues allow.
"""
