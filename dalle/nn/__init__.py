"""Layers that know no family: attention, its cache, transformer blocks."""
