"""Claims on NF4 and double quantisation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

import peftjax as pj
from experiments.claims import results, sample_models
from experiments.claims.claim import CORRECTED, FAILS, HOLDS, Finding, claim, found
from peftjax.core import paths
from peftjax.quant import blockwise, codebooks
from peftjax.quant.formats import Format
from peftjax.quant.transform import quantize_leaf, relative_error

BLOCK = 64


@functools.cache
def normal_weights() -> jax.Array:
  return jax.random.normal(jax.random.key(0), (4096, 1024))


def error(fmt: str, weights: jax.Array, *, double_quant: bool = False) -> float:
  """‖W_q − W‖ / ‖W‖ in blocks of 64."""
  leaf = quantize_leaf("kernel", weights, Format(fmt, BLOCK, double_quant))
  return float(relative_error(leaf, weights))


@functools.cache
def shares(fmt: str) -> np.ndarray:
  """The share of each code on normal weights, `[16]`."""
  leaf = quantize_leaf("kernel", normal_weights(), Format(fmt, BLOCK, False))
  codes = blockwise.unpack(leaf.codes, leaf.axis)
  return np.bincount(np.asarray(codes).ravel(), minlength=16) / leaf.size


def entropy(fmt: str) -> float:
  """The entropy of the codes, in bits; 4 if all are used alike."""
  used = shares(fmt)[shares(fmt) > 0]
  return float(-(used * np.log2(used)).sum())


@functools.cache
def minilm_weights() -> list[jax.Array]:
  """The 37 linear kernels, which are true float32."""
  params = sample_models.minilm()[1]
  return [paths.leaves(params)[path] for path in pj.select(params, "all-linear")]


@claim(
  says="Pretrained weights are normal with mean zero.",
  measured_by="MiniLM's 37 matrices: |mean| over deviation and excess kurtosis (0 if normal),"
  " medians and extremes; and the kurtosis of one block of 64 after the other, each by its own"
  " deviation",
  holds_if="median |mean| under 0.02 and all kurtoses within 0.5 of 0; mended if their median is"
  " within 2",
  expected=CORRECTED,
)
def normal() -> Finding:
  means, kurtoses, blocks = [], [], []
  for kernel in minilm_weights():
    w = np.asarray(kernel, np.float64)
    means.append(abs(w.mean()) / w.std())
    kurtoses.append(_kurtosis(w.ravel()))
    parts = w.reshape(-1, BLOCK, w.shape[1])
    blocks.append(_kurtosis((parts / parts.std(1, keepdims=True)).ravel()))
  median = float(np.median(kurtoses))
  centred = np.median(means) < 0.02
  return found(
    {
      "|mean|/deviation": np.median(means),
      "kurtosis, median": median,
      "lowest": min(kurtoses),
      "highest": max(kurtoses),
      "within blocks": np.median(blocks),
    },
    holds=bool(centred) and max(map(abs, kurtoses)) < 0.5,
    mended=bool(centred) and abs(median) < 2,
    correction="centred, yes; the tails are heavier, in some matrices much",
  )


def _kurtosis(x: np.ndarray) -> float:
  z = (x - x.mean()) / x.std()
  return float((z**4).mean() - 3)


@claim(
  says="For normal weights NF4 is more exact than int4 and FP4.",
  measured_by="relative error in blocks of 64, 4 M draws of N(0, 1), and MiniLM's matrices (mean)",
  holds_if="NF4's is the least of the three on both",
  expected=HOLDS,
)
def nf4_best() -> Finding:
  numbers, wins = {}, []
  for name, weights in (("N(0, 1)", [normal_weights()]), ("MiniLM", minilm_weights())):
    off = {f: float(np.mean([error(f, w) for w in weights])) for f in ("nf4", "fp4", "int4")}
    numbers.update({f"{f}, {name}": value for f, value in off.items()})
    wins.append(off["nf4"] < min(off["fp4"], off["int4"]))
  return found(numbers, holds=all(wins))


@claim(
  says="NF4 is information-theoretically optimal for normal weights.",
  measured_by="entropy of its codes on N(0, 1) in blocks of 64 (4 bits if optimal); its error"
  " against that of Lloyd-Max levels and of sixteen equally likely bins",
  holds_if="over 3.99 bits, and no more error than Lloyd-Max; mended if over 3.99 bits",
  expected=FAILS,
)
def nf4_optimal() -> Finding:
  names = {"nf4": "NF4", "nf4_textbook": "equal bins", "lloyd_max": "Lloyd-Max"}
  bits = {f"bits, {label}": entropy(name) for name, label in names.items()}
  off = {f"error, {label}": error(name, normal_weights()) for name, label in names.items()}
  even = bits["bits, NF4"] > 3.99
  return found(
    {**bits, **off},
    holds=even and off["error, NF4"] <= off["error, Lloyd-Max"],
    mended=even,
    correction="codes are not equally likely once a block is divided by its largest entry, and"
    " other levels have less squared error; near the optimum, not at it",
  )


@claim(
  says="NF4 has sixteen equally likely bins of N(0, 1), each by its expected value.",
  measured_by="largest difference of these (`nf4_textbook`, rescaled to [-1, 1]) and the published"
  " sixteen numbers, and of int4's and FP4's; whether 0 is among them",
  holds_if="under 1e-3; mended if it is the same idea: nearer than int4 and FP4",
  expected=CORRECTED,
)
def quantiles() -> Finding:
  values = {name: np.sort(codebooks.four_bits(name)) for name in ("nf4", "int4", "fp4")}
  textbook = codebooks.four_bits("nf4_textbook")
  off = {name: float(np.abs(own - textbook).max()) for name, own in values.items()}
  return found(
    {
      **{f"largest difference, {name}": value for name, value in off.items()},
      "0 among the published": (values["nf4"] == 0).any(),
      "0 among the textbook's": (textbook == 0).any(),
    },
    holds=off["nf4"] < 1e-3,
    mended=off["nf4"] < min(off["int4"], off["fp4"]),
    correction="the published ones are averages of quantiles of 8 negative and 9 positive steps,"
    " with an exact 0; on equal bins the error is larger",
  )


@claim(
  says="NF4 is finer near 0 than in the tails.",
  measured_by="the narrowest step between neighbours and where it is, and the widest, of [-1, 1]",
  holds_if="the narrowest touches 0 and the widest an end",
  expected=HOLDS,
)
def finer_near_zero() -> Finding:
  values = codebooks.four_bits("nf4")
  gaps = np.diff(values)
  low, high = int(gaps.argmin()), int(gaps.argmax())
  touches = 0.0 in (values[low], values[low + 1])
  return found(
    {"narrowest": gaps[low], "widest": gaps[high], "beginning at": values[high]},
    holds=touches and (high == 0 or high == len(gaps) - 1),
  )


@claim(
  says="Uniform levels waste codes where there are few weights.",
  measured_by="use of the rarest eighth of the codes on N(0, 1) (1/8 if all alike) and code"
  " entropy, int4 and NF4",
  holds_if="int4's rarest eighth is used less than NF4's, and its entropy is lower",
  expected=HOLDS,
)
def uniform_wastes() -> Finding:
  rare = {name: float(np.sort(shares(name))[:2].sum()) for name in ("int4", "nf4")}
  bits = {name: entropy(name) for name in ("int4", "nf4")}
  return found(
    {f"{k}, rarest": v for k, v in rare.items()} | {f"{k}, bits": v for k, v in bits.items()},
    holds=rare["int4"] < rare["nf4"] and bits["int4"] < bits["nf4"],
  )


@claim(
  says="Four bits map weights to sixteen discrete integer points.",
  measured_by="how many of NF4's sixteen values times 7 are integers, and how many of its codes"
  " are",
  holds_if="all sixteen values lie on a grid; mended if the codes do",
  expected=CORRECTED,
)
def integer_points() -> Finding:
  values = codebooks.four_bits("nf4") * 7
  whole = int((values == np.round(values)).sum())
  leaf = quantize_leaf("kernel", normal_weights()[:64, :2], pj.quant.nf4(double_quant=False))
  integers = leaf.codes.dtype == jnp.uint8
  return found(
    {"values on the grid": whole, "codes are integers": integers},
    holds=whole == 16,
    mended=bool(integers),
    correction="the codes are integers; what they stand for is not evenly spaced",
  )


@claim(
  says="Double quantisation costs next to nothing in quality.",
  measured_by="error on N(0, 1) with and without; SmolLM2's perplexity on held-out news, from the"
  " committed results of the table datatypes",
  holds_if="both rise by less than 1 %",
  expected=HOLDS,
)
def double_is_cheap() -> Finding:
  once, twice = (error("nf4", normal_weights(), double_quant=double) for double in (False, True))
  rows = results.rows("datatypes")
  plain, double = (rows[f"smollm2-{name}-64"]["perplexity"] for name in ("nf4", "nf4-dq"))
  return found(
    {"error": once, "with DQ": twice, "perplexity": plain, "perplexity with DQ": double},
    holds=twice < 1.01 * once and double < 1.01 * plain,
  )


CLAIMS = (
  normal,
  nf4_best,
  nf4_optimal,
  quantiles,
  finer_near_zero,
  uniform_wastes,
  integer_points,
  double_is_cheap,
)
