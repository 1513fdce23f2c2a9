"""DALLE-pytorch (lucidrains)."""
