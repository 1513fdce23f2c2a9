"""Layers shared by the models: attention with its masks and KV cache, transformer blocks, int8 matrices."""

ATTENTION_BACKENDS = ("auto", "dense", "sdpa", "window", "flex")
"""Ways to compute attention, see dalle/nn/attention.py."""
