"""Layers of our own models; their weights may be any `Weight`."""
