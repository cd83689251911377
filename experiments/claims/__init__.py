"""What the text this project started from says, measured: `python -m experiments.claims`."""
