"""A tiny T5 that can tokenise, a corpus of sources and targets, and a config of both.

A source is four digits, its target the one after the last, twice.
"""

import json
import pathlib
import shutil

import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from configs.seq2seq import get_config

GOLDEN = pathlib.Path(__file__).parent / "golden"
WORDS = ["<pad>", "</s>", "<unk>", *map(str, range(10)), "after"]


def model_dir(folder: pathlib.Path, *, ends: bool = True) -> pathlib.Path:
  """Makes `folder` a model directory whose tokenizer puts, if it `ends` texts, </s> behind them."""
  shutil.copytree(GOLDEN / "t5_gated_tiny", folder)
  tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
  tokenizer.add_special_tokens(["<pad>", "</s>"])
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  if ends:
    tokenizer.post_processor = processors.TemplateProcessing(
      single="$A </s>", special_tokens=[("</s>", 1)]
    )
  tokenizer.save(str(folder / "tokenizer.json"))
  return folder


def corpus(path: pathlib.Path, count: int = 160) -> pathlib.Path:
  """A JSONL file with the columns source, of 5 or 20 tokens with their end, and target, of 3."""
  rows = []
  for i, digits in enumerate(np.random.default_rng(0).choice(10, (count, 4))):
    words = " after" * (15 if i % 4 == 0 else 0)
    target = (digits[-1] + 1) % 10
    row = {"source": " ".join(map(str, digits)) + words, "target": f"{target} {target}"}
    rows.append(json.dumps(row) + "\n")
  path.write_text("".join(dict.fromkeys(rows)))
  return path


def config(
  model: pathlib.Path, train_file: pathlib.Path, argument: str = "method=lora", **changes
) -> ConfigDict:
  """configs/seq2seq.py on model and file; `changes` by dotted key, dots written `__`."""
  made = get_config(argument)
  base = dict(
    model__directory=str(model),
    quant__block_size=16,
    data__train_file=str(train_file),
    data__max_length=32,
    data__target_length=8,
    method__rank=4,
    optimizer__learning_rate=1e-2,
    train__steps=24,
    train__batch_size=8,
    train__log_every=4,
    train__save_every=10,
    compilation_cache="",
  )
  for key, value in {**base, **changes}.items():
    if key == "method__rank" and "rank" not in made.method:
      continue
    made.update_from_flattened_dict({key.replace("__", "."): value})
  return made
