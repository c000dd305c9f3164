"""Tasks with right answers: local files, and lm-eval's by name, on every backend."""
