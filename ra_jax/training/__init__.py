"""Training runs: set-up, train state, compiled step, training loop, checkpoints, metrics and previews."""
