"""Real engines on a real GPU, against Transformers on the same weights."""
