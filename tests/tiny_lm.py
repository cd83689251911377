"""A tiny Llama that can tokenise, a corpus of prompts and completions, and a config of both.

A text is five digits, the last of them twice, and then the five that follow it.
"""

import json
import pathlib
import shutil

import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer, models, pre_tokenizers

from configs.causal_lm import get_config

GOLDEN = pathlib.Path(__file__).parent / "golden"
WORDS = ["<unk>", "<s>", "</s>", *map(str, range(10)), "then", "comes", "row", "of"]


def model_dir(folder: pathlib.Path, golden: str = "llama3_tiny") -> pathlib.Path:
  """Makes `folder` a model directory whose tokenizer knows digits and a few words."""
  shutil.copytree(GOLDEN / golden, folder)
  tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / "tokenizer.json"))
  return folder


def corpus(path: pathlib.Path) -> pathlib.Path:
  """A JSONL file with the columns prompt and answer."""
  draws = np.random.default_rng(0).choice(10, (120, 4))
  rows = [
    {
      "prompt": " ".join(map(str, [*d, d[-1]])),
      "answer": "".join(f" {(d[-1] + k) % 10}" for k in range(1, 6)),
    }
    for d in draws
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def config(
  model: pathlib.Path, train_file: pathlib.Path, argument: str = "", **changes
) -> ConfigDict:
  """configs/causal_lm.py on model and file; `changes` by dotted key, dots written `__`."""
  made = get_config(f"data=files,{argument}" if argument else "data=files")
  base = dict(
    model__directory=str(model),
    quant__block_size=32,
    data__train_file=str(train_file),
    data__text_column="prompt",
    data__pair_column="answer",
    data__loss="completions",
    data__other="",
    data__max_length=24,
    method__rank=4,
    optimizer__learning_rate=2e-2,
    train__steps=16,
    train__batch_size=8,
    train__log_every=4,
    train__save_every=6,
    compilation_cache="",
  )
  for key, value in {**base, **changes}.items():
    if key == "method__rank" and "rank" not in made.method:
      continue
    made.update_from_flattened_dict({key.replace("__", "."): value})
  return made
