"""The built-in demo: synthetic scored scenes, and a tiny FLUX-Fill trained on them from scratch."""
