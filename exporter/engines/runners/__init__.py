"""What runs a model: a backend builds or loads it, a runner runs it."""
