"""Rotary position embeddings and the ways to stretch them over longer texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def frequencies(
  size: int, theta: float, scaling: Mapping[str, Any] | None = None, trained_length: int = 0
) -> tuple[np.ndarray, float]:
  """Angle per position for each pair of features, and the factor on cosine and sine.

  ωᵢ = θ^(−2i/H) (Su et al. 2021, arXiv 2104.09864, eq. 15), then by `scaling["rope_type"]`:

  * `"default"`: as they are.
  * `"linear"`: ω / factor (Chen et al. 2023, arXiv 2306.15595, eq. 4).
  * `"llama3"`: wavelengths above trained_length / low_freq_factor are stretched by factor, those
    below trained_length / high_freq_factor are not, with a ramp between (Llama 3.1).
  * `"yarn"`: the same idea with a ramp over the number of turns, and attention scaled by
    0.1 ln(factor) + 1 (Peng et al. 2023, arXiv 2309.00071, eq. 20-22).

  For heads that are rotated in part, `scaling["partial_rotary_factor"]` is how much of H counts.

  Args:
    size: H, the size of a head, even.
    theta: base of the frequencies.
    scaling: Hugging Face's `rope_scaling` or `rope_parameters`.
    trained_length: `max_position_embeddings`, where `scaling` names no original length.

  Returns:
    float32 `[H/2]`, or half the size of the rotated part, and a float.

  Raises:
    ValueError: on another rope_type.
  """
  scaling = dict(scaling or {})
  size = int(size * scaling.get("partial_rotary_factor", 1.0))
  omega = 1.0 / theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  factor = scaling.get("factor") or 1.0
  length = scaling.get("original_max_position_embeddings") or trained_length
  if kind == "default":
    return omega.astype(np.float32), 1.0
  if kind == "linear":
    return (omega / factor).astype(np.float32), 1.0
  if kind == "llama3":
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = length * omega / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (keep * omega + (1 - keep) * omega / factor).astype(np.float32), 1.0
  if kind == "yarn":
    return _yarn(omega, size, theta, factor, length, scaling)
  raise ValueError(
    f'rope_type {kind!r} is not supported; "default", "linear", "llama3" and "yarn" are'
  )


def _yarn(
  omega: np.ndarray, size: int, theta: float, factor: float, length: int, scaling: dict[str, Any]
) -> tuple[np.ndarray, float]:
  def pair_of(turns: float) -> float:
    """The (fractional) pair that turns so often within the trained length."""
    return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

  low = pair_of(scaling.get("beta_fast") or 32.0)
  high = pair_of(scaling.get("beta_slow") or 1.0)
  if scaling.get("truncate", True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, size - 1)
  high = high + 0.001 if low == high else high
  keep = 1.0 - np.clip((np.arange(size // 2) - low) / (high - low), 0.0, 1.0)
  magnitude = lambda scale: 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
  attention = scaling.get("attention_factor")
  if attention is None:
    scale, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    attention = magnitude(scale) / magnitude(all_dims) if scale and all_dims else magnitude(1.0)
  return (keep * omega + (1 - keep) * omega / factor).astype(np.float32), attention


def angles(
  positions_BT: Int[Array, "B T"], omega: np.ndarray, factor: float, dtype: Any
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
  """Cosines and sines, `[B, T, 1, H/2]` in `dtype`, computed in float32."""
  phase = positions_BT[:, :, None, None].astype(jnp.float32) * omega.reshape(1, 1, 1, -1)
  return (jnp.cos(phase) * factor).astype(dtype), (jnp.sin(phase) * factor).astype(dtype)


def rotate(
  x_BTD: Float[Array, "B T D"], rope: tuple[jax.Array, jax.Array], num_heads: int
) -> Float[Array, "B T D"]:
  """Turns the pair (i, i + R/2) of every head by its position's angle, as Hugging Face lays them.

  Args:
    x_BTD: `[B, T, N·H]`.
    rope: the result of `angles`, R/2 of them: the features of a head from R on stay as they are.
  """
  cos, sin = rope
  x = x_BTD.reshape(*x_BTD.shape[:2], num_heads, -1)
  half = cos.shape[-1]
  one, two, rest = jnp.split(x, [half, 2 * half], axis=-1)
  turned = jnp.concatenate([one * cos - two * sin, two * cos + one * sin, rest], axis=-1)
  return turned.reshape(x_BTD.shape)
