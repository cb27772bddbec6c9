"""Compiles the train step for TPUs that are not present, and computes its memory, communication and roofline."""
