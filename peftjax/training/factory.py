"""A model of one's own, by import path: `--config.model.factory=package.module:function`."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from peftjax import linen, sharding
from peftjax import nnx as pj_nnx
from peftjax.core import given, paths, probe
from peftjax.core.layout import Layout
from peftjax.core.params import Params
from peftjax.data import TextTokenizer
from peftjax.models import configuration
from peftjax.nnx.pure import Pure
from peftjax.quant import transform
from peftjax.training import step
from peftjax.training.checkpoint import digest_of
from peftjax.training.settings import Model, Settings
from peftjax.training.task import Batch, Task

Inputs = Callable[[Batch], dict[str, Any]]


class Made(NamedTuple):
  """A model that a factory made.

  Attributes:
    module: a linen module, or an NNX model as a pure function.
    params: its parameters, quantised if the settings say so.
    layout: axes of its kernels.
    digest: of its import path and its parameters as they came.
  """

  module: Any
  params: Params
  layout: Layout
  digest: str


def load(settings: Settings, inputs: Inputs, mesh: Mesh | None) -> Made:
  """Calls the factory of the config.

  Raises:
    ValueError: there is no such function, it fails or returns no model; the model cannot be called
      with what the task has; the config asks for what only models of this library have.
  """
  name = str(settings.model.factory)
  if settings.model.dtype != "float32":
    raise ValueError(
      f"--config.model.dtype={settings.model.dtype} is of this library's models; {name} decides in "
      "which dtype its own computes"
    )
  module, params = call(name)
  if settings.method.get("head", True) and not any(
    p.startswith("head/") for p in paths.leaves(params)
  ):
    raise ValueError(
      f'{name}: no module "head" to train beside the method; call it so, or write '
      "--config.method.head=false"
    )
  digest = digest_of({name: params})
  first, rest = example(module, inputs, settings.data.max_length)
  with calling(name, first, rest):
    layout = layout_of(module, params, first, **rest)
  if fmt := settings.quant.format():
    params = transform.quantize(params, fmt, settings.quant.targets, layout)
  if mesh is not None:
    params = sharding.put(params, sharding.shardings(params, mesh, settings.sharding_rules()))
  return Made(module, params, layout, digest)


def call(name: str) -> tuple[Any, Params]:
  """The module and parameters of the factory `package.module:function`.

  Raises:
    ValueError: it is not there, needs arguments, fails, or returns something else than a linen
      module with its parameters or an NNX module.
  """
  path, _, function = name.partition(":")
  if not all(part.isidentifier() for part in (*path.split("."), function)):
    raise ValueError(f"--config.model.factory={name} is not of the form package.module:function")
  with told(f"--config.model.factory={name}: import of {path}"):
    made = getattr(importlib.import_module(path), function, None)
  if not callable(made):
    raise ValueError(f"--config.model.factory={name}: {path} has no function {function!r}")
  with told(f"--config.model.factory={name}: {function}()"):
    result = made()
  if isinstance(result, nnx.Module):
    return pj_nnx.split(result)
  is_pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)
  if not is_pair or not isinstance(result[0], nn.Module):
    raise ValueError(
      f"{name} returned a {type(result).__name__}; return (module, params) of Flax linen, or an "
      "nnx.Module"
    )
  given.check_params(result[1])
  return result


def example(module: Any, inputs: Inputs, length: int) -> tuple[Any, dict[str, Any]]:
  """The arguments of a module for one row: the first, and the others by name."""
  ones: Any = np.ones((1, length), np.int32)
  names = ("tokens", "types", "positions", "segments")
  return step.arguments(module, inputs({**dict.fromkeys(names, ones), "mask": ones > 0}))


def layout_of(module: Any, params: Params, *args: Any, **kwargs: Any) -> Layout:
  """Axes of the kernels of a module called with these arguments: `example`'s, or others."""
  if isinstance(module, Pure):
    return module.layout(params, *args, **kwargs)
  paths.check_no_nnx(module)
  train = {"train": False} if "train" in step.takes(module) else {}
  return linen.layout(module, *args, **kwargs, **train)


def check(name: str, module: Any, params: Params, task: Task) -> None:
  """ValueError unless the model's outputs are those of the task."""
  first, rest = example(module, task.kind.inputs, task.lengths[-1])
  shape: Any = None
  training: dict[str, Any] = {"train": True, "rngs": {"dropout": jax.random.key(0)}}
  for how in (training, {}):
    run = functools.partial(linen.apply, module, **how)
    with calling(name, first, rest):
      shape = getattr(probe.shapes(run, params, first, **rest), "shape", None)
  if task.outputs is not None and shape != (1, task.outputs):
    raise ValueError(
      f"{name}: tokens {first.shape} give {shape}, and this task needs logits [B, {task.outputs}]: "
      f"{(1, task.outputs)}"
    )
  if task.outputs is not None:
    return
  top = max(int(np.max(ids[0], initial=0)) for ids in task.ids().values())
  if shape is None or len(shape) != 3 or shape[:2] != first.shape or shape[2] <= top:
    raise ValueError(
      f"{name}: tokens {first.shape} give {shape}, and this task needs logits [B, T, V] of the "
      f"tokenizer's ids, V > {top}"
    )


def check_trusted(model: Model, trusted: str | None, workdir: Any) -> None:
  """ValueError unless the caller names the code that a workdir says its model comes from."""
  if model.factory and trusted != model.factory:
    raise ValueError(
      f"{workdir} has the model of {model.factory}, and to read it is to run that code; if you "
      f"trust it, write --factory={model.factory}"
    )


def pad_id(model: Model, tokenizer: TextTokenizer) -> int:
  """The id that pads a batch: as the model's files say, of a factory's as the tokenizer does."""
  if not model.factory:
    return configuration.pad_id(model.path())
  return tokenizer.id("pad_token") or 0


def end_ids(model: Model, tokenizer: TextTokenizer) -> tuple[int, ...]:
  """The ids that end a text, likewise; ValueError if the model is no language model."""
  if not model.factory:
    configuration.check_decoder(model.path())
    return configuration.end_ids(model.path())
  if (end := tokenizer.id("eos_token")) is None:
    raise ValueError(f"{tokenizer.source} has no eos_token to end a text with: name one")
  return (end,)


def calling(name: str, first: Any, rest: Mapping[str, Any]) -> AbstractContextManager[None]:
  return told(f"{name}: its model called with {', '.join(('tokens', *rest))} {first.shape}")


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
  """Whatever code that is not ours raises, as one ValueError."""
  try:
    yield
  except Exception as error:
    line = " ".join(str(error).split())[:300]
    raise ValueError(
      f"{what}: {type(error).__name__}: {line} (PEFTJAX_TRACEBACK=1 shows where)"
    ) from error
