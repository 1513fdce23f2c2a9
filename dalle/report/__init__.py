"""HTML report of a run folder."""
