"""Ids and positions are held against the tables before they are read."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.models import limits
from tests.models import tiny

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = tiny.config()  # 120 tokens, 2 types, 42 positions


@pytest.mark.parametrize(
  "tokens, types, length, message",
  [
    (
      [[5, 120]],
      None,
      0,
      r"the rows have the token id 120, and .* 120 rows \(vocab_size\): .* 119",
    ),
    ([[-1, 5]], None, 0, "token id -1"),
    ([[5]], [[2]], 0, r"type id 2, and the model's table has 2 rows .*pairs of texts"),
    ([[5]], [[-1]], 0, "type id -1"),
    ([[5.0]], None, 0, "token ids are float64; they must be integers"),
    ([[5]], [[0]], 43, "up to 43 tokens, virtual ones counted, and this model has 42 positions"),
  ],
)
def test_what_is_beyond_a_table_is_named(tokens, types, length, message):
  types = None if types is None else np.array(types)
  with pytest.raises(ValueError, match=message):
    limits.check(CONFIG, np.array(tokens), types, length=length, what="the rows")


def test_what_fits_passes():
  limits.check(CONFIG, np.array([[0, 119]], np.int32), np.array([[0, 1]]), length=42)
  limits.check(CONFIG, np.zeros((0, 4), np.int32))
  jax.eval_shape(lambda x: limits.check(CONFIG, x), jax.ShapeDtypeStruct((1, 2), jnp.int32))


def test_robertas_positions_start_behind_its_padding():
  config = tiny.config(family="roberta", pad_id=1, types=1)
  limits.check(config, np.array([[5]]), length=40)
  with pytest.raises(ValueError, match="41 tokens, .* 40 positions"):
    limits.check(config, np.array([[5]]), length=41)
  with pytest.raises(ValueError, match="type id 1, and the model's table has 1 rows"):
    limits.check(config, np.array([[5]]), np.array([[1]]))


def test_generation_checks_its_prompts():
  model, params = pj.load_pretrained(GOLDEN / "gpt2_tiny")
  for tokens, message in (([[5, 96]], "the prompts have the token id 96"), ([[-3]], "id -3")):
    with pytest.raises(ValueError, match=message):
      pj.generate(model, params, np.array(tokens, np.int32), max_new_tokens=1)
