"""Commands: train, predict, quickstart, benchmarks."""

from experiments import runtime  # first of all: from here on Ctrl-C shows no traceback

__all__ = ["runtime"]
