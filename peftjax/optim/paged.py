"""Optimizer state in host memory, which visits the device leaf by leaf."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


class Page(flax.struct.PyTreeNode):
  """The optimizer state of one array: the leaves of `tx.init` on a tree of that array alone.

  Scalars, like a step count, are on the device, everything else in `pinned_host`.
  """

  arrays: tuple[Any, ...]


def paged(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`tx` with its state in host memory; an update brings it to the device one leaf at a time.

  The numbers are those of `tx`. The device holds the state of one leaf in place of all, so AdamW
  saves eight bytes a trained parameter, and every update moves them to the device and back. That
  pays for full fine-tuning; the state of LoRA itself is too small to matter. (QLoRA, Dettmers et
  al. 2023, arXiv 2305.14314, section 3, pages between GPU and CPU on demand; XLA allocates ahead,
  so here the visits are part of the program.)

  The state has the structure of the parameters with a `Page` for every array. `tx` sees the
  parameters with `None` for all leaves but one, under their own paths: masks, schedules and labels
  work. What has to see all leaves at once would be wrong: clip by the global norm outside, with
  `optim.wrap(paged(tx), clip_norm=1.0, accumulate=1)`.

  Raises:
    ValueError: in `init`, if in `tx` the gradient of one leaf moves another.
  """
  tx = optax.with_extra_args_support(tx)

  def init(params: Any) -> Any:
    leaves, tree = jax.tree.flatten(params)
    _check_apart(tx, leaves, tree)
    states = [tx.init(_alone(tree, i, leaf)) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, [Page(_move(tuple(jax.tree.leaves(s)), _HOST)) for s in states])

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    grads, tree = jax.tree.flatten(updates)
    pages = tree.flatten_up_to(state)
    weights = grads if params is None else tree.flatten_up_to(params)
    new, kept, token = [], [], ()
    for i, (grad, page, weight) in enumerate(zip(grads, pages, weights, strict=True)):
      # Without the token the compiler starts every transfer at once, and all of the state is there.
      arrays, grad, token = jax.lax.optimization_barrier((page.arrays, grad, token))
      alone = _alone(tree, i, weight)
      inner = jax.tree.structure(jax.eval_shape(tx.init, alone))
      visiting = inner.unflatten(_move(arrays, _DEVICE))
      own = None if params is None else alone
      out, visited = tx.update(_alone(tree, i, grad), visiting, own, **extra)
      leaving = _move(tuple(jax.tree.leaves(visited)), _HOST)
      token = leaving
      new.append(tree.flatten_up_to(out)[i])
      kept.append(Page(leaving))
    return jax.tree.unflatten(tree, new), jax.tree.unflatten(tree, kept)

  return optax.GradientTransformationExtraArgs(init, update)


def decide_paging(
  compiled: Any, device: jax.Device, device_memory_bytes: int | None = None
) -> tuple[bool, str]:
  """Whether the optimizer state has to be paged for a train step to fit, and why, to be logged.

      needed = arguments + outputs − aliased + temporaries + code > memory of the device

  in bytes of device memory. Worth asking for full fine-tuning: with LoRA alone the state is too
  small to matter, and paging it would not make a step fit.

  Args:
    compiled: the train step without paging, `jax.jit(step).lower(...).compile()`.
    device: one that it runs on; its `memory_stats()["bytes_limit"]` counts where it is reported.
    device_memory_bytes: counts where it is not. With neither, nothing is paged.
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


def _alone(tree: Any, i: int, leaf: Any) -> Any:
  """The tree with `None` for every leaf but the i-th."""
  return jax.tree.unflatten(tree, [leaf if j == i else None for j in range(tree.num_leaves)])


def _move(arrays: tuple[Any, ...], space: jax.memory.Space) -> tuple[Any, ...]:
  return tuple(jax.device_put(x, space) if x.ndim else x for x in arrays)


def _check_apart(tx: Any, leaves: list[Any], tree: Any) -> None:
  """Updates miniatures of all leaves, one with a gradient that is not a number: does it spread?"""
  if len(leaves) < 2:
    return
  with jax.ensure_compile_time_eval(), jax.debug_nans(False):
    small = [jnp.ones((1,) * x.ndim, x.dtype) for x in leaves]
    grads = jax.tree.unflatten(tree, [small[0] * jnp.nan, *small[1:]])
    out, _ = tx.update(grads, tx.init(jax.tree.unflatten(tree, small)), jax.tree.unflatten(tree, small))
    others = jax.tree.leaves(tree.flatten_up_to(out)[1:])
    spread = any(bool(jnp.isnan(x).any()) for x in others)
  if spread:
    raise ValueError(
      "paged(tx) updates one leaf after the other, but in this tx the gradient of one leaf moves "
      "another, as in optax.clip_by_global_norm. Take that out of tx and write "
      "optim.wrap(optim.paged(tx), clip_norm=..., accumulate=1)."
    )
