"""Metrics of removals, with or without ground truth."""
