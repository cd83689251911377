"""The model of a plan: shapes alone, of a named size or of a directory's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import peftjax as pj
from peftjax import linen, sharding
from peftjax.core import ranges, tree
from peftjax.methods.base import Method
from peftjax.models import configuration, families, hf_config
from peftjax.training import causal_lm, seq2seq
from peftjax.training.program import Program
from peftjax.training.settings import Settings

# Width, layers, heads, width of the feed-forward layer: Touvron et al. 2023, arXiv 2302.13971,
# table 2 and its code.
LLAMA: Mapping[str, tuple[int, int, int, int]] = {
  "llama-7b": (4096, 32, 32, 11008),
  "llama-13b": (5120, 40, 40, 13824),
  "llama-33b": (6656, 60, 52, 17920),
  "llama-65b": (8192, 80, 64, 22016),
}


# Tasks whose step can be planned, as they have batches of one shape by their settings.
PLANNED: Mapping[str, Any] = {"causal_lm": causal_lm, "seq2seq": seq2seq}


@dataclasses.dataclass(frozen=True)
class Planned:
  """A training step of shapes.

  Attributes:
    module: the model.
    program: the run's program.
    state, frozen, batch, key: arguments of the step: shapes, dtypes and, on a mesh, shardings.
    mesh, rules: the mesh and sharding rules of all of them.
  """

  module: Any
  program: Program
  state: Any
  frozen: Any
  batch: Any
  key: Any
  mesh: Mesh
  rules: sharding.Rules

  def compile(self) -> Any:
    return self.program.step.lower(self.state, self.frozen, self.batch, self.key).compile()


def planned(
  settings: Settings, name: str, base_dtype: str, rows: int, length: int, mesh: Mesh
) -> Planned:
  """The step of a language model or encoder-decoder that a run with these settings would compile.

  Args:
    settings: settings with a task "causal_lm" or "seq2seq"; its data is not read.
    name: a key of `LLAMA`; "" for the model of the settings.
    base_dtype: dtype of the arrays of the base that are not quantised.
    rows, length: shape of a batch; for "seq2seq" the length is that of sources.
    mesh: the mesh of the devices.

  Raises:
    ValueError: another task, an unknown size, more tokens than positions, a batch or a length
      that the mesh does not divide, or a large array that it does not split.
  """
  ranges.one_of("a plan's task", settings.task, PLANNED)
  task = PLANNED[settings.task]
  ranges.one_of("base_dtype", base_dtype, ("float32", "bfloat16", "float16"))
  module, method, params = shapes(settings, name, base_dtype, length)
  for what, size, names in (("rows", rows, ("data", "fsdp")), ("tokens", length, ("sequence",))):
    ways = sharding.ways(names, mesh)
    if size % ways:
      raise ValueError(f"{size} {what} cannot be split {ways} ways ({' x '.join(names)})")
  rules = settings.sharding_rules()
  sharding.check_split(params, mesh, rules)
  params = sharding.named(_placed(params, sharding.shardings(params, mesh, rules)), mesh, rules)
  train, frozen = tree.partition(params, method.trainable(params))
  batch = task.shapes(settings.data, rows, length)
  key = jax.eval_shape(lambda: jax.random.key(0))
  program = Program(settings, task.KIND, module, method, train, 1000, mesh)
  return Planned(
    module,
    program,
    program.abstract(train),
    frozen,
    _placed(batch, sharding.batch_shardings(batch, mesh)),
    _placed(key, NamedSharding(mesh, P())),
    mesh,
    rules,
  )


def shapes(settings: Settings, name: str, base_dtype: str, length: int) -> tuple[Any, Method, Any]:
  """The module, the method and the parameters, quantised and adapted, of a plan: see `planned`."""
  module = _module(settings, name, length)
  params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, base_dtype), params)
  layout = linen.layout(module, jax.ShapeDtypeStruct((1, 4), jnp.int32))
  if (fmt := settings.quant.format()) is not None:
    params = pj.quantize(params, fmt, settings.quant.targets, layout)
  method = settings.build_method()
  return module, method, method.attach(jax.random.key(0), params, layout)


def _module(settings: Settings, name: str, length: int) -> Any:
  if name and name not in LLAMA:
    raise ValueError(f"--model={name} is none of {', '.join(LLAMA)}")
  if name:
    ranges.one_of("the task of --model", settings.task, ("causal_lm",))
    width, layers, heads, ffn = LLAMA[name]
    where = f"--model={name}"
    config: dict[str, Any] = dict(
      model_type="llama",
      vocab_size=32_000,
      hidden_size=width,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      intermediate_size=ffn,
      max_position_embeddings=max(2048, length),
      tie_word_embeddings=False,
    )
  else:
    if settings.model.factory:
      raise ValueError(
        f"--config.model.factory={settings.model.factory}: plans are of this library's models"
      )
    path = settings.model.path()
    PLANNED[settings.task].check(path)
    config, where = configuration.config_of(path), str(path)
  fields = hf_config.read(config, where)
  family = families.FAMILIES[fields.model_type]
  module = family.MODEL(family.CONFIG.from_hf(config, where, **settings.model.options()))
  if length > module.config.max_length:
    raise ValueError(f"{where} has {module.config.max_length} positions, fewer than {length}")
  return module


def _placed(shapes: Any, places: Any) -> Any:
  if isinstance(places, NamedSharding):
    return jax.ShapeDtypeStruct(shapes.shape, shapes.dtype, sharding=places)
  give = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  return jax.tree.map(give, shapes, places)
