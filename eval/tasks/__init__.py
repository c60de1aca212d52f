"""The tasks lm-eval is given."""
