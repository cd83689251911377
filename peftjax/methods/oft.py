"""OFT (Qiu et al. 2023, arXiv 2306.07280): inputs turned by an orthogonal matrix of blocks."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from msgspec import Meta

from peftjax.core import paths
from peftjax.core.adapted import Adapted, axis_names, bare, check_bare
from peftjax.core.einsum import einsum, split_subscripts, without
from peftjax.core.layout import Axes, ConvAxes, Layout, axes_of
from peftjax.core.ranges import Count, DType, Size
from peftjax.core.stacks import of_stacks
from peftjax.core.weight import Weight, materialize
from peftjax.methods.base import Method, trainable_mask
from peftjax.methods.codec import (
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

Terms = Annotated[int, Meta(ge=2, le=64)]
ROTATION = "oft_R.weight"
SERIES = (0, 18)  # the release of PEFT from which on its series is this one


class OFT(Adapted):
  """W = R base, R block-diagonal, for a Flax kernel `[*stack, in, out]`: h = (x R) base.

  Q is the skew-symmetric matrix of a row of `q`, and its block of R by the Cayley transform
  (I − Q)(I + Q)⁻¹, or as PEFT approximates (I + Q)(I − Q)⁻¹ (note the sign) by `terms` terms of a
  Neumann series, I + 2Q + 2Q² + ... + 2Qᵗ⁻² + Qᵗ⁻¹ (two terms are I + 2Q, and three are four).

  Attributes:
    q: `[*stack, blocks, b (b − 1) / 2]`, above the diagonal of each block of size b, row by row; of
      one block where all share it.
    axes: which axes of the kernel are inputs and outputs.
    terms: of the series; None for the exact transform.
  """

  trained: ClassVar[frozenset[str]] = frozenset({"q"})

  q: Any
  axes: Axes = flax.struct.field(pytree_node=False, default=Axes())
  terms: int | None = flax.struct.field(pytree_node=False, default=5)

  @property
  def stack(self) -> tuple[int, ...]:
    return self.axes.stack(tuple(self.shape))

  def true_size(self) -> int:
    """Parameters of the base and the rotation that are here."""
    return self.base_size() + (0 if self.q is None else self.q.size)

  def materialize(self) -> jax.Array:
    base = materialize(self.base)
    return self._turned(base, jnp.swapaxes(self._rotation(), -1, -2))

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    """einsum(eqn, x R, base), in the dtype of `x`; no array of W's shape."""
    x_s, w_s, out_s = split_subscripts(eqn)
    ins, outs = ("".join(w_s[axis] for axis in axes) for axes in self.axes)
    forward = set(ins) <= set(x_s) - set(out_s) and set(outs) <= set(out_s) - set(x_s)
    if self.stack or not forward:
      return Weight.einsum(self, eqn, x)
    last = without(x_s, ins) + ins
    with jax.named_scope("adapter"):
      x_last = jnp.einsum(f"{x_s}->{last}", x)
      rows = x_last.reshape(-1, math.prod(self.shape[axis] for axis in self.axes.ins))
      turned = _times(rows, self._rotation().astype(x.dtype)).reshape(x_last.shape)
    return einsum(f"{last},{w_s}->{out_s}", turned, self.base)

  def unmerged(self, dense: jax.Array) -> jax.Array:
    """The base that this adapter was merged into: R⁻¹ W."""
    return self._turned(dense, jnp.swapaxes(jnp.linalg.inv(self._rotation()), -1, -2))

  def child_specs(self, spec: P) -> OFT:
    """The base lies as the kernel does; the rotation is small, and everywhere."""
    stack, _, _ = self.axes.places(spec, self.ndim)
    return self.replace(base=self.base_specs(spec), q=None if self.q is None else P(*stack))

  def _turned(self, dense: jax.Array, blocks: jax.Array) -> jax.Array:
    """A kernel, its inputs times `blocks` as a row of inputs is; computed in float32."""
    last = [self.ndim + axis for axis in (*self.axes.outs, *self.axes.ins)]
    rows = dense.transpose(*range(len(self.stack)), *last).astype(jnp.float32)
    n_in = math.prod(self.shape[axis] for axis in self.axes.ins)
    turned = _times(rows.reshape(*self.stack, -1, n_in), blocks)
    return self.axes.as_kernel(turned, tuple(self.shape)).astype(dense.dtype)

  def _rotation(self) -> jax.Array:
    """The blocks of R, `[*stack, blocks, b, b]` float32."""
    size = _side(self.q.shape[-1])
    above = jnp.zeros((*self.q.shape[:-1], size, size), jnp.float32)
    above = above.at[(..., *np.triu_indices(size, 1))].set(self.q.astype(jnp.float32))
    skew, eye = above - jnp.swapaxes(above, -1, -2), jnp.broadcast_to(jnp.eye(size), above.shape)
    if self.terms is None:
      return jnp.linalg.solve(eye + skew, eye - skew)
    total, power = eye + 2 * skew, skew
    last = 1 if self.terms == 2 else max(self.terms - 1, 3)
    for i in range(2, last + 1):
      power = jnp.matmul(power, skew, precision="highest")
      total = total + (1 if i == last else 2) * power
    return total


