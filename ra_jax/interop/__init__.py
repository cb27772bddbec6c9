"""Weights in and out of the files of other systems."""
