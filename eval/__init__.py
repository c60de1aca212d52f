"""Scores of models on long-context benchmarks."""
