"""Pipelines: from a prompt to images on disk."""
