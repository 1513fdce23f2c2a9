"""What pyproject.toml has no words for: a wheel carries configs/ and scripts/ inside the package (dalle/paths.py)."""

from setuptools import find_packages, setup

BESIDE = {"dalle.configs": "configs", "dalle.scripts": "scripts"}

setup(packages=[*find_packages(include=["dalle", "dalle.*"]), *BESIDE], package_dir=BESIDE)
