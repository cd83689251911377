"""Tokenizer files, against the tokenizers library on the same file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from peftjax import data
from tests.fuzz import damage
from tests.fuzz.tensors import unique

PROBES = ("", "a text of words", "two\nlines\n\n", "  spaces", "<s>special</s>", "é🙂 0123")


class TokenizerFiles:
  name, share = "tokenizer", 10

  def prepare(self, folder: Path) -> None:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
      vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([*PROBES, "a text of words and more words"] * 3, trainer)
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 64}))

  def damage(self, rng: random.Random, folder: Path) -> None:
    name = rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    path = folder / name
    if rng.random() < 0.7:
      value = damage.of_json(rng, json.loads(path.read_text()))
      path.write_bytes(damage.dumps(rng, value))
    else:
      path.write_bytes(damage.of_bytes(rng, path.read_bytes()))

  def read(self, folder: Path) -> Any:
    tokenizer = data.load_tokenizer(str(folder))
    return [_ids(tokenizer, text) for text in PROBES]

  def check(self, folder: Path, got: Any) -> str:
    try:
      text = (folder / "tokenizer.json").read_bytes().decode("utf-8-sig")
      json.loads(text, object_pairs_hook=unique)
      config = (folder / "tokenizer_config.json").read_bytes().decode("utf-8-sig")
      config = json.loads(config, object_pairs_hook=unique)
      for field in ("bos_token", "eos_token"):
        if not isinstance(config.get(field, ""), str | dict | None):
          return f"{field}={config[field]!r} was accepted"
      reference = Tokenizer.from_str(text)
      named = [config.get(field) for field in ("bos_token", "eos_token")]
      named = [token["content"] if isinstance(token, dict) else token for token in named]
      reference.add_special_tokens([token for token in named if token])  # as transformers does
      reference.no_truncation()
      reference.no_padding()
      want = [reference.encode(probe).ids for probe in PROBES]
    except BaseException as error:  # the library's panics are no Exception
      return f"accepted, but {error!r}"
    return "" if got == want or config.get("added_tokens_decoder") else f"{got} instead of {want}"


def _ids(tokenizer: Any, text: str) -> list[int]:
  return tokenizer.encode(text).ids
