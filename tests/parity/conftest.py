"""The reference libraries read local files only."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
