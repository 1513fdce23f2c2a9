"""Metrics of images and models."""
