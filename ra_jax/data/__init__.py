"""Data sets of scored removals: formats and their checks, masks, panels, the loader. Knows of no device."""
