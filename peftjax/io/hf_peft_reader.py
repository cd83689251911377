"""Takes the tensors of a PEFT directory one parameter at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from peftjax.core import paths
from peftjax.core.layout import Axes
from peftjax.io import hf_peft_config
from peftjax.io.safetensors_dir import TensorDir
from peftjax.methods.adalora_weight import SVDLoRA
from peftjax.methods.dora_weight import DoRA, squares
from peftjax.methods.ia3_weight import IA3
from peftjax.methods.lora_weight import LoRA
from peftjax.methods.vera_weight import Projections, VeRA
from peftjax.models.pretrained import stack_of

STEM, ROOT = "adapter_model", "base_model.model."
# Where the adapter is no part of a module: the root of names, and its tensor.
VIRTUAL_ROOT, EMBEDDINGS = "base_model.", "prompt_embeddings"
# The tensors of A and B beside a module's name.
MAGNITUDE = "lora_magnitude_vector"  # DoRA's m
SCALES = "ia3_l"  # IA3's l, [1, in] or [out, 1]
VECTORS = ("vera_lambda_d", "vera_lambda_b")  # VeRA's d and b
PROJECTIONS = (
  "base_model.vera_A",
  "base_model.vera_B",
)  # and what they share, by their whole names
FACTORS = {
  "kernel": ("lora_A.weight", "lora_B.weight"),
  "embedding": ("lora_embedding_A", "lora_embedding_B"),
}


class Reader:
  """Takes what each parameter has in one directory, and notes what it took."""

  def __init__(self, directory: str | os.PathLike, family: str, hf_name: Callable[[str], str]):
    self.settings = hf_peft_config.read(directory)
    self.tensors = TensorDir(directory, STEM)
    self.available = set(self.tensors.names())
    self.where = f"{directory}/{STEM}.safetensors"
    self.hf_name = hf_name
    self.root = VIRTUAL_ROOT if self.settings.virtual else ROOT
    # An adapter of the bare encoder does not name the body.
    body = f"{family}."
    self.bare = "" if any(x.startswith(self.root + body) for x in self.available) else body
    self.used: set[str] = set()
    self.attached: set[str] = set()
    self.replaced: set[str] = set()

  def leaf(self, path: str, leaf: Any) -> Any:
    """The leaf itself, or with its adapter, or as the directory has it."""
    if isinstance(leaf, LoRA | IA3 | VeRA):
      raise ValueError(f"{path} has an adapter already: load into the base model's params")
    layers = paths.layer_paths(path, stack_of(path, leaf))
    names = [self.root + self.hf_name(layer).removeprefix(self.bare) for layer in layers]
    if any(name in self.available or self._must_be_saved(name) for name in names):
      return self._replaced(path, leaf, names)
    modules = [name.rpartition(".")[0] for name in names]
    if any(f"{m}.{SCALES}" in self.available for m in modules):
      return self._scaled(path, leaf, modules)
    if any(f"{m}.{vector}" in self.available for m in modules for vector in VECTORS):
      return self._vectors(path, leaf, modules)
    factors = self._names(path.rpartition("/")[2])
    if any(f"{m}.{factor}" in self.available for m in modules for factor in factors):
      return self._attached(path, leaf, modules, factors)
    return leaf

  def pair(self, params: Any) -> Projections:
    """VeRA's projections, [r, in] and [out, r], at least as large as the weights mean."""
    shapes = [x.shape for x in paths.leaves(params).values() if isinstance(x, VeRA)]
    there = [self.tensors.info(x).shape if x in self.available else () for x in PROJECTIONS]
    n_in = max([*there[0][1:], *(shape[-2] for shape in shapes)], default=0)
    n_out = max([*there[1][:1], *(shape[-1] for shape in shapes)], default=0)
    sizes = ((self.settings.rank, n_in), (n_out, self.settings.rank))
    hint = f" or more, with rank {self.settings.rank}, as {hf_peft_config.NAME} says"
    read = (
      self._read(x, size, np.float32, hint) for x, size in zip(PROJECTIONS, sizes, strict=True)
    )
    return Projections(*map(jnp.asarray, read))

  def embeddings(self, shape: tuple[int, int]) -> np.ndarray:
    """The virtual tokens of a prefix or a prompt."""
    return self._read(EMBEDDINGS, shape, np.float32, f", as {hf_peft_config.NAME} says")

  def check_all_used(self) -> None:
    """Raises `ValueError` if a tensor has no place in the model."""
    if extra := sorted(self.available - self.used):
      shown = "\n  ".join(extra[:10])
      raise ValueError(
        f"{self.where}: {len(extra)} tensors have no place in this model:\n  {shown}\n"
        "Was the adapter trained on another model?"
      )

  def _must_be_saved(self, name: str) -> bool:
    module = name.rpartition(".")[0]
    return any(f".{saved}." in f"{module}." for saved in self.settings.modules_to_save)

  def _replaced(self, path: str, leaf: Any, names: list[str]) -> Any:
    self.replaced.add(path)
    if not stack_of(path, leaf):
      return jnp.asarray(self._plain(path, names[0], leaf))
    keep = lambda name: name not in self.available and not self._must_be_saved(name)
    rows = [leaf[i] if keep(x) else self._plain(path, x, leaf[i]) for i, x in enumerate(names)]
    return jnp.stack(rows)

  def _plain(self, path: str, name: str, leaf: Any) -> np.ndarray:
    turned = path.endswith("kernel")
    shape = leaf.shape[::-1] if turned else leaf.shape
    hint = " (another number of labels? load_pretrained(..., num_labels=...))"
    array = self._read(name, shape, leaf.dtype, hint if "head/" in path else "")
    return array.T if turned else array

  def _names(self, kind: str) -> tuple[str, ...]:
    """The tensors of A and B and, of AdaLoRA, λ; none where there is no adapter."""
    if self.settings.kind == "ADALORA":
      return ("lora_A", "lora_B", "lora_E") if kind == "kernel" else ()
    return FACTORS.get(kind, ())

  def _attached(self, path: str, leaf: Any, modules: list[str], names: tuple[str, ...]) -> LoRA:
    self.attached.add(path)
    n_in, n_out = leaf.shape[-2:]
    stack = stack_of(path, leaf)
    found = [self._factors(m, names, n_in, n_out) for m in modules]
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
      dropout=float(self.settings.dropout),
      names=getattr(leaf, "names", None),
    )
    if self.settings.dora:
      return self._directed(fields, modules)
    if self.settings.kind != "ADALORA":
      return LoRA(**fields)
    e = np.stack([pad(e, 0)[:, 0] for _, _, e, _ in found]).reshape(*stack, width)
    return SVDLoRA(**fields, e=jnp.asarray(e))

  def _scaled(self, path: str, leaf: Any, modules: list[str]) -> Any:
    """IA3 of a kernel, or of the bias beside one; a layer without it has scales of 1."""
    parent, _, kind = path.rpartition("/")
    tensors = [f"{module}.{SCALES}" for module in modules]
    there = [name for name in tensors if name in self.available]
    inputs = self.tensors.info(there[0]).shape[0] == 1
    if kind == "bias" and not inputs:
      return IA3(base=leaf, l=None, axes=Axes((), (-1,)), of=f"{parent}/kernel")
    if kind != "kernel":
      return leaf
    self.attached.add(path)
    size = leaf.shape[-2 if inputs else -1]
    shape = (1, size) if inputs else (size, 1)
    ones = np.ones(shape, np.float32)
    rows = [self._read(x, shape, np.float32) if x in there else ones for x in tensors]
    scales = jnp.asarray(np.stack(rows).reshape(*stack_of(path, leaf), size))
    return IA3(base=leaf, l=scales, inputs=inputs)

  def _vectors(self, path: str, leaf: Any, modules: list[str]) -> Any:
    """VeRA of a kernel; a layer without it has d = b = 0, which stay so in training."""
    if not path.endswith("kernel"):
      return leaf
    self.attached.add(path)
    sizes = (self.settings.rank, leaf.shape[-1])

    def row(module: str, i: int) -> np.ndarray:
      if not self.available & {f"{module}.{name}" for name in VECTORS}:
        return np.zeros(sizes[i], np.float32)
      return self._read(f"{module}.{VECTORS[i]}", (sizes[i],), np.float32)

    d, b = (
      jnp.asarray(np.stack([row(m, i) for m in modules]).reshape(*stack_of(path, leaf), sizes[i]))
      for i in (0, 1)
    )
    dropout = float(self.settings.dropout)
    return VeRA(base=leaf, d=d, b=b, dropout=dropout, names=getattr(leaf, "names", None))

  def _directed(self, fields: dict[str, Any], modules: list[str]) -> DoRA:
    """DoRA of LoRA's fields; a layer without an adapter has the magnitude of its base."""
    weight = DoRA(**fields)
    square = squares(weight.base, weight.axes, weight.stack)
    rows = np.sqrt(np.asarray(square)).reshape(len(modules), -1)
    for i, name in enumerate(f"{module}.{MAGNITUDE}" for module in modules):
      if weight.rank.ravel()[i]:
        rows[i] = self._read(name, rows[i].shape, np.float32)
    return weight.replace(m=jnp.asarray(rows.reshape(square.shape)), square=square)

  def _factors(self, module: str, names: tuple[str, ...], n_in: int, n_out: int) -> tuple[Any, ...]:
    """A, B, λ of AdaLoRA, and the scale of one module; of rank 0 if it has no adapter."""
    tensors, s = [f"{module}.{name}" for name in names], self.settings
    shape = lambda rank: ((rank, n_in), (n_out, rank), (rank, 1))[: len(names)]
    if not self.available & set(tensors):
      return *(np.zeros(size, np.float32) for size in shape(0)), 0.0
    key = module.removeprefix(ROOT)
    rank = hf_peft_config.match(s.rank_pattern, key, s.rank)
    hint = f" with rank {rank}, as {hf_peft_config.NAME} says"
    pairs = zip(tensors, shape(rank), strict=True)
    read = [self._read(name, size, np.float32, hint) for name, size in pairs]
    if s.kind == "ADALORA":  # its scale stays that of the rank it began with, and is one for all
      return *read, s.alpha / s.rank
    alpha = hf_peft_config.match(s.alpha_pattern, key, s.alpha)
    return *read, alpha / (math.sqrt(rank) if s.rslora else rank)

  def _read(self, name: str, shape: tuple[int, ...], dtype: Any, hint: str = "") -> np.ndarray:
    if name not in self.available:
      raise ValueError(
        f"{self.where} lacks the tensor {name} of shape {shape}, which {hf_peft_config.NAME} "
        "or the tensors beside it ask for. Save the adapter again."
      )
    info = self.tensors.info(name)
    if info.shape != shape or not jnp.issubdtype(info.dtype, jnp.floating):
      raise ValueError(
        f"{self.where}: tensor {name} is {info.dtype} {info.shape}; the model means floats of "
        f"{shape}{hint}"
      )
    self.used.add(name)
    return self.tensors.read(name).astype(dtype)
