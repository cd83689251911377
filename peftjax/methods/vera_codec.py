"""VeRA in directories of Hugging Face's PEFT library (0.21)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from peftjax.core.adapted import axis_names
from peftjax.core.ranges import Fraction, Size
from peftjax.methods.codec import (
  MERGE,
  Adapter,
  Codec,
  Flag,
  Module,
  Number,
  Source,
  Targeted,
  Want,
  layers,
)
from peftjax.methods.vera_weight import PAIR, Projections, VeRA

VECTORS = ("vera_lambda_d", "vera_lambda_b")  # d [r] and b [out]
# The shared pair, [r, in] and [out, r] of the largest sizes among the modules.
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeraConfig(Targeted):
  """Fields of VeRA."""

  r: Size = 256
  vera_dropout: Fraction = 0.0
  save_projection: Flag = True
  d_initial: Number = None
  init_weights: Flag = None
  projection_prng_key: Number = None


class VeraCodec(Codec):
  """VeRA with its projections; a layer without an adapter has d = b = 0, which stay so."""

  kind = "VERA"
  leaf = VeRA
  schema = VeraConfig
  fixed = {"bias": ("none",)}
  lacks = ("exclude_modules",)
  constants = {
    "bias": "none",
    "save_projection": True,
    # Fields by which peft draws a new adapter, and then replaces it by what is saved.
    "d_initial": 0.1,
    "init_weights": True,
    "projection_prng_key": 0,
  }

  def check(self, config: Any, where: str) -> None:
    if not config.save_projection:
      raise ValueError(
        f"{where} has save_projection=False: A and B are not in the directory, and only torch "
        f"draws them from projection_prng_key.\n{MERGE}"
      )

  def wants(self, config: Any, module: Module, matcher: Any) -> dict[str, Want]:
    return dict(zip(VECTORS, (Want((config.r,)), Want((module.n_out,))), strict=True))

  def wants_shared(self, config: Any, modules: Sequence[Module]) -> dict[str, Want]:
    n_in, n_out = max(m.n_in for m in modules), max(m.n_out for m in modules)
    hint = f" with rank {config.r}, as adapter_config.json says"
    shapes = ((config.r, n_in), (n_out, config.r))
    return {x: Want(s, hint) for x, s in zip(PROJECTIONS, shapes, strict=True)}

  def read(self, source: Source) -> Any:
    sizes = (source.config.r, source.leaf.shape[-1])
    d, b = (
      source.rows(name, np.zeros(n, np.float32)) for name, n in zip(VECTORS, sizes, strict=True)
    )
    return VeRA(
      base=source.leaf,
      d=d,
      b=b,
      dropout=source.config.vera_dropout,
      names=axis_names(source.leaf),
    )

  def read_shared(self, config: Any, tensor: Callable[[str], np.ndarray]) -> dict[str, Any]:
    return {PAIR: Projections(*(jnp.asarray(tensor(name)) for name in PROJECTIONS))}

  def write(self, path: str, leaf: Any, *, rslora: bool) -> dict[str, Adapter]:
    """d and b of each layer; a layer where both are zero has none."""
    fields = {"r": leaf.d.shape[-1], "vera_dropout": leaf.dropout}
    return {
      layer: Adapter(dict(zip(VECTORS, rows, strict=True)), fields)
      for layer, *rows in layers(path, leaf.stack, leaf.d, leaf.b)
      if any(map(np.any, rows))
    }

  def write_shared(self, leaves: Sequence[Any], nodes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The projections as far as a weight uses them: peft asks for just those sizes."""
    n_in, n_out = (max(leaf.shape[axis] for leaf in leaves) for axis in (-2, -1))
    pair = nodes[leaves[0].of]
    arrays = np.asarray(pair.a)[:, :n_in], np.asarray(pair.b)[:n_out]
    return dict(zip(PROJECTIONS, arrays, strict=True))
