"""The stages, each a run's configuration and the function that does it; scripts/ are their command lines."""
