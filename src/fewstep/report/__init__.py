"""Pictures of data and of runs."""
