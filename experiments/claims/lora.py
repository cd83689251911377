"""Claims on LoRA's algebra: its counts, its shapes, its two ways to compute, its low rank."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import peftjax as pj
from experiments import timing
from experiments.claims import runs, sample_models
from experiments.claims.claim import CORRECTED, HOLDS, Finding, by_test, claim, found
from peftjax.core import paths


@functools.cache
def example() -> tuple[Any, Any]:
  """A 4096 x 4096 kernel with LoRA of rank 8, abstract, and its trained part."""
  params = {"layer": {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}}
  method = pj.lora(rank=8, targets=["layer"])
  params = method.attach(jax.random.key(0), params)
  return params, method.trainable(params)


@claim(
  says="Of a 4096 x 4096 matrix, 16.77 M parameters, LoRA of rank 8 trains r(d + k), some 65 k:"
  " over 99.5 % fewer.",
  measured_by="pj.lora attached to such a kernel, counted",
  holds_if="65,536 of 16,777,216, and over 99.5 % fewer",
  expected=HOLDS,
)
def parameter_count() -> Finding:
  params, mask = example()
  trained = pj.count(params, mask)
  whole = pj.count(params) - trained
  fewer = 100 * (1 - trained / whole)
  return found(
    {"trained": trained, "of": whole, "% fewer": fewer},
    holds=(trained, whole) == (65_536, 16_777_216) and fewer > 99.5,
  )


@claim(
  says="r(d + k) is far less than d k.",
  measured_by="the share r(d + k) / (d k) on MiniLM's query (384 x 384) at r = 4, 64, 192 and 384",
  holds_if="under 5 % at r = 4 and rising with r; break-even is at r = dk/(d + k)",
  expected=HOLDS,
)
def break_even() -> Finding:
  params = {"query": {"kernel": jax.ShapeDtypeStruct((384, 384), jnp.float32)}}
  share = {}
  for rank in (4, 64, 192, 384):
    method = pj.lora(rank=rank, targets=["query"])
    attached = method.attach(jax.random.key(0), params)
    trained = pj.count(attached, method.trainable(attached))
    share[f"r = {rank}"] = trained / (384 * 384)
  values = list(share.values())
  return found(share, holds=values[0] < 0.05 and values == sorted(values))


@claim(
  says="A is d x r and B is r x k (short answer); A is r x k and B is d x r (long answer). ΔW = B A"
  " is d x k.",
  measured_by="jax.eval_shape of B A under both conventions, d = 48, k = 32, r = 4",
  holds_if="both multiply to d x k; mended if one does, and our factors have it",
  expected=CORRECTED,
)
def shape_convention() -> Finding:
  d, k, r = 48, 32, 4
  fits = {
    "short answer fits": _product((r, k), (d, r)) == (d, k),
    "long answer fits": _product((d, r), (r, k)) == (d, k),
  }
  method = pj.lora(rank=r, targets=["kernel"])
  leaf = method.attach(jax.random.key(0), {"kernel": jnp.zeros((k, d))})["kernel"]
  ours = leaf.b.shape == (d, r) and leaf.a.shape == (r, k)
  return found(
    {**fits, "our factors are the long answer's": ours},
    holds=all(fits.values()),
    mended=fits["long answer fits"] and ours,
    correction="only the long answer's: A [r, k], B [d, r]; the short one's would have to be A B",
  )


def _product(b: tuple[int, int], a: tuple[int, int]) -> tuple[int, ...] | None:
  """The shape of B A, None where they do not multiply."""
  shape = lambda s: jax.ShapeDtypeStruct(s, jnp.float32)
  try:
    return jax.eval_shape(jnp.matmul, shape(b), shape(a)).shape
  except TypeError:
    return None


two_ways = by_test(
  "lora.two_ways",
  says="h = W0 x + B A x is h = (W0 + B A) x.",
  tests=("tests/methods/lora_test.py::test_einsum_equals_that_of_the_dense_array_and_builds_none",),
)


@claim(
  says="What full fine-tuning changes has a low intrinsic rank.",
  measured_by="MiniLM fine-tuned in full: share of ‖ΔW‖² in its 8 largest singular values, median"
  " over the 37 matrices, beside W's own and a random matrix'; and what of the 37 ΔW's worth is"
  " left if all are cut to rank 8: (loss without them − loss cut) / (loss without − loss), test",
  holds_if="over 90 % of ‖ΔW‖² and over 90 % of the worth; mended if of the worth",
  expected=CORRECTED,
)
def low_rank_change() -> Finding:
  before, after = sample_models.minilm()[1], runs.minilm("full").params
  old, new = paths.leaves(before), paths.leaves(after)
  shares: dict[str, list[float]] = {"ΔW": [], "W": [], "random": []}
  cut = {}
  for path in pj.tree.select(before, "all-linear"):
    u, s, vt = np.linalg.svd(np.asarray(new[path] - old[path]), full_matrices=False)
    cut[path] = old[path] + (u[:, :8] * s[:8]) @ vt[:8]
    noise = np.random.default_rng(0).normal(size=old[path].shape)
    values = lambda matrix: np.linalg.svd(matrix, compute_uv=False)
    for name, spectrum in (("ΔW", s), ("W", values(old[path])), ("random", values(noise))):
      shares[name].append((spectrum[:8] ** 2).sum() / (spectrum**2).sum())
  share = {f"share, {name}": float(np.median(own)) for name, own in shares.items()}
  changed = lambda put: paths.map_leaves(lambda path, leaf: put.get(path, leaf), after)
  puts: tuple[dict[str, Any], ...] = ({}, cut, {path: old[path] for path in cut})
  whole, low, none = (float(runs.losses(changed(put)).mean()) for put in puts)
  kept = (none - low) / (none - whole)
  return found(
    {**share, "loss": whole, "rank 8": low, "without": none, "worth kept": kept},
    holds=share["share, ΔW"] > 0.9 and kept > 0.9,
    mended=kept > 0.9,
    correction="ΔW itself is far from rank 8, but its first 8 directions are all the task needs",
  )


frozen_base = by_test(
  "lora.frozen_base",
  says="LoRA computes gradients for A and B alone: the frozen weights have none.",
  tests=(
    "tests/method_contract_test.py::test_law_4_exactly_what_is_trained_has_a_gradient",
    "tests/method_contract_test.py::test_law_5_combine_undoes_partition_and_a_step_keeps_the_structure",
  ),
)


@claim(
  says="LoRA greatly lowers the computing power and the memory that training takes.",
  measured_by="what the compiler counts for one step of MiniLM, 16 x 32 tokens, LoRA (r = 4, query"
  " and value) over full fine-tuning: operations, and memory of arguments and temporaries. Time and"
  " bytes of gradients and optimizer state are shown",
  holds_if="operations and memory both under 0.5; mended if one of them is",
  expected=CORRECTED,
)
def cheaper_steps() -> Finding:
  method = runs.METHODS["small"]()
  params = method.attach(jax.random.key(0), sample_models.minilm()[1])
  lora, full = runs.training(params, method.trainable(params)), runs.full_training()
  operations = lora.cost.flops / full.cost.flops
  memory = lora.cost.memory / full.cost.memory
  times = timing.medians([lora.step, full.step], turns=5, uncounted=1)
  return found(
    {
      "operations": operations,
      "memory": memory,
      "time": times[0] / times[1],
      "gradients and state": lora.state / full.state,
    },
    holds=max(operations, memory) < 0.5,
    mended=min(operations, memory) < 0.5,
    correction="memory, yes; of the operations a third goes, for the forward pass and the"
    " activations' gradients stay",
  )


@claim(
  says="An adapter is stored in place of a copy of the model.",
  measured_by="bytes of MiniLM's LoRA (r = 4, query and value) over those of the model",
  holds_if="under 1 %",
  expected=HOLDS,
)
def small_files() -> Finding:
  method = runs.METHODS["small"]()
  params = method.attach(jax.random.key(0), sample_models.minilm()[1])
  adapter, base = pj.partition(params, pj.tree.adapter_mask(params, method.trainable(params)))
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  return found(
    {"adapter, KB": size(adapter) / 1e3, "model, KB": size(base) / 1e3},
    holds=size(adapter) < 0.01 * size(base),
  )


CLAIMS = (
  parameter_count,
  break_even,
  shape_convention,
  two_ways,
  low_rank_change,
  frozen_base,
  cheaper_steps,
  small_files,
)
