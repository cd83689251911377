"""Optimizer state in host memory, which visits the device leaf by leaf."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from peftjax.core import paths
from peftjax.optim.lazy import Lazy, opened

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def paged(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`tx` with its state in host memory; an update brings it to the device one leaf at a time.

  The numbers are those of `tx`, and so is the structure of the state; its arrays, scalars
  excepted, are in `pinned_host`. Inside jit the state visits the device leaf by leaf, and every
  update moves it there and back. Of AdamW's eight bytes per trained parameter, a step of
  SmolLM2-135M then needs five less on a TPU, whose compiler holds copies of the largest leaves.
  That pays for full fine-tuning; the state of LoRA itself is too small to matter.
  (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3, pages between GPU and CPU on demand;
  XLA plans memory ahead, so here the visits are part of the program.)

  A transform that has to see all leaves at once cannot be paged. Clip by the global norm outside:
  `optim.wrap(paged(tx), clip_norm=1.0, accumulate=1)`.

  Raises:
    ValueError: in `update`, if in `tx` the gradient of one leaf moves another.
  """
  tx = optax.with_extra_args_support(tx)

  def init(params: Any) -> Any:
    return jax.tree.map(lambda x: _move(x, _HOST), tx.init(params))

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    if not jax.tree.leaves(updates):
      return tx.update(updates, state, params, **extra)
    return _update(lambda u, s, p: tx.update(u, s, p, **extra), updates, state, params)

  return optax.GradientTransformationExtraArgs(init, update)


def decide_paging(
  compiled: Any, device: jax.Device, device_memory_bytes: int | None = None
) -> tuple[bool, str]:
  """Tells whether the optimizer state must be paged for a train step to fit, and why, to be logged.

      needed = arguments + outputs − aliased + temporaries + code > memory of the device

  in bytes of device memory. Worth asking for full fine-tuning: with LoRA alone the state is too
  small to matter, and paging it would not make a step fit.

  Args:
    compiled: the train step without paging, `jax.jit(step).lower(...).compile()`.
    device: one that it runs on; its `memory_stats()["bytes_limit"]` counts where it is reported.
    device_memory_bytes: counts where the device does not report it. With neither, nothing is paged.
  """
  stats = compiled.memory_analysis()
  limit = (device.memory_stats() or {}).get("bytes_limit", device_memory_bytes)
  if stats is None or limit is None:
    missing = "the compiler reports no memory use" if stats is None else "its size is not reported"
    return False, f"not paged: {missing} for {device.device_kind}; pass device_memory_bytes"
  needed = (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes
    + stats.generated_code_size_in_bytes
  )
  page = needed > limit
  verb = "paged: the step would need" if page else "not paged: the step needs"
  return page, f"{verb} {needed / 2**30:.2f} of {limit / 2**30:.2f} GiB on {device.device_kind}"


def _update(fn: Any, updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
  """`fn(updates, state, params)`: its own equations, in an order that needs little memory."""
  here = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # as if all were on the device
  program, out = jax.make_jaxpr(fn, return_shape=True)(
    *jax.tree.map(here, (updates, state, params))
  )
  grads, pages = jax.tree.leaves(updates), jax.tree.leaves(state)
  n = len(grads)
  values = Lazy(opened(program), [*grads, *pages, *jax.tree.leaves(params)])
  away = {i for i, page in enumerate(pages, n) if page.ndim}
  results: dict[int, Any] = {}
  # Nothing is fetched before all gradients are there: the backward pass needs the memory itself.
  token = sum(map(_sum, grads))
  for outputs in _by_leaf(values, updates, len(jax.tree.leaves(out))):
    wanted = sorted(away & set[int]().union(*map(values.needs, outputs)))
    away -= set(wanted)
    values.inputs |= _fetch({i: pages[i - n] for i in wanted}, token)
    made = {o: values.output(o) for o in outputs}
    places = {o: grads[o] if o < n else pages[o - n] for o in outputs}
    made |= _evict({o for o in outputs if o >= n and made[o].ndim}, made, places, token)
    token = sum((_sum(made[o]) for o in outputs if o < n), token)
    results |= made
  leaves = [results[o] for o in range(len(results))]
  return jax.tree.unflatten(jax.tree.structure(out), leaves)


def _by_leaf(values: Lazy, updates: Any, outputs: int) -> list[list[int]]:
  """The numbers of the outputs, grouped by the leaf whose gradient they depend on.

  Small leaves first: by the time of the largest, most gradients are gone.
  """
  names = [paths.name(path) for path, _ in jax.tree_util.tree_leaves_with_path(updates)]
  groups: dict[Any, list[int]] = {}
  for output in range(outputs):
    leaves = [names[i] for i in values.needs(output) if i < len(names)]
    if len(leaves) > 1:
      raise ValueError(
        f"paged(tx) updates one leaf after the other, but in this tx {leaves[0]} and {leaves[1]} "
        "move together, as in optax.clip_by_global_norm. Take that out of tx and write "
        "optim.wrap(optim.paged(tx), clip_norm=..., accumulate=1)."
      )
    groups.setdefault(leaves[0] if leaves else output, []).append(output)
  return sorted(groups.values(), key=lambda outputs: values.size(outputs[0]))


def _fetch(pages: dict[int, Any], token: Any) -> dict[int, Any]:
  """Copies on the device, made once the token is known."""
  blank = {i: jnp.zeros(x.shape, x.dtype) for i, x in pages.items()}
  fetched = lambda *_: {i: _move(x, _DEVICE) for i, x in pages.items()}
  return jax.lax.fori_loop(0, _once(token), fetched, blank) if pages else {}


def _evict(
  leaving: set[int], made: dict[int, Any], places: dict[int, Any], token: Any
) -> dict[int, Any]:
  """`made`, with those of `leaving` in host memory, and the others not before that is done.

  `places` are arrays of the same shapes that nothing needs any more.
  """
  places = {o: places[o].astype(x.dtype) for o, x in made.items()}
  moved = lambda *_: {o: _move(x, _HOST) if o in leaving else x for o, x in made.items()}
  return jax.lax.fori_loop(0, _once(token), moved, places) if leaving else made


def _once(token: Any) -> Any:
  """The number 1, which the compiler cannot know before it has the token.

  Copies in a loop of so many rounds start and end within it. Without the loop it starts them all as
  early, and ends them as late, as it can, and `optimization_barrier` does not stop it: barriers are
  gone when it schedules.
  """
  return ((token < 1) | ~(token < 0)).astype(jnp.int32)  # for a NaN too


def _sum(x: Any) -> Any:
  return x.sum().astype(jnp.float32)


def _move(x: Any, space: Any) -> Any:
  return jax.device_put(x, space) if x.ndim else x
