"""Synthetic shapes: dataset and judge."""
