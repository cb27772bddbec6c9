"""The compiled train step: pure functions of train state, frozen weights and batch."""
