"""LoKr (Yeh et al. 2023, arXiv 2309.14859): a Kronecker product, its second factor of low rank."""

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

from peftjax.core import paths
from peftjax.core.adapted import SKIPS_DROPOUT, Adapted, axis_names
from peftjax.core.dropout import dropout
from peftjax.core.einsum import einsum, split_subscripts, without
from peftjax.core.layout import Axes
from peftjax.core.ranges import Size
from peftjax.core.weight import Weight, materialize
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
from peftjax.methods.low_rank import LowRank

# The axis of the rank in each factor that has one.
RANKED: Mapping[str, int] = {"w1_a": -1, "w1_b": -2, "w2_a": -1, "w2_b": -2}
FACTORS = ("w1", "w2", *RANKED)


class LoKr(Adapted):
  """W = base + scale · (w1 ⊗ w2)ᵀ, for a Flax kernel `[*stack, in, out]`.

  With in = m·n and out = l·k the product is of w1 `[l, m]` and w2 `[k, n]`, each whole or of low
  rank: w1 = w1_a w1_b, w2 = w2_a w2_b. The other form is None.

  Attributes:
    w1, w2: `[*stack, l, m]`, `[*stack, k, n]`.
    w1_a, w2_a: `[*stack, l, R]`, `[*stack, k, R]`.
    w1_b, w2_b: `[*stack, R, m]`, `[*stack, R, n]`.
    scale, rank, key, axes, dropout: as in `LoRA`.
    factor, decompose_both: as in `LoKrMethod`; they determine the shapes in files.
  """

  trained: ClassVar[frozenset[str]] = frozenset(FACTORS)

  w1: Any = None
  w2: Any = None
  w1_a: Any = None
  w1_b: Any = None
  w2_a: Any = None
  w2_b: Any = None
  scale: Any = None
  rank: Any = None
  key: Any = None
  axes: Axes = flax.struct.field(pytree_node=False, default=Axes())
  dropout: float = flax.struct.field(pytree_node=False, default=0.0)
  factor: int = flax.struct.field(pytree_node=False, default=-1)
  decompose_both: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def ranked(self) -> Mapping[str, int]:  # type: ignore[override]
    return {name: axis for name, axis in RANKED.items() if getattr(self, name) is not None}

  @property
  def stack(self) -> tuple[int, ...]:
    return self.axes.stack(tuple(self.shape))

  def true_size(self) -> int:
    """The number of parameters of the base and the factors here, padding left out."""
    whole = sum(x.size for x in (self.w1, self.w2) if x is not None)
    return self.base_size() + whole + self.ranked_size()

  def delta(self) -> jax.Array:
    """ΔW = scale · (w1 ⊗ w2)ᵀ in the kernel's shape and the factors' dtype."""
    w1, w2 = self._factor("w1"), self._factor("w2")
    product = jnp.einsum("...lm,...kn->...lkmn", w1 * self.scale[..., None, None], w2)
    n_out, n_in = (w1.shape[axis] * w2.shape[axis] for axis in (-2, -1))
    return self.axes.as_kernel(product.reshape(*self.stack, n_out, n_in), tuple(self.shape))

  def materialize(self) -> jax.Array:
    """base + scale · (w1 ⊗ w2)ᵀ.

    Raises:
      ValueError: with a dropout key inside: dropout acts on the branch's input, not on W.
    """
    if self.key is not None:
      raise ValueError(SKIPS_DROPOUT)
    base = materialize(self.base)
    return base + self.delta().astype(base.dtype)

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    """einsum(eqn, x, base) + s · w1 X w2ᵀ, X the inputs as `[m, n]`; no array of W's shape."""
    x_s, w_s, out_s = split_subscripts(eqn)
    ins, outs = ("".join(w_s[axis] for axis in axes) for axes in self.axes)
    forward = set(ins) <= set(x_s) - set(out_s) and set(outs) <= set(out_s) - set(x_s)
    if self.stack or not forward:
      return Weight.einsum(self, eqn, x)
    rest = without(x_s, ins)
    with jax.named_scope("adapter"):
      x_last = x if self.key is None else dropout(self.key, x, self.dropout)
      x_last = jnp.einsum(f"{x_s}->{rest}{ins}", x_last)
      lead = x_last.shape[: x_last.ndim - len(ins)]
      w1, w2 = self._factor("w1"), self._factor("w2")
      z = x_last.reshape(*lead, w1.shape[-1], w2.shape[-1])
      z = einsum("...mk,lm->...lk", einsum("...mn,kn->...mk", z, w2), w1)
      z = z.reshape(*lead, *(self.shape[axis] for axis in self.axes.outs))
      branch = self.scale.astype(x.dtype) * jnp.einsum(f"{rest}{outs}->{out_s}", z)
    return einsum(eqn, x, self.base) + branch

  def unmerged(self, dense: jax.Array) -> jax.Array:
    """The base that this adapter was merged into: the inverse of `materialize`."""
    return dense - self.delta().astype(dense.dtype)

  def with_key(self, key: jax.Array, path: str) -> LoKr:
    keys = [paths.fold_in_path(key, p) for p in paths.layer_paths(path, self.stack)]
    return self.replace(key=jnp.stack(keys).reshape(self.stack))

  def child_specs(self, spec: P) -> LoKr:
    """Specs: the base is split as the kernel is; the factors are small, and replicated."""
    stack, _, _ = self.axes.places(spec, self.ndim)
    here = [name for name in (*FACTORS, "scale", "rank", "key") if getattr(self, name) is not None]
    return self.replace(base=self.base_specs(spec), **dict.fromkeys(here, P(*stack)))

  def _factor(self, name: str) -> jax.Array:
    """w1 or w2; a low-rank one is made here, small beside W."""
    whole = getattr(self, name)
    return getattr(self, f"{name}_a") @ getattr(self, f"{name}_b") if whole is None else whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKrConfig(Targeted):
  """The fields of `adapter_config.json`."""

  r: Size = 8
  alpha: Alpha = 8.0
  decompose_both: Flag = False
  decompose_factor: int = -1
  rank_pattern: dict[str, Size] | None = None
  alpha_pattern: dict[str, Alpha] | None = None
  # Fields of training, of initialisation and of convolutions.
  rank_dropout: Number = None
  rank_dropout_scale: Flag = None
  module_dropout: Number = None
  init_weights: bool | str | None = None
  use_effective_conv2d: Flag = None


