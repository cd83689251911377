"""The reference libraries read local files only; ours are programs as users get them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
# Instead of what tests/conftest.py has set: compiled quickly, sums have other rounding errors.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
