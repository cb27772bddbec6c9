"""The training run: state, one compiled step, the loop around it, checkpoints, metrics and previews."""
