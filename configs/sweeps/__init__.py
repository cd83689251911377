"""Sweeps: every file has get_config(arg) with base, grid and trials; see experiments/sweep.py."""
