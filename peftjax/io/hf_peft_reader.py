"""Takes the tensors of a PEFT directory one parameter at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from peftjax.core import paths, tree
from peftjax.core.layout import Axes
from peftjax.core.weight import Weight
from peftjax.io.hf_peft_fields import AdaLora, Ia3, Lora, Vera
from peftjax.io.hf_peft_plan import (
  EMBEDDINGS,
  FACTORS,
  HEAD,
  MAGNITUDE,
  PROJECTIONS,
  SCALES,
  STEM,
  TRIPLETS,
  VECTORS,
  Plan,
  Site,
)
from peftjax.io.safetensors_dir import TensorDir
from peftjax.methods.adalora_weight import SVDLoRA
from peftjax.methods.dora_weight import DoRA, squares
from peftjax.methods.ia3_weight import IA3
from peftjax.methods.lora_weight import LoRA
from peftjax.methods.vera_weight import Projections, VeRA
from peftjax.models.pretrained import stack_of


class Reader:
  """Takes what each parameter has in one directory, and notes what it took.

  Attributes:
    plan: what the directory holds, checked.
    replaced: paths of parameters that were saved whole.
    attached: paths of weights with an adapter.
    rebased: paths of tables and heads that the directory has other arrays of than the model had.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    params: Any,
    family: Any,
    virtual: Callable[..., tuple[int, int]],
  ):
    self.tensors = TensorDir(directory, STEM)
    self.plan = Plan(directory, self.tensors, params, family, virtual)
    self.config = self.plan.config
    self.replaced: set[str] = set()
    self.attached: set[str] = set()
    self.rebased: set[str] = set()

  def base(self, params: Any) -> Any:
    """`params` as the directory's adapter is of: other tables and heads, and untied ones.

    peft loads a table (or head) that lies beside its adapter over the model's own; a tied one is
    one array in both places.

    Raises:
      ValueError: two tensors of one array that differ; one of a quantised weight.
    """
    plan = self.plan
    given: dict[str, list[str]] = {}
    for path, (site, *_) in plan.sites.items():
      owner = plan.tied if plan.tied and path == f"{HEAD}/kernel" else path
      given.setdefault(owner, []).extend(plan.given(site))

    def other(path: str, leaf: Any) -> Any:
      names = given.get(path)
      if not names:
        return leaf
      if isinstance(leaf, Weight):
        raise ValueError(
          f"{plan.file} has {names[0]} to replace {path}, which is quantised here: load the "
          "adapter into the model as it was before pj.quantize, or remove the tensor."
        )
      first, *rest = (self._read(name, leaf.dtype) for name in names)
      if any(not np.array_equal(first, x) for x in rest):
        raise ValueError(
          f"{plan.file}: {names[0]} and {names[1]} differ, and in this model they are one array "
          "(tie_word_embeddings). Save the adapter of a model whose head is untied with its config."
        )
      first = first.T if plan.sites[path][0].turned else first
      if np.array_equal(first, leaf):
        return leaf
      self.rebased.add(path)
      return jnp.asarray(first)

    params = paths.map_leaves(other, params)
    if plan.keeps_tie:
      self._check_one()
    if not plan.unties:
      return params
    if plan.tied in self.rebased:
      self.rebased.add(f"{HEAD}/kernel")
    return tree.untie(params)

  def leaf(self, path: str, leaf: Any) -> Any:
    """The leaf itself, or with its adapter, or as the directory has it."""
    sites, plan = self.plan.sites[path], self.plan
    if any(map(plan.is_whole, sites)):
      return self._replaced(path, leaf, sites)
    if not any(map(plan.is_targeted, sites)):
      return leaf
    kind = path.rpartition("/")[2]
    if isinstance(self.config, Ia3):
      return self._scaled(path, leaf, sites) if kind in ("kernel", "bias") else leaf
    if kind not in FACTORS:
      return leaf
    self.attached.add(path)
    if isinstance(self.config, Vera):
      return self._vectors(path, leaf, sites)
    return self._attached(path, leaf, sites)

  def pair(self) -> Projections:
    """VeRA's projections, [r, in] and [out, r]."""
    return Projections(*(jnp.asarray(self._read(x)) for x in PROJECTIONS))

  def embeddings(self) -> np.ndarray:
    """The virtual tokens of a prefix or a prompt."""
    return self._read(EMBEDDINGS)

  def _replaced(self, path: str, leaf: Any, sites: list[Site]) -> Any:
    self.replaced.add(path)

    def one(site: Site) -> np.ndarray:
      array = self._read(self.plan.name(site), leaf.dtype)
      return array.T if site.turned else array

    if not stack_of(path, leaf):
      return jnp.asarray(one(sites[0]))
    if isinstance(leaf, Weight) and not all(map(self.plan.is_whole, sites)):
      raise ValueError(
        f"{self.plan.where}: modules_to_save has some layers of {path} and not others, and it is "
        "quantised: load the model unrolled (scan_layers=False)."
      )
    rows = [one(x) if self.plan.is_whole(x) else leaf[i] for i, x in enumerate(sites)]
    return jnp.stack([jnp.asarray(row) for row in rows])

  def _attached(self, path: str, leaf: Any, sites: list[Site]) -> LoRA:
    config = self.config
    n_in, n_out = leaf.shape[-2:]
    stack = stack_of(path, leaf)
    found = [self._factors(site, n_in, n_out) for site in sites]
    width = max(len(a) for a, *_ in found)
    pad = lambda x, axis: np.pad(
      x, [(0, width - x.shape[i]) if i == axis else (0, 0) for i in (0, 1)]
    )
    fields = dict(
      base=leaf,
      a=jnp.asarray(np.stack([pad(a, 0) for a, *_ in found]).reshape(*stack, width, n_in)),
      b=jnp.asarray(np.stack([pad(b, 1) for _, b, *_ in found]).reshape(*stack, n_out, width)),
      scale=jnp.asarray([scale for *_, scale in found], jnp.float32).reshape(stack),
      rank=jnp.asarray([len(a) for a, *_ in found], jnp.int32).reshape(stack),
      dropout=config.dropout,  # type: ignore[attr-defined]
      names=getattr(leaf, "names", None),
    )
    if isinstance(config, AdaLora):
      e = np.stack([pad(e, 0)[:, 0] for _, _, e, _ in found]).reshape(*stack, width)
      return SVDLoRA(**fields, e=jnp.asarray(e))
    if isinstance(config, Lora) and config.use_dora:
      return self._directed(fields, sites)
    return LoRA(**fields)

  def _factors(self, site: Site, n_in: int, n_out: int) -> tuple[Any, ...]:
    """A, B, λ of AdaLoRA, and the scale of one module; of rank 0 if it has no adapter."""
    c: Any = self.config
    plan = self.plan
    names: tuple[str, ...] = TRIPLETS if isinstance(c, AdaLora) else FACTORS[site.kind]
    if not plan.is_targeted(site):
      empty = ((0, n_in), (n_out, 0), (0, 1))[: len(names)]
      return *(np.zeros(size, np.float32) for size in empty), 0.0
    module = plan.module(site)
    read = [self._read(f"{plan.prefix}{module}.{name}") for name in names]
    if isinstance(c, AdaLora):  # its scale stays that of the rank it began with, and is one for all
      return *read, c.lora_alpha / c.init_r
    rank, alpha = plan.rank(site), plan.matcher.value(c.alpha_pattern, module, c.lora_alpha)
    return *read, alpha / (math.sqrt(rank) if c.use_rslora else rank)

  def _scaled(self, path: str, leaf: Any, sites: list[Site]) -> Any:
    """IA3 of a kernel, or of the bias beside one; a layer without it has scales of 1."""
    plan = self.plan
    there = [site for site in sites if plan.is_targeted(site)]
    config: Any = self.config
    sides = {plan.matcher.is_feedforward(config, plan.module(site)) for site in there}
    if len(sides) > 1:
      raise ValueError(
        f"{plan.where}: feedforward_modules scales the inputs of some layers of {path} and the "
        "outputs of others: load the model unrolled (scan_layers=False)."
      )
    [inputs] = sides
    parent, _, kind = path.rpartition("/")
    if kind == "bias":
      lent = IA3(base=leaf, l=None, axes=Axes((), (-1,)), of=f"{parent}/kernel")
      return leaf if inputs else lent
    self.attached.add(path)
    size = leaf.shape[-2 if inputs else -1]
    ones = np.ones((1, size), np.float32)
    rows = [
      self._read(f"{plan.prefix}{plan.module(x)}.{SCALES}") if x in there else ones for x in sites
    ]
    scales = np.stack([row.ravel() for row in rows]).reshape(*stack_of(path, leaf), size)
    return IA3(base=leaf, l=jnp.asarray(scales), inputs=inputs)

  def _vectors(self, path: str, leaf: Any, sites: list[Site]) -> VeRA:
    """VeRA of a kernel; a layer without it has d = b = 0, which stay so in training."""
    plan, config = self.plan, self.config
    sizes = (config.r, leaf.shape[-1])  # type: ignore[attr-defined]

    def row(site: Site, i: int) -> np.ndarray:
      if not plan.is_targeted(site):
        return np.zeros(sizes[i], np.float32)
      return self._read(f"{plan.prefix}{plan.module(site)}.{VECTORS[i]}")

    d, b = (
      jnp.asarray(np.stack([row(x, i) for x in sites]).reshape(*stack_of(path, leaf), sizes[i]))
      for i in (0, 1)
    )
    dropout = config.dropout  # type: ignore[attr-defined]
    return VeRA(base=leaf, d=d, b=b, dropout=dropout, names=getattr(leaf, "names", None))

  def _directed(self, fields: dict[str, Any], sites: list[Site]) -> DoRA:
    """DoRA of LoRA's fields; a layer without an adapter has the magnitude of its base."""
    weight, plan = DoRA(**fields), self.plan
    square = squares(weight.base, weight.axes, weight.stack)
    rows = np.array(jnp.sqrt(square)).reshape(len(sites), -1)
    for i, site in enumerate(sites):
      if plan.is_targeted(site):
        rows[i] = self._read(f"{plan.prefix}{plan.module(site)}.{MAGNITUDE}")
    return weight.replace(m=jnp.asarray(rows.reshape(square.shape)), square=square)

  def _check_one(self) -> None:
    """Raises `ValueError` if a head and a table that are saved as one differ."""
    plan = self.plan
    names = [plan.name(plan.sites[path][0]) for path in (plan.tied, f"{HEAD}/kernel")]
    table, head = (self._read(name) for name in names)
    if not np.array_equal(table, head):
      raise ValueError(
        f"{plan.file}: {names[0]} and {names[1]} differ, and ensure_weight_tying=True says that "
        "they are one. Save the adapter again."
      )

  def _read(self, name: str, dtype: Any = np.float32) -> np.ndarray:
    """A tensor of the plan, which has checked its shape.

    Raises:
      ValueError: an entry that is NaN, infinite, or becomes so in `dtype`. peft loads such.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # told below
      array = self.tensors.read(self.plan.real[name]).astype(dtype)
    if not np.isfinite(wide := array.astype(np.float32)).all():
      count = int((~np.isfinite(wide)).sum())
      raise ValueError(
        f"{self.plan.file}: {count} entries of tensor {self.plan.real[name]} are NaN or infinite "
        f"as {np.dtype(dtype).name}: its training diverged. Save it from an earlier step."
      )
    return array
