"""The swarm's health for people and programs: a view that is kept fresh, its history, and pages that show it."""