class LoKrCodec(Codec):
  """LoKr of linear layers; a stacked layer without an adapter has factors and a scale of 0."""

  kind = "LOKR"
  leaf = LoKr
  schema: ClassVar[type[Targeted]] = LoKrConfig
  lacks = ("fan_in_fan_out",)
  exceptions: ClassVar[Mapping[str, str]] = {"r": "rank_pattern", "alpha": "alpha_pattern"}
  constants: ClassVar[Mapping[str, Any]] = {"init_weights": True}

  def wants(self, config: Any, module: Module, matcher: Any) -> dict[str, Want]:
    rank = self._rank(config, module, matcher)
    hint = f" with rank {rank}, as adapter_config.json says"
    shapes = _shapes(
      module.n_in, module.n_out, rank, config.decompose_factor, bool(config.decompose_both)
    )
    return {f"lokr_{name}": Want(shape, hint) for name, shape in shapes.items()}

  def read(self, source: Source) -> Any:
    config = source.config
    there = [module for module in source.modules if module is not None]
    forms = [self.wants(config, module, source.matcher).keys() for module in there]
    if any(form != forms[0] for form in forms):
      raise ValueError(
        f"{source.where}: some layers of {source.path} have a factor whole that others have of low "
        "rank: load the model unrolled (scan_layers=False)."
      )
    names = [name.removeprefix("lokr_") for name in forms[0]]
    like = {name: source.tensor(there[0], f"lokr_{name}") for name in names}
    factors: dict[str, list[np.ndarray]] = {name: [] for name in names}
    ranks, scales = [], []
    for module in source.modules:
      for name in names:
        read = source.tensor(module, f"lokr_{name}") if module else np.zeros_like(like[name])
        factors[name].append(read)
      ranks.append(self._rank(config, module, source.matcher) if module else 0)
      own = source.matcher.value(config.alpha_pattern, module.name, config.alpha) if module else 0.0
      scales.append(own / max(ranks[-1], 1))
    return LoKr(
      base=source.leaf,
      **{name: padded(x, source.stack, RANKED.get(name, -1)) for name, x in factors.items()},
      scale=jnp.asarray(scales, jnp.float32).reshape(source.stack),
      rank=jnp.asarray(ranks, jnp.int32).reshape(source.stack),
      factor=config.decompose_factor,
      decompose_both=bool(config.decompose_both),
      names=axis_names(source.leaf),
    )

  def write(self, path: str, leaf: Any, *, rslora: bool) -> dict[str, Adapter]:
    """One adapter per layer, padding stripped; a layer of rank 0 has none."""
    here = [name for name in FACTORS if getattr(leaf, name) is not None]
    form = {"decompose_factor": leaf.factor, "decompose_both": leaf.decompose_both}
    found = {}
    arrays = [getattr(leaf, name) for name in here]
    for layer, rank, scale, *rows in layers(path, leaf.stack, leaf.rank, leaf.scale, *arrays):
      if r := int(rank):
        cut = {-1: np.s_[:, :r], -2: np.s_[:r], None: np.s_[:]}
        own = {f"lokr_{k}": x[cut[RANKED.get(k)]] for k, x in zip(here, rows, strict=True)}
        found[layer] = Adapter(own, {"r": r, "alpha": alpha(scale, r), **form})
    return found

  def _rank(self, config: Any, module: Module, matcher: Any) -> int:
    return matcher.value(config.rank_pattern, module.name, config.r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKrMethod(LowRank):
  """LoKr: h = W x + (α/r) (w1 ⊗ w2) x, of up to full rank (Yeh et al. 2023, section 3.1).

  With in = m·n and out = l·k, w1 is `[l, m]` and w2 `[k, n]`, of rank r where r is less than half
  of the larger of k and n, else whole. α/r scales it in either case, as in PEFT.

  Args:
    rank, alpha, targets, dropout, rank_pattern, alpha_pattern, divide_rank, dtype: as in `LowRank`.
    factor: m and l; where it does not divide a size, or is -1, the divisor next to its square root
      (PEFT's `decompose_factor`).
    decompose_both: give w1 low rank too, where r is less than half of the larger of l and m.

  Raises:
    ValueError: on a number out of range; at `attach` as `LowRank`, on a table, or where layers
      of a stack have ranks by which a factor is whole in some and not in others.
  """

  leaf = LoKr
  codec = LoKrCodec()

  factor: int = -1
  decompose_both: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.factor != -1 and self.factor < 1:
      raise ValueError(f"factor={self.factor}: write a number from 1 on, or -1 for the square root")

  def _factors(
    self, key: jax.Array, rank: int, n_in: int, n_out: int, is_table: bool
  ) -> dict[str, tuple[jax.Array, int | None]]:
    """The first factor of w1 zero, all others uniform as in He et al. 2015 (as PEFT)."""
    shapes = _shapes(n_in, n_out, rank, self.factor, self.decompose_both)

    def draw(i: int, shape: tuple[int, ...]) -> jax.Array:
      if not i:
        return jnp.zeros(shape, self.dtype)
      bound = 1 / math.sqrt(shape[-1])
      return jax.random.uniform(jax.random.fold_in(key, i), shape, self.dtype, -bound, bound)

    named = enumerate(shapes.items())
    return {name: (draw(i, shape), RANKED.get(name)) for i, (name, shape) in named}

  def _finish(self, path: str, weight: Any) -> Any:
    if path.split("/")[-1] == "embedding":
      raise ValueError(f"{path} is a table, which LoKr is not made for; target kernels")
    return weight.replace(factor=self.factor, decompose_both=self.decompose_both)


lokr = LoKrMethod


def _shapes(
  n_in: int, n_out: int, rank: int, factor: int, decompose_both: bool
) -> dict[str, tuple[int, int]]:
  """The factors of a `[out, in]` matrix by name, w1's first."""
  pairs = zip(("w1", "w2"), *(_split(size, factor) for size in (n_out, n_in)), strict=True)
  shapes: dict[str, tuple[int, int]] = {}
  for name, rows, columns in pairs:
    if rank < max(rows, columns) / 2 and (name == "w2" or decompose_both):
      shapes |= {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}
    else:
      shapes[name] = (rows, columns)
  return shapes


def _split(size: int, factor: int) -> tuple[int, int]:
  """`size` as a product: `factor` and the rest if it divides, else two divisors, smaller first.

  These are the nearest to the square root, or with a factor the largest below it (as PEFT).
  """
  if factor > 0 and size % factor == 0:
    return factor, size // factor
  most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
  first = next(m for m in range(most, 0, -1) if size % m == 0)
  return first, size // first
