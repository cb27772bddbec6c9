"""The compiled train step: pure functions of state, frozen weights and batch."""
