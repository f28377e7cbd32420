"""A swarm on a virtual clock: thousands of peers and users, the router and the placement that real nodes run.

    world ──▶ sharing ──▶ users ──▶ run ──▶ report

What is not here: frames, journals and kernels. Steps are not simulated one by one: within a second every user advances
at the rate that trips, compute and queues allow.
"""
