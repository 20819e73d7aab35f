"""Kernels over plain tensors: torch and triton only; nothing here knows of models, sessions or swarms."""
