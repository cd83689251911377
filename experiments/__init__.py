"""Commands: train, predict, quickstart, benchmarks."""

from experiments import runtime  # first of all: from here on Ctrl-C leaves no trace

__all__ = ["runtime"]
