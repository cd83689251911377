"""LoRA (Hu et al. 2021, arXiv 2106.09685), rsLoRA, PiSSA, LoRA-FA and LoRA+."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from peftjax.core import paths
from peftjax.core.adapted import bare, check_bare
from peftjax.core.layout import Axes, Layout, axes_of
from peftjax.core.ranges import Fraction, Positive, Size, checked
from peftjax.core.weight import Weight
from peftjax.methods import lora_init
from peftjax.methods.base import Optimized, trainable_mask
from peftjax.methods.lora_weight import LoRA


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAMethod(Optimized):
  """Attaches `LoRA` to the targeted weights and trains its factors; see `lora`."""

  leaf: ClassVar[type[LoRA]] = LoRA
  trained: ClassVar[frozenset[str]] = frozenset({"a", "b"})

  rank: int
  alpha: float
  targets: str | Sequence[str]
  dropout: float
  rslora: bool
  init: str
  freeze_a: bool
  b_rate: float
  rank_pattern: Mapping[str, int]
  alpha_pattern: Mapping[str, float]
  dtype: Any

  def claims(self, params: Any) -> list[str]:
    return paths.select(params, self.targets)

  def attach(self, key: jax.Array, params: Any, layout: Layout | None = None) -> Any:
    """Every targeted weight becomes a `LoRA` around it; their product is 0, so outputs stay.

    Args:
      key: folded with each leaf's path, so another rule elsewhere changes nothing here.
      params: plain, quantised or abstract (`jax.ShapeDtypeStruct`).
      layout: of kernels with more than two axes; see `peftjax.linen.layout`.

    Raises:
      ValueError: a target that matches nothing or is no matrix; a rank above the matrix's; a
        pattern that matches no target; a leaf that has an adapter already; a kernel of more than
        two axes without `layout`; a table with `freeze_a`; a tied one with `init="pissa"`.
    """
    flat = paths.leaves(params)
    shapes = {p: tuple(bare(flat[p]).shape) for p in self.claims(params)}
    axes = {p: axes_of(p, shape, layout) for p, shape in shapes.items()}
    layers = {p: paths.layer_paths(p, a.stack(shapes[p])) for p, a in axes.items()}
    if self.init == "pissa" and (both := {h.of for h in paths.tied(params).values()} & set(axes)):
      raise ValueError(
        f'init="pissa" moves a part of {", ".join(both)} into the factors, and the head that is '
        "tied to it would lose that part; write params = pj.untie(params) first"
      )
    every = [layer for group in layers.values() for layer in group]
    paths.check_all_used(self.rank_pattern, every, "rank_pattern")
    paths.check_all_used(self.alpha_pattern, every, "alpha_pattern")

    def wrap(path: str, leaf: Any) -> Any:
      return self._wrap(key, path, leaf, axes[path], layers[path]) if path in axes else leaf

    return paths.map_leaves(wrap, params)

  def trainable(self, params: Any) -> Any:
    trained = self.trained - {"a"} if self.freeze_a else self.trained
    return trainable_mask(params, set(self.claims(params)), trained)

  def _finish(self, path: str, weight: Any) -> Any:
    """The leaf with all that depends on its base or its kind."""
    return _pissa(weight, path, self.dtype) if self.init == "pissa" else weight

  def _wrap(self, key: jax.Array, path: str, leaf: Any, axes: Axes, layers: list[str]) -> LoRA:
    check_bare(path, leaf)
    shape = tuple(bare(leaf).shape)
    stack = axes.stack(shape)
    n_in, n_out = (math.prod(shape[axis] for axis in group) for group in axes)
    ranks = [paths.first_match(self.rank_pattern, layer, self.rank) for layer in layers]
    for layer, rank in zip(layers, ranks, strict=True):
      if not 1 <= rank <= min(n_in, n_out):
        raise ValueError(
          f"{layer}: rank {rank} does not fit a {n_in} x {n_out} matrix; "
          f"write a rank between 1 and {min(n_in, n_out)}"
        )
    scales = [
      paths.first_match(self.alpha_pattern, layer, self.alpha)
      / (math.sqrt(rank) if self.rslora else rank)
      for layer, rank in zip(layers, ranks, strict=True)
    ]
    is_table = path.split("/")[-1] == "embedding"
    if is_table and self.freeze_a and self.init != "pissa":
      raise ValueError(
        f"{path} is a table, whose A starts at zero, and freeze_a=True would leave it there, with "
        "nothing to learn; write freeze_a=False for it, or target kernels"
      )
    width = max(ranks)

    def make(key: jax.Array, base: Any) -> LoRA:
      a, b = [], []
      for layer, rank in zip(layers, ranks, strict=True):
        layer_key = paths.fold_in_path(key, layer)
        pair = lora_init.factors(layer_key, self.init, rank, n_in, n_out, is_table, self.dtype)
        a.append(jnp.pad(pair[0], ((0, width - rank), (0, 0))))
        b.append(jnp.pad(pair[1], ((0, 0), (0, width - rank))))
      weight = self.leaf(
        base=base,
        a=jnp.stack(a).reshape(*stack, width, n_in),
        b=jnp.stack(b).reshape(*stack, n_out, width),
        scale=jnp.asarray(scales, jnp.float32).reshape(stack),
        rank=jnp.asarray(ranks, jnp.int32).reshape(stack),
        axes=axes,
        dropout=self.dropout,
        b_rate=self.b_rate,
        names=getattr(leaf, "names", None),
      )
      return self._finish(path, weight)

    base = bare(leaf)
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(base))
    return jax.eval_shape(make, key, base) if abstract else make(key, base)


@checked
def lora(
  rank: Size = 8,
  alpha: Positive = 16.0,
  targets: str | Sequence[str] = ("query", "value"),
  *,
  dropout: Fraction = 0.0,
  rslora: bool = False,
  init: str = "kaiming",
  freeze_a: bool = False,
  b_rate: Positive = 1.0,
  rank_pattern: Mapping[str, Size] | None = None,
  alpha_pattern: Mapping[str, Positive] | None = None,
  dtype: Any = jnp.float32,
) -> LoRAMethod:
  """LoRA: h = W x + (α/r) B A x, with W frozen (Hu et al. 2021, eq. 3).

  Args:
    rank: r.
    alpha: α; the branch is scaled by α/r.
    targets: module names, regexes of whole paths, or `"all-linear"`.
    dropout: rate on the branch's input, rounded to 1/256.
    rslora: scale by α/√r instead (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2).
    init: of A, with B = 0 (`lora_init.factors`): `"kaiming"`, U(±1/√in), or `"gaussian"`,
      N(0, 1/r²). `"pissa"`: the principal triplets of W make up B A and the base keeps the rest
      (Meng et al. 2024, arXiv 2404.02948, eq. 2-4).
    freeze_a: train B alone (LoRA-FA; Zhang et al. 2023, arXiv 2308.03303, section 3).
    b_rate: the learning rate of B over that of A (LoRA+; Hayou et al. 2024, arXiv 2402.12354,
      which advises 16); `method.optimizer` applies it.
    rank_pattern, alpha_pattern: patterns to another r or α; the first match wins. The layers of a
      scanned stack go by the unrolled model's names: `.*/layers_3/.*`.
    dtype: of A and B.

  Raises:
    ValueError: on an unknown init, or a number out of range.
  """
  if init not in lora_init.INITS:
    raise ValueError(f"init {init!r} is not one of {', '.join(map(repr, lora_init.INITS))}")
  return LoRAMethod(
    rank=rank,
    alpha=alpha,
    targets=targets if isinstance(targets, str) else tuple(targets),
    dropout=dropout,
    rslora=rslora,
    init=init,
    freeze_a=freeze_a,
    b_rate=b_rate,
    rank_pattern=dict(rank_pattern or {}),
    alpha_pattern=dict(alpha_pattern or {}),
    dtype=dtype,
  )


def _pissa(weight: LoRA, path: str, dtype: Any) -> LoRA:
  """Moves the principal part of the base into the factors: base = W − s·(B A)ᵀ."""
  if isinstance(weight.base, Weight) or weight.axes != Axes():
    raise ValueError(f"{path}: init='pissa' needs a plain matrix; attach before quantising")
  width = weight.a.shape[-2]
  a, b = lora_init.principal(weight.base, weight.rank, width, weight.scale)
  weight = weight.replace(a=a.astype(dtype), b=b.astype(dtype), residual=True)
  return weight.replace(base=weight.base - weight.delta().astype(weight.base.dtype))
