"""Adapters in the files of the Hugging Face PEFT library."""

from peftjax.hf_peft.loader import load
from peftjax.hf_peft.writer import has_adapter, save

__all__ = ["has_adapter", "load", "save"]
