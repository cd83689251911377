"""Frozen weights in four and eight bits."""
