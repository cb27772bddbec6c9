"""The embedded default: synthetic scored scenes and a tiny FLUX-Fill trained on them from scratch."""
