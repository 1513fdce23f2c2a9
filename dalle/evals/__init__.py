"""Measurements of images and models: each file answers one question."""
