"""What a run is made of, built from its settings: texts as tokens, and a model with its method."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from peftjax import data, linen, sharding
from peftjax.methods.base import Method
from peftjax.models import pretrained
from peftjax.training.settings import Settings


class Task(NamedTuple):
  """A corpus and its tokens."""

  corpus: data.Corpus
  tokens: dict[str, data.Tokens]
  buckets: tuple[int, ...]
  pad_id: int

  @property
  def outputs(self) -> int:
    """Of the head: one a class, or one number."""
    return len(self.corpus.label_names) or 1

  def digest(self) -> str:
    """SHA-256 of every token and label."""
    total = hashlib.sha256()
    for part in sorted(self.tokens):
      t, labels = self.tokens[part], self.corpus.splits[part].labels
      for array in (t.ids, t.types, t.offsets, labels):
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


class Adapted(NamedTuple):
  """A model with a method attached; `mask` is what trains."""

  module: nn.Module
  params: Any
  mask: Any
  method: Method
  new: tuple[str, ...]


def task(settings: Settings) -> Task:
  """Reads and tokenises the corpus; one set of length buckets for all of its splits."""
  corpus = data.load(seed=settings.seed, **settings.data.corpus_arguments())
  tokenizer = data.load_tokenizer(str(settings.model.path()))
  length = settings.data.max_length
  tokens = {part: data.encode(tokenizer, corpus.splits[part], length) for part in corpus.splits}
  lengths = np.concatenate([t.lengths for t in tokens.values()])
  pad_id = pretrained.pad_id(settings.model.path())
  return Task(corpus, tokens, data.buckets(lengths, max_length=length), pad_id)


def adapted(settings: Settings, outputs: int, mesh: Mesh | None = None) -> Adapted:
  """Loads the model, attaches the method and, on a mesh, puts every array in its place."""
  key = jax.random.key(settings.seed)
  model = settings.model
  module, params, new = pretrained.load(
    model.path(),
    outputs,
    key=jax.random.fold_in(key, 0),
    scan_layers=model.scan_layers,
    dtype=model.compute_dtype(),
  )
  method = settings.build_method()
  layout = None
  if model.scan_layers:
    layout = linen.layout(module, jax.ShapeDtypeStruct((1, 4), jnp.int32))
  params = method.attach(jax.random.fold_in(key, 1), params, layout)
  if mesh is not None:
    params = jax.device_put(params, sharding.shardings(params, mesh))
  return Adapted(module, params, method.trainable(params), method, new)


def dropout_key(settings: Settings) -> jax.Array:
  return jax.random.fold_in(jax.random.key(settings.seed), 2)


def mesh_of(text: str) -> Mesh | None:
  """The mesh to train on: as asked for, or all devices along "data"; none for one device."""
  count = jax.device_count()
  if not text and count == 1:
    return None
  return sharding.make_mesh(text or f"data:{count}")


def resolve(path: str | Path) -> Path:
  return Path(path).expanduser().absolute()
