"""Model directories: `config.json` and tensors, against a table of what a field may hold."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax.core import paths
from tests.fuzz import damage
from tests.fuzz.tensors import rewrite_header, unique

GOLDEN = Path(__file__).parents[1] / "golden"

_whole = lambda least, most=2**31: lambda x: type(x) is int and least <= x <= most
_real = lambda least, most: lambda x: type(x) in (int, float) and least <= x <= most
_flag = lambda x: type(x) is bool
_text = lambda x: type(x) is str
_or_null = lambda test: lambda x: x is None or test(x)
_ids = lambda x: _whole(0)(x) or (type(x) is list and all(map(_whole(0), x)))
# What the fields that change a model may hold, of whichever family has them.
FIELDS: dict[str, Callable[[Any], bool]] = {
  **dict.fromkeys(("hidden_size", "n_embd", "num_hidden_layers", "n_layer"), _whole(1)),
  **dict.fromkeys(("num_attention_heads", "n_head", "vocab_size", "intermediate_size"), _whole(1)),
  **dict.fromkeys(("max_position_embeddings", "n_positions", "type_vocab_size"), _whole(1)),
  **dict.fromkeys(("num_key_value_heads", "head_dim", "n_inner"), _or_null(_whole(1))),
  "sliding_window": _or_null(_whole(1)),
  **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), _real(0, 1e30)),
  **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), _real(0, 1)),
  **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), _real(0, 1)),
  **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), _or_null(_flag)),
  **dict.fromkeys(("hidden_act", "activation_function", "model_type"), _text),
  "hidden_activation": _text,
  "query_pre_attn_scalar": _whole(1),
  "final_logit_softcapping": _or_null(_real(0, 1e31)),
  "attn_logit_softcapping": lambda x: x is None,
  "layer_types": _or_null(lambda x: type(x) is list and all(map(_text, x))),
  "eos_token_id": _or_null(_ids),
  "pad_token_id": _or_null(_whole(-1)),
  "id2label": _or_null(lambda x: type(x) is dict),
}


class Model:
  def __init__(self, seed: str, share: int):
    self.name, self.share, self._seed = f"model-{seed}", share, GOLDEN / f"{seed}_tiny"
    self._config = json.loads((self._seed / "config.json").read_text())

  def prepare(self, folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
      shutil.copy(self._seed / name, folder)

  def damage(self, rng: random.Random, folder: Path) -> None:
    path = folder / "model.safetensors"
    kind = rng.randrange(6)
    if kind < 4:
      config = damage.dumps(rng, damage.of_json(rng, self._config))
      (folder / "config.json").write_bytes(config)
    elif kind == 4:
      rewrite_header(rng, path)
    else:
      tensors = load_file(path)
      name = rng.choice(sorted(tensors))
      change = rng.randrange(6)
      if change == 0:
        tensors[f"zz.{name}"] = tensors.pop(name)
      elif change == 1:
        tensors[name] = np.ascontiguousarray(tensors[name].T)[..., :-1].copy()
      elif change == 2:
        tensors[name] = tensors[name].view(np.int32)
      elif change == 3:
        tensors[name] = tensors[name].astype(rng.choice(("int64", "uint8", "bool", "complex64")))
      elif change == 4:
        tensors[name] = np.full_like(tensors[name], np.nan)
      else:
        tensors[name] = tensors[name][None]
      tensors = {k: v for k, v in tensors.items() if v.dtype != np.complex64}
      save_file(tensors, path)

  def read(self, folder: Path) -> Any:
    told: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("peftjax").addHandler(listener)
    try:
      model, params = pj.load_pretrained(folder)
    finally:
      logging.getLogger("peftjax").removeHandler(listener)
    return model, params, " ".join(told)

  def check(self, folder: Path, got: Any) -> str:
    model, params, told = got
    try:
      text = (folder / "config.json").read_bytes().decode("utf-8-sig")
      config = json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
      return f"accepted, but {error!r}"
    for field, value in config.items():
      if field in FIELDS and not FIELDS[field](value):
        return f"{field}={str(value)[:60]!r} was accepted"
    tensors = load_file(folder / "model.safetensors")
    known = {_key(x) for x in tensors.values()}
    for path, leaf in paths.leaves(params).items():
      for array in jax.tree.leaves(leaf):
        if not jnp.issubdtype(array.dtype, jnp.floating):
          return f"{path} is {array.dtype}"
        new = path.startswith("head/") or "pooler" in path
        if _key(np.asarray(array)) not in known and not (new and path in told):
          return f"{path} has values of no tensor, and nothing was said"
    finite = all(np.isfinite(x).all() for x in tensors.values())
    tokens = jnp.ones((1, min(4, model.config.max_length)), jnp.int32)
    logits = pj.apply(model, params, tokens)
    logits = logits[0] if isinstance(logits, tuple) else logits
    if finite and not math.isfinite(float(jnp.sum(logits))) and "eps" not in text:
      return "finite tensors give logits that are not"
    return ""


def _key(array: np.ndarray) -> tuple[Any, ...]:
  """The same for a kernel and its transpose."""
  flat = np.sort(np.asarray(array, np.float32).ravel())
  return tuple(sorted(array.shape)), flat.tobytes()
