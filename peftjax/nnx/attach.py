"""`attach`: a method on the parameters of an NNX model, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.core import paths, probe, shared
from peftjax.core.adapted import lender
from peftjax.core.attachment import attachments
from peftjax.core.factored import traced
from peftjax.core.layout import Layout
from peftjax.core.view import Uses
from peftjax.core.weight import Weight
from peftjax.methods.adapters import AdaptersMethod
from peftjax.methods.base import Chain, Method
from peftjax.methods.prefix import PrefixMethod
from peftjax.methods.prompt import PromptMethod
from peftjax.nnx.adapted import adapt
from peftjax.nnx.held import SUFFIX, Held, Trained
from peftjax.nnx.layout import layout as layout_of
from peftjax.nnx.parameters import check_model, held_in, is_common, params, write
from peftjax.quant import transform
from peftjax.quant.formats import Format


def attach(
  key: jax.Array | nnx.Rngs,
  model: nnx.Module,
  method: Method,
  *inputs: Any,
  layout: Layout | None = None,
  quant: Format | None = None,
  where: str | Sequence[str] = "all-linear",
  read: Callable[[str], Any] | None = None,
) -> nnx.Module:
  """Adapts a model in place: outputs stay as they were, and trained arrays are `Trained`.

  Every module that owns a targeted `nnx.Param` becomes an instance of a subclass of its own class
  that computes with the factors. The parameter stays where it is, frozen; the method's arrays lie
  beside it, `kernel_adapter` beside `kernel`. A quantised parameter is replaced.

  "all-linear" names every kernel, whatever its name, that the model multiplies by: those of
  `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum`, and parameters of a module's own; no tables, no
  convolutions, no top-level head.

  Args:
    key: folded with each parameter's path; of `nnx.Rngs`, the next key of its stream `params`. The
      dropout of adapters draws from it too, anew at every call while `model.train()` holds.
    model: any NNX module, concrete or abstract (`nnx.eval_shape`).
    method: LoRA and its kin, VeRA, IA3, `pj.unfreeze`, or a chain of those.
    *inputs: the inputs of one call of the model, to find the axes of its kernels; may be abstract.
    layout: instead of them, the result of `pj.nnx.layout(model, ...)`.
    quant: the format of the base, for QLoRA.
    where: the parameters to quantise, written as targets are.
    read: function from a path such as "layers/0/attn/kernel" to that array, for an abstract model:
      each is quantised as it comes, so the dense model is never there.

  Returns:
    The model.

  Raises:
    ValueError: before the model is changed: neither inputs nor a layout; no NNX module; a method
      that lies beside modules (`pj.adapters`, `pj.prefix`, `pj.prompt`); a target in a list or
      dict, in several modules, or read by another module than its own; and all that the method or
      the format refuses.
  """
  check_model(model)
  _check_method(method)
  if (layout is None) == (not inputs):
    raise ValueError(
      "pj.nnx.attach finds the axes of kernels by tracing the model; write either example inputs, "
      "pj.nnx.attach(key, model, method, x), or layout=pj.nnx.layout(model, x)"
    )
  if quant is None and where != "all-linear":
    raise ValueError(f"where={where!r} says what is quantised; write quant=pj.quant.nf4() too")
  layout = layout_of(model, *inputs) if layout is None else layout
  key = key.params() if isinstance(key, nnx.Rngs) else key
  given = params(model)
  try:
    tree = _base(given, layout, quant, where, read)
    tree = method.attach(key, tree, layout)
  except ValueError as error:
    said = str(error).replace("pj.merge(params)", "pj.nnx.merge(model)")
    raise ValueError(f"{said}{_about_arrays(model)}") from None
  mask = method.trainable(tree)
  _check_owners(model, given, tree)
  undo = _undo(model)
  try:
    _install(model, given, tree, mask, jax.random.fold_in(key, 1))
    if inputs:
      _check_used(model, inputs, layout)
  except BaseException:
    undo()
    raise
  return model


def _check_method(method: Any) -> None:
  if not isinstance(method, Method):
    raise ValueError(f"{method!r} is no method; write e.g. pj.lora(rank=8, targets='all-linear')")
  for one in method.methods if isinstance(method, Chain) else (method,):
    if isinstance(one, AdaptersMethod | PrefixMethod | PromptMethod):
      name = type(one).__name__.removesuffix("Method").lower()
      raise ValueError(
        f"pj.{name} lies beside modules, which NNX models have no place for; write pj.lora, pj.ia3 "
        "or another method that changes weights"
      )


def _base(tree: Any, layout: Layout, fmt: Format | None, where: Any, read: Any) -> Any:
  """The parameters, read if they are to be, and quantised one by one."""
  flat = paths.leaves(tree)
  chosen = [] if fmt is None else paths.select(tree, where, arrays=True, layout=layout)
  axes = {path: transform.check(path, flat[path], fmt, layout) for path in chosen if fmt}

  def of(path: str, leaf: Any) -> Any:
    if read is not None and not isinstance(leaf, Weight):
      array = read(path)
      if tuple(array.shape) != tuple(leaf.shape):
        raise ValueError(f"{path}: read gave {tuple(array.shape)}, the model has {leaf.shape}")
      leaf = jnp.asarray(array, leaf.dtype)
    if fmt is None or path not in axes:
      return leaf
    return transform.quantize_kernel(path, leaf, fmt, axes[path])

  return paths.map_leaves(of, tree)


def _about_arrays(model: nnx.Module) -> str:
  """A hint about arrays that are in no variable."""
  state = nnx.to_flat_state(nnx.state(model))
  bare = ["/".join(map(str, path)) for path, x in state if not isinstance(x, nnx.Variable)]
  if not bare:
    return ""
  return (
    f"\n{bare[0]} is an array and no nnx.Param, which cannot be adapted; write nnx.Param(array)"
  )


def _changed(given: Any, tree: Any) -> dict[str, Any]:
  """The weights that a method or a format put in place of something else, by path."""
  before = paths.leaves(given)
  after = paths.leaves(tree)
  return {p: x for p, x in after.items() if isinstance(x, Weight) and x is not before.get(p)}


def _check_owners(model: nnx.Module, given: Any, tree: Any) -> None:
  """Raises ValueError if a weight has no module of its own, or is no weight at all."""
  if attachments(tree):
    raise ValueError("this method lies beside modules, which NNX models have no place for")
  owners: dict[int, list[Any]] = {}
  for at, module in nnx.iter_modules(model):
    for name, x in vars(module).items():
      if isinstance(x, nnx.Variable):
        owners.setdefault(id(x), []).append(("/".join(map(str, (*at, name))), module))
  by_path = {path: found for found in owners.values() for path, _ in found}
  for path in _changed(given, tree):
    found = by_path.get(path, [])
    if not found or isinstance(found[0][1], nnx.List | nnx.Dict):
      raise ValueError(
        f"{path} lies in a list or dict and in no module of its own, which would compute with it; "
        "make it an attribute of a module, or leave it out of the targets"
      )
    if len(found) > 1:
      also = next(other for other, _ in found if other != path)
      raise ValueError(
        f"{path} and {also} are one variable of two modules, and an adapter would change the first "
        "alone; give the second an nnx.Param of its own, or leave both out of the targets"
      )


def _install(model: nnx.Module, given: Any, tree: Any, mask: Any, key: jax.Array) -> None:
  """Writes to the model whatever differs in the tree."""
  modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
  before, flags, new = paths.leaves(given), paths.leaves(mask), _changed(given, tree)
  common = _common(model, tree)
  for path, leaf in paths.leaves(shared.without(tree)).items():
    head, _, name = path.rpartition("/")
    module = modules[head]
    if path in new:
      held = Held(path, leaf, flags[path], key, common.get(lender(leaf)))
      if not held.form.around:
        delattr(module, name)
      elif leaf.base is not before[path]:
        write(module, name, leaf.base)
      setattr(module, f"{name}{SUFFIX}", held)
      adapt(module)
    elif not isinstance(leaf, Weight) and (flags[path] or leaf is not before[path]):
      write(module, _key(module, name), leaf, Trained if flags[path] else None)


def _common(model: nnx.Module, tree: Any) -> dict[str, Held]:
  """The shared nodes of a tree by path, as the model then holds them."""
  found = {held.path: held for held in held_in(model).values() if is_common(held)}
  for path, node in shared.nodes(tree).items():
    if path not in found:
      found[path] = Held(path, node, jax.tree.map(lambda _: False, node))
      setattr(model, path.replace("/", "_"), found[path])
  return found


def _key(module: nnx.Module, name: str) -> Any:
  """The key of a parameter in a module: a number in a list."""
  return int(name) if isinstance(module, nnx.List) else name


def _undo(model: nnx.Module) -> Callable[[], None]:
  """A function that restores the model to its present state."""
  modules = [(x, type(x), dict(vars(x))) for _, x in nnx.iter_modules(model)]
  state = [(x, x.get_raw_value()) for _, x in nnx.iter_graph(model) if isinstance(x, nnx.Variable)]

  def undo() -> None:
    for module, cls, attributes in modules:
      object.__setattr__(module, "__class__", cls)
      vars(module).clear()
      vars(module).update(attributes)
    for variable, value in state:
      variable.set_raw_value(value)

  return undo


def _check_used(model: nnx.Module, inputs: Any, layout: Layout) -> None:
  """Raises ValueError if another module than its own reads an adapted parameter."""
  held = {path: x for path, x in held_in(model).items() if x.path in layout}
  graph, state = nnx.split(model)
  flat = dict(nnx.to_flat_state(state))
  trained = {
    "/".join(map(str, p)): p for p, x in flat.items() if isinstance(x, Trained) and p[:-1] in held
  }
  uses = Uses()

  def run(arrays: Any, rest: Any, inputs: Any) -> Any:
    given = {path: flat[path].replace(arrays[name]) for name, path in trained.items()}
    whole = {**dict(nnx.to_flat_state(rest)), **given}
    return nnx.merge(graph, nnx.from_flat_state(whole))(*inputs)

  def seen(arrays: Any, rest: Any, inputs: Any) -> None:
    traced(run, uses, {name: _Seen(x) for name, x in arrays.items()}, rest, inputs)

  rest = nnx.from_flat_state({p: x for p, x in flat.items() if p not in trained.values()})
  probe.shapes(seen, {name: flat[path].get_value() for name, path in trained.items()}, rest, inputs)
  used = {trained[name][:-1] for name in uses.by_path}
  unused = [held[path].path for path in {p[:-1] for p in trained.values()} - used]
  if unused:
    raise ValueError(
      f"{unused[0]} is read by another module than the one that it lies in, which would skip its "
      "adapter; leave it out of the targets"
    )


class _Seen(Weight):
  """An array that notes whether it is used."""

  array: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.array.shape)

  @property
  def dtype(self) -> Any:
    return self.array.dtype

  def materialize(self) -> jax.Array:
    return self.array
