"""Training and test data in the format of long-context benchmarks."""
