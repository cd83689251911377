"""Reads adapters from directories of Hugging Face's PEFT library (0.21); see `writer` for these."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import paths, shared, tree
from peftjax.core.attachment import attachments
from peftjax.core.params import Mask, Params
from peftjax.core.weight import Weight, children
from peftjax.hf_peft import virtual
from peftjax.hf_peft.codecs import codec_of
from peftjax.hf_peft.fields import Virtual
from peftjax.hf_peft.plan import EMBEDDINGS, HEAD, STEM, Plan, Site
from peftjax.hf_peft.whole import LABELS_OF
from peftjax.io.safetensors_dir import TensorDir
from peftjax.methods.codec import Source
from peftjax.models.families import family_of
from peftjax.models.match import stack_of


def load(directory: str | os.PathLike, params: Params, model: Any) -> tuple[Params, Mask]:
  """`params` with a PEFT directory's adapters attached and its saved modules put in.

  A scanned stack is padded to its largest rank; a layer without an adapter has rank 0, scale 0.
  In a tied model, a table or head that is saved or adapted alone is untied, as in peft; with
  `ensure_weight_tying` both are saved as one and stay so.
  Factors are read as float32, saved modules in the dtype of the arrays they replace.

  Args:
    directory: as peft's `save_pretrained` or `save` wrote it.
    params: the base model's tree, without adapters; not changed.
    model: the module it belongs to.

  Returns:
    `(params, mask)`; the mask is True on all that came from the directory: A, B, saved modules, and
    a table or head beside its adapter that differs from the model's.

  Raises:
    ValueError: adapters in params; a missing or damaged file; a config field that is unknown, of
      another type, out of its range or with a value that is not read; a tensor missing, of another
      shape than model and config mean, or without a place in them; NaN or infinite entries, which
      peft loads; a head that labels texts where the model's labels tokens, or the other way round.
  """
  family = family_of(model)
  if nodes := attachments(params):
    raise ValueError(
      f"params has a {type(nodes[0]).__name__} already: load into the base model's params"
    )
  for path, leaf in paths.leaves(params).items():
    if codec_of(leaf):
      raise ValueError(f"{path} has an adapter already: load into the base model's params")
  shape = lambda config, where: virtual.shape_of(config, model.config, where)
  reader = Reader(directory, params, family, shape)
  _check_task(reader.config.task_type, model.config, reader.plan.where)
  loaded = paths.map_leaves(reader.leaf, reader.base(params))
  if lenders := reader.shared():
    loaded = shared.add(loaded, lenders)
  made: set[str] = set()
  if isinstance(reader.config, Virtual):
    loaded, made = virtual.load(reader.config, reader.embeddings(), loaded)

  def flags(path: str, leaf: Any) -> Any:
    if path in reader.rebased and path not in reader.attached:
      made.add(path)
    mask = jax.tree.map(lambda _: path in reader.replaced | made, leaf)
    if path not in reader.attached:
      return mask
    own = leaf.trained & {name for name, child in children(leaf).items() if child is not None}
    return mask.replace(**dict.fromkeys([*own, *["base"] * (path in reader.rebased)], True))

  return loaded, paths.map_leaves(flags, loaded)


def _check_task(task_type: str | None, model: Any, where: str) -> None:
  """Raises if the adapter's head labels something else than the model's, as texts or tokens."""
  theirs, own = LABELS_OF.get(task_type or ""), getattr(model, "labels_of", None)
  if theirs and own in LABELS_OF.values() and theirs != own:
    raise ValueError(
      f"{where} has task_type {task_type!r}, whose head labels each {theirs}, and this model's "
      f'labels each {own}. Load the base with load_pretrained(..., labels_of="{theirs}").'
    )


class Reader:
  """Takes the arrays of each parameter from one directory, and notes what it took.

  Attributes:
    plan: the contents of the directory, checked.
    replaced: paths of parameters that were saved whole.
    attached: paths of weights with an adapter.
    rebased: paths of tables and heads whose arrays in the directory differ from the model's.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    params: Params,
    family: Any,
    virtual: Callable[..., tuple[int, int]],
  ):
    self.tensors = TensorDir(directory, STEM)
    self.plan = Plan(directory, self.tensors, params, family, virtual)
    self.config = self.plan.config
    self.replaced: set[str] = set()
    self.attached: set[str] = set()
    self.rebased: set[str] = set()

  def base(self, params: Params) -> Params:
    """`params` as the base of the directory's adapter: its tables and heads, untied where they are.

    peft loads a table (or head) that lies beside its adapter over the model's own; a tied one is
    one array in both places.

    Raises:
      ValueError: two tensors for one array that differ; one for a quantised weight.
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
    if plan.codec is None or path.rpartition("/")[2] not in plan.codec.reads:
      return leaf
    read = plan.codec.read(
      Source(
        path=path,
        leaf=leaf,
        stack=stack_of(path, leaf),
        modules=[plan.adapted(x) if plan.is_targeted(x) else None for x in sites],
        config=self.config,
        matcher=plan.matcher,
        where=plan.where,
        tensor=lambda module, name: self._read(f"{plan.prefix}{module.name}.{name}"),
      )
    )
    if read is not leaf:
      self.attached.add(path)
    return read

  def shared(self) -> dict[str, Any]:
    """The nodes that the adapters share."""
    return self.plan.codec.read_shared(self.config, self._read) if self.plan.codec else {}

  def embeddings(self) -> np.ndarray:
    """The virtual tokens of a prefix or a prompt."""
    return self._read(EMBEDDINGS)

  def _replaced(self, path: str, leaf: Any, sites: list[Site]) -> Any:
    self.replaced.add(path)

    def one(site: Site) -> np.ndarray:
      array = self._read(self.plan.name(site), leaf.dtype)
      return array.T if site.turned else array

    if not (stack := stack_of(path, leaf)):
      return jnp.asarray(one(sites[0]))
    if isinstance(leaf, Weight) and not all(map(self.plan.is_whole, sites)):
      raise ValueError(
        f"{self.plan.where}: modules_to_save has some layers of {path} and not others, and it is "
        "quantised: load the model unrolled (scan_layers=False)."
      )
    places = zip(np.ndindex(stack), sites, strict=True)
    rows = [one(x) if self.plan.is_whole(x) else leaf[at] for at, x in places]
    return jnp.stack([jnp.asarray(row) for row in rows]).reshape(leaf.shape)

  def _check_one(self) -> None:
    """Raises ValueError if a head and a table that are saved as one differ."""
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
      ValueError: an entry is NaN, infinite, or becomes so in `dtype`. peft loads such entries.
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
