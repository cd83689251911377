"""Claims of the text this project started from, measured: `python -m experiments.claims`."""
