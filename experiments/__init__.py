"""Commands: train, predict, quickstart, benchmarks."""
