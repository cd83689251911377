"""Training: `step` is pure, `loop` is the only place with side effects."""
