"""Configurations: every file has get_config(arg)."""
