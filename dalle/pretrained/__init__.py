"""Readers of public checkpoints, one file per format. Nothing is downloaded, and no file runs code."""
