"""Finds checkpoints (`source`) and loads parts of them (`partial`). The only package of swarm that knows transformers."""
