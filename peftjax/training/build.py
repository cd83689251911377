"""Parts of a run, built from its settings: texts as tokens, and a model with its method."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from peftjax import linen, sharding
from peftjax.core.layout import Layout
from peftjax.core.params import Mask, Params
from peftjax.io import bucket
from peftjax.methods.base import Method
from peftjax.models import pretrained
from peftjax.training import answering, causal_lm, classification, factory, seq2seq, tagging
from peftjax.training.settings import Settings
from peftjax.training.task import Task

# The name of a task in a config, and the file that knows it.
TASKS: Mapping[str, Any] = {
  "classify": classification,
  "causal_lm": causal_lm,
  "tag": tagging,
  "answer": answering,
  "seq2seq": seq2seq,
}


class Attached(NamedTuple):
  """A model with a method attached.

  `mask` marks the trained arrays; `base` is the `Made.digest` of a factory's model.
  """

  module: nn.Module
  params: Params
  mask: Mask
  method: Method
  new: tuple[str, ...]
  base: str | None = None


def task(settings: Settings) -> Task:
  """The data, loss and metrics that the config asks for."""
  return TASKS[settings.task].load(settings)


def attached(settings: Settings, outputs: int | None, mesh: Mesh | None = None) -> Attached:
  """Loads the model and attaches the method; on a mesh every array is made in its place."""
  if settings.model.factory:
    module, params, axes, base = factory.load(settings, TASKS[settings.task].inputs, mesh)
    new: tuple[str, ...] = ()
  else:
    module, params, new = _pretrained(settings, outputs, mesh)
    axes, base = layout(module), None
  method = settings.build_method()
  attach = lambda key, params: method.attach(key, params, axes)
  key = attach_key(settings.seed)
  if mesh is None:
    params = attach(key, params)
  else:
    rules = settings.sharding_rules()
    params = sharding.born(attach, mesh, key, params, rules=rules)
    sharding.check_split(params, mesh, rules)
    params = sharding.named(params, mesh, rules)
  return Attached(module, params, method.trainable(params), method, new, base)


def _pretrained(
  settings: Settings, outputs: int | None, mesh: Mesh | None
) -> pretrained.Pretrained:
  model = settings.model
  # A task with outputs of its own says what has labels, whatever the head in the files labels.
  head: dict[str, Any] = {}
  if outputs is not None:
    head["labels_of"] = TASKS[settings.task].LABELS_OF
  return pretrained.load(
    model.path(),
    outputs,
    key=jax.random.fold_in(jax.random.key(settings.seed), 0),
    quant=settings.quant.format(),
    where=settings.quant.targets,
    mesh=mesh,
    rules=settings.sharding_rules(),
    **head,
    **model.options(),
  )


def attach_key(seed: int) -> jax.Array:
  """The key that a method draws its arrays with."""
  return jax.random.fold_in(jax.random.key(seed), 1)


@functools.lru_cache(maxsize=16)  # a sweep attaches to one model many times
def layout(module: nn.Module) -> Layout:
  """The layout of a model of this library; only to be read."""
  return linen.layout(module, jax.ShapeDtypeStruct((1, 4), jnp.int32))


def dropout_key(settings: Settings) -> jax.Array:
  return jax.random.fold_in(jax.random.key(settings.seed), 2)


def mesh_of(text: str) -> Mesh | None:
  """The mesh to train on: as asked for, or all devices along "data"; none for one device."""
  count = jax.device_count()
  if not text and count == 1:
    return None
  return sharding.make_mesh(text or f"data:{count}")


def resolve(path: str | Path) -> Path:
  """A workdir as an absolute path; ValueError for an empty path or an unknown user's home.

  A bucket is refused, too: callers that can work in one use `mirror.where`.
  """
  if bucket.url(path):
    raise ValueError(
      f"--workdir={path}: this command works in a local folder, and only a run of "
      "experiments.train in a bucket. Name a folder."
    )
  if not str(path):
    raise ValueError("--workdir is empty. Name a folder; the one you are in is --workdir=.")
  try:
    return Path(path).expanduser().absolute()
  except RuntimeError as error:
    raise ValueError(f"--workdir={path}: {error} Name another folder.") from None
