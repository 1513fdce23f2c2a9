"""Measurements of pictures and models: each file answers one question."""
