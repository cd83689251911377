"""What may attend to what, against its definition in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.nn.mask import AttentionMask
from tests.core.programs import jit

B, S, PREFIX, COMMON, WINDOW, FIRST, LENGTH = 2, 7, 3, 2, 3, 2, 4
VALID = np.array([[0, 1, 1, 0, 1, 1, 1], [1] * 6 + [0]], bool)
SEGMENTS = np.array([[-1, -1, 1, 1, 1, 2, 2], [-1, -1, 1, 2, 2, 2, 3]])
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 0, 1, 2, 0]])


def test_causal_is_earlier_tokens_of_a_segment_in_the_window_and_no_padding():
  valid = jnp.array([[0, 1, 1, 1]], bool)

  @jit
  def biases(segments, first):
    packed = AttentionMask.of_decoder(valid, segments, window=2)
    return packed.bias(4), AttentionMask.of_decoder(valid, first=first).bias(1)

  packed, one = biases(np.array([[1, 1, 1, 2]]), np.int32(2))
  assert (packed[0, 0] == 0).tolist() == [
    [False, False, False, False],
    [False, True, False, False],
    [False, True, True, False],
    [False, False, False, True],
  ]
  assert (one[0, 0] == 0).tolist() == [[False, True, True, False]]


def defined(prefix, first=0, length=S, segments=None, positions=None, window=None, common=0):
  """`[B, T, prefix + S]`, by the docstring."""
  allowed = np.zeros((B, length, prefix + S), bool)
  for b, t, s in np.ndindex(B, length, S):
    q = first + t
    seen = VALID[b, s] and s <= q
    if window is not None:
      at = np.cumsum(VALID[b]) if positions is None else positions[b]
      seen = seen and at[q] - at[s] < window
    if segments is not None:
      seen = seen and (segments[b, q] == segments[b, s] or s < common)
    allowed[b, t, prefix + s] = seen
  allowed[..., :prefix] = True
  return allowed


@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize(
  "how",
  [
    {},
    dict(window=WINDOW),
    dict(window=WINDOW, positions=POSITIONS),
    dict(segments=SEGMENTS),
    dict(segments=SEGMENTS, common=COMMON),
    dict(segments=SEGMENTS, common=COMMON, window=WINDOW, positions=POSITIONS),
    dict(first=FIRST, length=LENGTH, window=WINDOW),
  ],
  ids=lambda how: "-".join(how) or "causal",
)
def test_bias_and_blocks_are_as_defined(how, prefix):
  """A prefix is seen by all, of whatever segment and however far behind."""
  want, length = defined(prefix, **how), how.get("length", S)
  given = {name: value for name, value in how.items() if name != "length"}
  given |= {name: jnp.asarray(given[name]) for name in ("segments", "positions") if name in given}
  given |= {"first": jnp.int32(FIRST)} if "first" in given else {}

  @jit
  def both():
    mask = AttentionMask.of_decoder(jnp.asarray(VALID), **given)
    mask = mask.behind_prefix(prefix) if prefix else mask
    return mask.bias(length), mask.padded(prefix + S + 2).block(1, length, 2, prefix + S)

  bias, block = jax.tree.map(np.asarray, both())
  assert set(np.unique(bias)) == {0.0, np.finfo(np.float32).min}
  np.testing.assert_array_equal(bias[:, 0] == 0, want)
  np.testing.assert_array_equal(block[:, : length - 1, : prefix + S - 2], want[:, 1:, 2:])


def test_an_encoder_sees_all_tokens():
  mask = AttentionMask(jnp.asarray(VALID)).behind_prefix(1)
  want = np.concatenate([np.ones((B, 1), bool), VALID], 1)
  np.testing.assert_array_equal(mask.bias(S)[:, 0] == 0, want[:, None])
