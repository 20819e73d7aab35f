"""Finds checkpoints (`source`) and loads parts of them (`partial`). All that `swarm` knows of transformers is here."""
