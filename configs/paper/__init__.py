"""Settings of the papers at full size: every file has get_config(arg), as the files above it.

Each starts from a config of `configs` and sets the values that its paper (or, where named, its
release) gives; all others stay as they are there. Files of data and models are given by flags.
"""
