"""The numbers that codes stand for, as NumPy constants.

Every codebook lies in [-1, 1]; a block of weights is divided by its largest magnitude to get there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

# NormalFloat: bitsandbytes' `create_normal_map`. Equation (4) of the QLoRA paper (Dettmers et al.
# 2023, arXiv 2305.14314) is infinite at its ends; these are the constants its authors publish.
_NF4 = (
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
)


def _nf4() -> np.ndarray:
  return np.array(_NF4, np.float32)


def _fp4_e2m1() -> np.ndarray:
  """bitsandbytes' FP4: sign, two exponent bits, one fraction bit, in its order of bit patterns."""
  magnitudes = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
  return np.concatenate([magnitudes, -magnitudes])


def _fp4_e3m0() -> np.ndarray:
  """Sign and three exponent bits: 0 and ±2⁻⁶, ..., ±1."""
  magnitudes = np.array([0, *(2.0**e for e in range(-6, 1))], np.float32)
  return np.concatenate([magnitudes, -magnitudes])


def _int4() -> np.ndarray:
  """(code − 8) / 7; code 0 is not used, as in every symmetric integer format."""
  return (np.arange(16, dtype=np.float32) - 8) / np.float32(7)


def _nf4_textbook() -> np.ndarray:
  """Sixteen bins of N(0, 1) of equal probability, each by its mean, rescaled to [-1, 1]."""
  from scipy.stats import norm

  edges = norm.ppf(np.linspace(0, 1, 17))
  means = -np.diff(norm.pdf(edges)) * 16  # E[x | a < x < b] = (φ(a) − φ(b)) / P(a < x < b)
  return (means / means[-1]).astype(np.float32)


def _lloyd_max() -> np.ndarray:
  """The sixteen levels of least squared error for N(0, 1) (Lloyd 1982), rescaled to [-1, 1]."""
  from scipy.stats import norm

  levels = np.linspace(-2.5, 2.5, 16)
  change = 1.0
  while change > 1e-12:
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    means = -np.diff(norm.pdf(edges)) / np.diff(norm.cdf(edges))
    change, levels = np.abs(means - levels).max(), means
  return (levels / levels[-1]).astype(np.float32)


FOUR_BITS: Mapping[str, Callable[[], np.ndarray]] = {
  "nf4": _nf4,
  "nf4_textbook": _nf4_textbook,
  "lloyd_max": _lloyd_max,
  "fp4": _fp4_e2m1,
  "fp4_e3m0": _fp4_e3m0,
  "int4": _int4,
}


@functools.cache
def four_bits(name: str) -> Float[np.ndarray, " 16"]:
  """float32 [16]: the value of each code, in the order of the codes."""
  return _frozen(FOUR_BITS[name]())


@functools.cache
def thresholds(name: str) -> tuple[np.ndarray, np.ndarray]:
  """The thresholds between values: the number of them below x is the rank of x among the values.

  Returns:
    float32 [K − 1], the midpoints of the K distinct values, and uint8 [K], the code of each rank.
    A value with two codes (FP4's −0) is written by the first.
  """
  values, codes = np.unique(four_bits(name) + np.float32(0.0), return_index=True)  # −0 + 0 is 0
  if name == "int4":
    values, codes = values[1:], codes[1:]
  return _frozen((values[1:] + values[:-1]) / np.float32(2)), _frozen(codes.astype(np.uint8))


@functools.cache
def dynamic_map(signed: bool = True) -> Float[np.ndarray, " 256"]:
  """float32 [256], ascending: bitsandbytes' dynamic 8-bit map.

  Seven decades, 10⁻⁶ to 1, the i-th with 2^i midpoints of equal steps on [0.1, 1] for either sign
  (2^(i+1) if unsigned), and 0 and 1 (Dettmers 2016, arXiv 1511.04561; Dettmers et al. 2022,
  arXiv 2110.02861, section 1.3). There is no −1.
  """
  data = [0.0, 1.0]
  for i in range(7):
    edges = _linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
    means = np.float32(10.0 ** (i - 6)) * ((edges[1:] + edges[:-1]) / np.float32(2))
    data += means.tolist() + ((-means).tolist() if signed else [])
  return _frozen(np.array(sorted(data), np.float32))


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
  """torch's float32 `linspace`: it counts from both ends, rounding each sum once."""
  first, last = np.float32(start), np.float32(stop)
  step = np.float64((last - first) / np.float32(count - 1))
  i = np.arange(count)
  return np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(
    np.float32
  )


def _frozen(array: np.ndarray) -> np.ndarray:
  array.setflags(write=False)
  return array
