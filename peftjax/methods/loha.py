"""LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098): the Hadamard product of two low-rank products."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from peftjax.core.adapted import axis_names
from peftjax.core.layout import Axes
from peftjax.core.ranges import Size
from peftjax.methods.codec import (
  Adapter,
  Alpha,
  Codec,
  Flag,
  Module,
  Number,
  Source,
  Targeted,
  Want,
  alpha,
  layers,
  padded,
)
from peftjax.methods.lora_weight import AsLoRA, LoRA
from peftjax.methods.low_rank import LowRank

# The tensors beside a module's name in PEFT's files: B1 [out, r], A1 [r, in], B2 and A2.
TENSORS = {"b1": "hada_w1_a", "a1": "hada_w1_b", "b2": "hada_w2_a", "a2": "hada_w2_b"}


class LoHa(AsLoRA):
  """W = base + scale · ((b1 a1) ∘ (b2 a2))ᵀ, for a Flax kernel `[*stack, in, out]`.

  It is a LoRA of rank R²: (b1 a1) ∘ (b2 a2) = b a with the products of each row of a1 and each of
  a2, and of each column of b1 and each of b2. So no array of the kernel's shape is made.

  Attributes:
    a1, a2: `[*stack, R, in]`.
    b1, b2: `[*stack, out, R]`.
    scale, rank, key, axes, dropout: as in `LoRA`.
  """

  trained: ClassVar[frozenset[str]] = frozenset(TENSORS)
  ranked: ClassVar[Mapping[str, int]] = {"a1": -2, "b1": -1, "a2": -2, "b2": -1}

  a1: Any
  b1: Any
  a2: Any
  b2: Any
  scale: Any
  rank: Any
  key: Any = None
  axes: Axes = flax.struct.field(pytree_node=False, default=Axes())
  dropout: float = flax.struct.field(pytree_node=False, default=0.0)

  @property
  def stack(self) -> tuple[int, ...]:
    return tuple(self.a1.shape[:-2])

  def true_size(self) -> int:
    """The number of parameters of the base and the factors here, padding left out."""
    return self.base_size() + self.ranked_size()

  def as_lora(self) -> LoRA:
    a = jnp.einsum("...ri,...si->...rsi", self.a1, self.a2)
    b = jnp.einsum("...or,...os->...ors", self.b1, self.b2)
    return LoRA(
      base=self.base,
      a=a.reshape(*self.stack, -1, a.shape[-1]),
      b=b.reshape(*self.stack, b.shape[-3], -1),
      scale=self.scale,
      rank=self.rank,
      key=self.key,
      axes=self.axes,
      dropout=self.dropout,
    )

  def child_specs(self, spec: P) -> LoHa:
    stack, ins, outs = self.axes.places(spec, self.ndim)
    a, b = P(*stack, None, ins), P(*stack, outs, None)
    one = P(*stack)
    factors = dict(a1=a, a2=a, b1=b, b2=b, scale=one, rank=one)
    key = None if self.key is None else one
    return self.replace(base=self.base_specs(spec), **factors, key=key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHaConfig(Targeted):
  """The fields of `adapter_config.json`."""

  r: Size = 8
  alpha: Alpha = 8.0
  rank_pattern: dict[str, Size] | None = None
  alpha_pattern: dict[str, Alpha] | None = None
  # Fields of training, of initialisation and of convolutions.
  rank_dropout: Number = None
  module_dropout: Number = None
  init_weights: bool | str | None = None
  use_effective_conv2d: Flag = None


class LoHaCodec(Codec):
  """LoHa of linear layers; a stacked layer without an adapter has rank and scale 0."""

  kind = "LOHA"
  leaf = LoHa
  schema: ClassVar[type[Targeted]] = LoHaConfig
  lacks = ("fan_in_fan_out",)
  exceptions: ClassVar[Mapping[str, str]] = {"r": "rank_pattern", "alpha": "alpha_pattern"}
  constants: ClassVar[Mapping[str, Any]] = {"init_weights": True}

  def wants(self, config: Any, module: Module, matcher: Any) -> dict[str, Want]:
    rank = matcher.value(config.rank_pattern, module.name, config.r)
    hint = f" with rank {rank}, as adapter_config.json says"
    shapes = {"a": (rank, module.n_in), "b": (module.n_out, rank)}
    return {tensor: Want(shapes[name[0]], hint) for name, tensor in TENSORS.items()}

  def read(self, source: Source) -> Any:
    n_in, n_out = source.leaf.shape[-2:]
    empty = {"a": np.zeros((0, n_in), np.float32), "b": np.zeros((n_out, 0), np.float32)}
    factors: dict[str, list[np.ndarray]] = {name: [] for name in TENSORS}
    scales = []
    for module in source.modules:
      for name, tensor in TENSORS.items():
        factors[name].append(source.tensor(module, tensor) if module else empty[name[0]])
      scales.append(self._scale(source, module) if module else 0.0)
    ranks = [len(x) for x in factors["a1"]]
    return LoHa(
      base=source.leaf,
      **{k: padded(x, source.stack, LoHa.ranked[k]) for k, x in factors.items()},
      scale=jnp.asarray(scales, jnp.float32).reshape(source.stack),
      rank=jnp.asarray(ranks, jnp.int32).reshape(source.stack),
      names=axis_names(source.leaf),
    )

  def write(self, path: str, leaf: Any, *, rslora: bool) -> dict[str, Adapter]:
    """One adapter per layer, padding stripped; a layer of rank 0 has none."""
    found = {}
    arrays = [getattr(leaf, name) for name in TENSORS]
    for layer, rank, scale, *rows in layers(path, leaf.stack, leaf.rank, leaf.scale, *arrays):
      if r := int(rank):
        cut = [x[:r] if name[0] == "a" else x[:, :r] for name, x in zip(TENSORS, rows, strict=True)]
        tensors = dict(zip(TENSORS.values(), cut, strict=True))
        found[layer] = Adapter(tensors, {"r": r, "alpha": alpha(scale, r)})
    return found

  def _scale(self, source: Source, module: Module) -> float:
    config, value = source.config, source.matcher.value
    own = value(config.alpha_pattern, module.name, config.alpha)
    return own / value(config.rank_pattern, module.name, config.r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHaMethod(LowRank):
  """LoHa: h = W x + (α/r) ((B1 A1) ∘ (B2 A2)) x, of up to rank r² (Hyeon-Woo et al. 2021, eq. 2).

  It computes with all r² products of rows, so a step costs as much as with LoRA of rank r²; it
  trains and keeps as much as LoRA of rank 2r.

  Args:
    rank, alpha, targets, dropout, rank_pattern, alpha_pattern, divide_rank, dtype: as in `LowRank`.

  Raises:
    ValueError: on a number out of range; at `attach` as `LowRank`, or on a table.
  """

  leaf = LoHa
  codec = LoHaCodec()

  def _factors(
    self, key: jax.Array, rank: int, n_in: int, n_out: int, is_table: bool
  ) -> dict[str, tuple[jax.Array, int | None]]:
    """A1, B1 and B2 uniform as in He et al. 2015, A2 zero (as PEFT)."""
    one, two, three = jax.random.split(key, 3)

    def uniform(key: jax.Array, rows: int, columns: int) -> jax.Array:
      bound = 1 / math.sqrt(columns)
      return jax.random.uniform(key, (rows, columns), self.dtype, -bound, bound)

    return {
      "a1": (uniform(one, rank, n_in), -2),
      "b1": (uniform(two, n_out, rank), -1),
      "a2": (jnp.zeros((rank, n_in), self.dtype), -2),
      "b2": (uniform(three, n_out, rank), -1),
    }

  def _finish(self, path: str, weight: Any) -> Any:
    if path.split("/")[-1] == "embedding":
      raise ValueError(f"{path} is a table, which LoHa is not made for; target kernels")
    return weight


loha = LoHaMethod
