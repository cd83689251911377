"""Writes what transformers' configurations hold where a file says nothing: `hf_defaults.json`.

Run:   python -m tests.golden.make_hf_defaults
With:  transformers 5.23.0

By model type, the fields of `peftjax.models.hf_config` that transformers' class has.
"""

import json
from pathlib import Path

from transformers import AutoConfig

from peftjax.models import hf_config

PATH = Path(__file__).with_name("hf_defaults.json")


def defaults(kind: str) -> dict:
  """The fields that both have, as a JSON file would hold them."""
  theirs = AutoConfig.for_model(kind)
  fields = [f for f in hf_config.SCHEMAS[kind].__dataclass_fields__ if hasattr(theirs, f)]
  return {field: getattr(theirs, field) for field in fields if field != "id2label"}


def main() -> None:
  found = {kind: defaults(kind) for kind in hf_config.SCHEMAS}
  PATH.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  main()
