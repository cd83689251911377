"""Sweeps: from a grid to trials, their claims, how they run and how they are shown."""