def _times(rows: jax.Array, blocks: jax.Array) -> jax.Array:
  """`[*stack, n, in]` times block-diagonal `[*stack, blocks, b, b]`; one block is every block."""
  *stack, n, n_in = rows.shape
  size = blocks.shape[-1]
  blocks = jnp.broadcast_to(blocks, (*stack, n_in // size, size, size))
  cut = rows.reshape(*stack, n, -1, size)
  return jnp.einsum("...nkb,...kbc->...nkc", cut, blocks).reshape(rows.shape)


def _side(entries: int) -> int:
  """b of b (b − 1) / 2."""
  return (1 + math.isqrt(1 + 8 * entries)) // 2


def _divisor(size: int, asked: int) -> int:
  """The divisor of `size` next to what was asked for, the smaller of two (as PEFT)."""
  divisors = (d for d in range(1, size + 1) if size % d == 0)
  return min(divisors, key=lambda d: (abs(d - asked), d))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFTConfig(Targeted):
  """The fields of `adapter_config.json`."""

  r: Count = 0  # blocks
  oft_block_size: Count = 32
  block_share: Flag = False
  use_cayley_neumann: Flag = True
  num_cayley_neumann_terms: Terms = 5
  # Of training, of which PEFT 0.21 ignores the first, and of what is refused.
  module_dropout: Number = None
  init_weights: Flag = None
  eps: Number = None


class OFTCodec(Codec):
  """OFT of linear layers; a stacked layer without an adapter has q = 0, so R = I."""

  kind = "OFT"
  leaf = OFT
  schema: ClassVar[type[Targeted]] = OFTConfig
  fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {"bias": ("none",), "coft": (False, None)}
  constants: ClassVar[Mapping[str, Any]] = {
    **{"bias": "none", "coft": False, "init_weights": True, "module_dropout": 0.0},
    "peft_version": ".".join(map(str, (*SERIES, 0))),  # else peft warns of another series
  }

  def check(self, config: Any, where: str) -> None:
    if bool(config.r) == bool(config.oft_block_size):
      raise ValueError(
        f"{where} has r={config.r} and oft_block_size={config.oft_block_size}: one of them must be "
        "0, as either is the inputs divided by the other"
      )
    known = (config.peft_version or "0").split(".")[:2]
    numbers = tuple(int(x) if x.isascii() and x.isdigit() and len(x) < 9 else 0 for x in known)
    if config.use_cayley_neumann and numbers < SERIES:
      raise ValueError(
        f"{where} has use_cayley_neumann and is of a PEFT before 0.18, whose series was another: "
        "merge the adapter with that version (model.merge_and_unload()) and load the model"
      )

  def wants(self, config: Any, module: Module, matcher: Any) -> dict[str, Want]:
    return {ROTATION: Want(self._shape(config, module.n_in))}

  def read(self, source: Source) -> Any:
    config = source.config
    n_in = next(module.n_in for module in source.modules if module is not None)
    return OFT(
      base=source.leaf,
      q=source.rows(ROTATION, np.zeros(self._shape(config, n_in), np.float32)),
      terms=config.num_cayley_neumann_terms if config.use_cayley_neumann else None,
      names=axis_names(source.leaf),
    )

  def write(self, path: str, leaf: Any, *, rslora: bool) -> dict[str, Adapter]:
    n_in = math.prod(leaf.shape[axis] for axis in leaf.axes.ins)
    note = (n_in, *leaf.q.shape[-2:])
    exact = leaf.terms is None
    fields = {"use_cayley_neumann": not exact, "num_cayley_neumann_terms": leaf.terms or 5}
    return {
      layer: Adapter({ROTATION: q}, fields, note) for layer, q in layers(path, leaf.stack, leaf.q)
    }

  def together(self, adapters: Mapping[str, Adapter]) -> Mapping[str, Adapter]:
    """With the one `oft_block_size`, or the one `r`, from which PEFT has all of these shapes."""
    shapes = {adapter.note for adapter in adapters.values()}
    sizes = sorted({_side(entries) for *_, entries in shapes})
    largest = max(n_in for n_in, *_ in shapes)
    numbers = *sizes, *range(1, largest + 1)
    for share, field, number in itertools.product((False, True), ("oft_block_size", "r"), numbers):
      form = {"oft_block_size": 0, "r": 0, "block_share": share, field: number}
      config = OFTConfig(peft_type=self.kind, **form)
      if all(self._shape(config, n_in) == tuple(shape) for n_in, *shape in shapes):
        return {m: x._replace(fields={**x.fields, **form}) for m, x in adapters.items()}
    raise ValueError(
      f"the adapters have blocks of the sizes {sizes}, and a PEFT directory has one oft_block_size "
      "or one r, and shares all blocks or none: save each in a directory of its own"
    )

  def _shape(self, config: Any, n_in: int) -> tuple[int, int]:
    """The shape of a module's q: blocks, and entries of each."""
    size = _divisor(n_in, config.oft_block_size)
    if config.r:
      size = n_in // _divisor(n_in, config.r)
    return (1 if config.block_share else n_in // size), size * (size - 1) // 2


@dataclasses.dataclass(frozen=True)
class OFTMethod(Method):
  """OFT: h = (x R) W, R orthogonal and block-diagonal (Qiu et al. 2023).

  It turns the inputs, so lengths and angles between the neurons of a block stay as they are. The
  base is never made dense (Qiu et al. 2025, arXiv 2506.19847).

  Args:
    block_size: b, a divisor of each target's inputs; b (b − 1) / 2 numbers are trained a block.
    targets: module names, regexes of whole paths, or `"all-linear"`.
    neumann_terms: of the series that approximates the Cayley transform, as PEFT has it; None for
      the exact transform, which solves a system a block.
    block_share: one block for all.
    dtype: of what is trained.

  Raises:
    ValueError: on a number out of range; at `attach` on a target that matches nothing or is no
      kernel, a convolution, a block size that does not divide its inputs, a leaf that has an
      adapter already, a kernel of more than two axes without `layout`.
  """

  codec = OFTCodec()

  block_size: Size = 16
  targets: str | Sequence[str] = ("query", "value")
  _: dataclasses.KW_ONLY
  neumann_terms: Terms | None = 5
  block_share: bool = False
  dtype: DType = jnp.float32

  def claims(self, params: Any, layout: Layout | None = None) -> list[str]:
    return paths.select(params, self.targets, layout=layout)

  def attach(self, key: jax.Array, params: Any, layout: Layout | None = None) -> Any:
    """Every targeted kernel becomes an `OFT` around it; R = I, so outputs stay.

    Args:
      key: not used; nothing is drawn.
      params: plain, quantised or abstract (`jax.ShapeDtypeStruct`).
      layout: of kernels with more than two axes; see `peftjax.linen.layout`.
    """
    layout = of_stacks(params, layout)
    claimed = set(self.claims(params, layout))
    wrap = lambda path, leaf: self._wrap(path, leaf, layout) if path in claimed else leaf
    return paths.map_leaves(wrap, params)

  def trainable(self, params: Any) -> Any:
    return trainable_mask(params, set(self.claims(params)))

  def _wrap(self, path: str, leaf: Any, layout: Layout) -> OFT:
    check_bare(path, leaf)
    base = bare(leaf)
    shape = tuple(base.shape)
    axes = axes_of(path, shape, layout)
    if path.split("/")[-1] == "embedding" or isinstance(axes, ConvAxes):
      kind = "convolution" if isinstance(axes, ConvAxes) else "table"
      raise ValueError(f"{path} is a {kind}, which OFT is not made for; target kernels")
    n_in, size = math.prod(shape[axis] for axis in axes.ins), self.block_size
    if n_in % size:
      raise ValueError(
        f"{path}: block_size {size} does not divide its {n_in} inputs; write a divisor of them, "
        f"such as {_divisor(n_in, size)}"
      )
    blocks = 1 if self.block_share else n_in // size
    made = (*axes.stack(shape), blocks, size * (size - 1) // 2)
    zeros = lambda: jnp.zeros(made, self.dtype)
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(base))
    q = jax.eval_shape(zeros) if abstract else zeros()
    return OFT(base=base, q=q, axes=axes, terms=self.neumann_terms, names=axis_names(leaf))


oft = OFTMethod
