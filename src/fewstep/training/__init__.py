"""Runs: settings, training, checkpoints, evaluation."""
