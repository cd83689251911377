"""`Codec`: the form of one method's adapters in directories of Hugging Face's PEFT library.

A method's file has the codec beside the leaf, so that `peftjax.hf_peft`, which walks over models
and directories, knows no method by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from peftjax.core import paths
from peftjax.core.patterns import LENGTH
from peftjax.core.ranges import Count
from peftjax.core.weight import Weight

# Types of the fields of `adapter_config.json`, for schemas.
Name = Annotated[str, Meta(min_length=1, max_length=LENGTH)]
Names = list[Name]
Alpha = Annotated[float, Meta(gt=-1e30, lt=1e30)]
Flag = bool | None  # peft takes null for false
Number = int | float | None
Text = str | None
Nested = dict[str, Any] | None
TaskType = Literal[
  "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"
]

# Fields with module names as keys; a key means all modules whose path ends with it.
END = r"(.*\.)?({})$"
MERGE = "Merge the adapter with peft (model.merge_and_unload()) and load the model it gives."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
  """The fields that every kind has.

  A schema holds what a reader needs, as PEFT's config class has it (defaults too), and, with None
  for a default, the fields that do not matter for a trained adapter: initialisation, training,
  origin.
  """

  prefix: ClassVar[str] = "base_model.model."  # of the names of tensors

  peft_type: str
  task_type: TaskType | None = None
  modules_to_save: Names | None = None
  auto_mapping: Nested = None
  base_model_name_or_path: Text = None
  inference_mode: Flag = None
  peft_version: Text = None
  revision: Text = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targeted(Common):
  """Adapters in modules, which `target_modules` and its exceptions name."""

  target_modules: Names | Name | None = None
  exclude_modules: Names | Name | None = None
  layers_to_transform: list[Count] | Count | None = None
  layers_pattern: Names | Name | None = None
  fan_in_fan_out: Flag = None  # peft looks at the module


class Want(NamedTuple):
  """A tensor that must, or may, be in the file."""

  shape: tuple[int, ...]
  hint: str = ""
  needed: bool = True


class Module(NamedTuple):
  """A linear layer, or a table, of the torch model; its kernel here is `[n_in, n_out]`."""

  name: str
  kind: str  # "kernel" or "embedding"
  n_in: int
  n_out: int


class Adapter(NamedTuple):
  """The adapter of one module, to be written.

  Attributes:
    tensors: tensors by their names after the module's.
    fields: fields of the config, if this module were the only one.
    note: data for `Codec.finish`.
  """

  tensors: dict[str, np.ndarray]
  fields: dict[str, Any]
  note: Any = None


@dataclasses.dataclass(frozen=True)
class Source:
  """The data in a directory for one parameter, a kernel or a table `[*stack, n_in, n_out]`.

  Attributes:
    path, leaf: the parameter, without an adapter.
    stack: its layers; `()` for a matrix.
    modules: one for each layer, in order; None for a layer without an adapter.
    config: typed by the codec's schema.
    matcher: matches patterns, within a bound of time.
    where: the config's file, for errors.
    tensor: `tensor(module, name)` reads a tensor that `Codec.wants`, as float32.
  """

  path: str
  leaf: Any
  stack: tuple[int, ...]
  modules: Sequence[Module | None]
  config: Any
  matcher: Any
  where: str
  tensor: Callable[[Module, str], np.ndarray]

  def rows(self, name: str, without: np.ndarray) -> Any:
    """One tensor of every layer, `[*stack, ...]`; `without` for a layer without an adapter."""
    found = [without if m is None else self.tensor(m, name) for m in self.modules]
    return jnp.asarray(np.stack(found).reshape(*self.stack, *without.shape))


class Codec:
  """Reads and writes one kind of adapter; a subclass says how, and a method names an instance."""

  # Its name in PEFT, its leaf here, and the fields of its config.
  kind: ClassVar[str]
  leaf: ClassVar[type[Weight]]
  schema: ClassVar[type[Targeted]]
  # Last parts of the paths that `read` is called for.
  reads: ClassVar[frozenset[str]] = frozenset({"kernel"})
  # Fields that make more of an adapter than its tensors say, unless they have one of these values.
  fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
  # Fields of the schema's parents that this kind does not have.
  lacks: ClassVar[tuple[str, ...]] = ()
  # Fields that may differ by module, and the field that has the exceptions by `END`.
  exceptions: ClassVar[Mapping[str, str]] = {}
  # Whether peft reads such adapters of experts, which all have the config's own fields then.
  of_experts: ClassVar[bool] = False
  # Fields that are always written.
  constants: ClassVar[Mapping[str, Any]] = {}

  def takes(self, config: Any) -> bool:
    """Tells whether a config of this `kind` means this leaf."""
    return True

  def check(self, config: Any, where: str) -> None:
    """Raises ValueError if the fields contradict each other, or ask for what is not read."""

  def check_modules(self, config: Any, targets: Collection[str], where: str) -> None:
    """Raises ValueError if the fields name modules that are not targets."""

  def wants(self, config: Any, module: Module, matcher: Any) -> dict[str, Want]:
    """The tensors of a module, by their names after the module's."""
    raise NotImplementedError

  def wants_shared(self, config: Any, modules: Sequence[Module]) -> dict[str, Want]:
    """The tensors that all modules share, by whole names."""
    return {}

  def read(self, source: Source) -> Any:
    """The parameter with its adapter."""
    raise NotImplementedError

  def read_shared(self, config: Any, tensor: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """The nodes that weights share, by name."""
    return {}

  def write(self, path: str, leaf: Any, *, rslora: bool) -> dict[str, Adapter]:
    """The adapters of a leaf by the path of their layer, as in `paths.layer_paths`.

    Args:
      rslora: write scales as α/√r, where the kind can say so.

    Raises:
      ValueError: if PEFT has no such adapter.
    """
    raise NotImplementedError

  def write_shared(self, leaves: Sequence[Any], nodes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of shared nodes, by whole names."""
    return {}

  def together(self, adapters: Mapping[str, Adapter]) -> Mapping[str, Adapter]:
    """The adapters by module, made equal in everything that a directory has only once."""
    return adapters

  def finish(
    self,
    config: dict[str, Any],
    adapters: Mapping[str, Adapter],
    names: Callable[[set[str]], list[str]],
  ) -> dict[str, Any]:
    """The config with the fields that only this kind has.

    Args:
      names: names of modules, as in `target_modules`.
    """
    return config


def padded(arrays: Sequence[np.ndarray], stack: tuple[int, ...], axis: int) -> Any:
  """Arrays of layers as one, `[*stack, ...]`, each with zeros up to the largest along `axis`."""
  width = max(x.shape[axis] for x in arrays)

  def pad(x: np.ndarray) -> np.ndarray:
    more = [(0, 0)] * x.ndim
    more[axis] = (0, width - x.shape[axis])
    return np.pad(x, more)

  rows = np.stack([pad(np.asarray(x)) for x in arrays])
  return jnp.asarray(rows.reshape(*stack, *rows.shape[1:]))


def layers(path: str, stack: tuple[int, ...], *arrays: Any) -> list[tuple[Any, ...]]:
  """A `(path, slice, slice, ...)` for each layer of arrays `[*stack, ...]`."""
  flat = [np.asarray(x).reshape(math.prod(stack), *x.shape[len(stack) :]) for x in arrays]
  return list(zip(paths.layer_paths(path, stack), *flat, strict=True))


def alpha(scale: Any, divisor: float) -> float:
  """The shortest decimal α with float32(α / divisor) = scale."""
  exact = float(scale) * divisor
  tries = (float(f"{exact:.{digits}g}") for digits in range(1, 18))
  found = next((x for x in tries if np.float32(x / divisor) == scale), exact)
  return int(found) if found == round(found) else found
