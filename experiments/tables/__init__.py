"""Tables of papers, made again: `python -m experiments.tables NAME`."""
