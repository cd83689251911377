"""Sweeps: from a grid to trials, their claims, what runs them and what is shown of them."""
