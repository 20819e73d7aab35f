"""Adapters as the swarm knows them: one representation for every method, named by content, and how they are read."""
