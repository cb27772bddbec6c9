"""Data sets of scored removals: formats, checks, masks, panels and the loader. No module here uses a JAX device."""
