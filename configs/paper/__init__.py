"""Settings of the papers at full size: every file has get_config(arg), as the files above it.

Each starts from a config of `configs` and sets what its paper (or, named so, its release) gives;
what neither gives stays as it is there. Files of data and models are given by flags.
"""
