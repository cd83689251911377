"""`describe`: what every leaf is, and how the model uses it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import peftjax as pj
from peftjax.models.bert import BertClassifier
from peftjax.nn.attention import attention
from peftjax.nn.mask import AttentionMask
from tests.models import tiny


class Model(nn.Module):
  """One layer that the bridge knows, one that reads its parameter itself, one that is not used."""

  @nn.compact
  def __call__(self, x, use=True):
    x = nn.Dense(6, name="known")(x)
    w = self.param("raw", nn.initializers.ones, (6, 5))
    doubled = self.param("doubled", nn.initializers.ones, (5, 5))
    unused = nn.Dense(3, name="unused")
    return x @ w @ (2 * doubled) if use else unused(x)


PARAMS = {
  "known": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6, jnp.bfloat16)},
  "raw": jnp.ones((6, 5)),
  "doubled": jnp.ones((5, 5)),
  "unused": {"kernel": jnp.ones((6, 3)), "bias": jnp.ones(3)},
}


@pytest.fixture(scope="module")
def rows():
  method = pj.lora(2, targets=["known", "raw", "doubled", "unused"])
  params = method.attach(jax.random.key(0), PARAMS)
  found = pj.describe(params, method.trainable(params), model=Model(), example=[jnp.ones((3, 4))])
  return {row.path: row for row in found}


def test_the_columns(rows):
  """Bytes are of all arrays of the leaf, scale and rank too; trained ones are parameters."""
  row = rows["known/kernel"]
  assert row[:4] == ("known/kernel", "LoRA", (4, 6), "float32")
  assert row.bytes == 4 * (4 * 6 + 2 * 4 + 2 * 6 + 1 + 1) and row.trainable == 2 * (4 + 6)
  assert rows["known/bias"][1:] == ("array", (6,), "bfloat16", 12, 0, "")


def test_factored_materialised_or_unused(rows):
  """By an abstract trace; what made an array of a weight is named."""
  computed = {path: row.computed for path, row in rows.items()}
  assert computed["known/kernel"] == "factored"
  assert computed["doubled"] == "materialised (mul)"
  assert computed["raw"] == "factored"
  assert computed["unused/kernel"] == "unused"


@pytest.mark.parametrize("scan", [False, True])
def test_our_own_model_is_factored_everywhere(scan):
  model = BertClassifier(tiny.config(scan_layers=scan))
  params = tiny.scanned_params() if scan else tiny.params()
  method = pj.lora(2, targets=["all-linear", "word_embeddings"])
  layout = pj.linen.layout(model, tiny.TOKENS)
  params = method.attach(jax.random.key(0), jax.eval_shape(lambda: params), layout)
  found = pj.describe(params, model=model, example=[tiny.TOKENS])
  assert {row.computed for row in found if row.type == "LoRA"} == {"factored"}


def test_without_a_model_or_a_mask_it_says_less():
  rows = pj.describe(PARAMS)
  assert {row.computed for row in rows} == {""} and {row.trainable for row in rows} == {0}


def test_it_prints_as_a_table_with_totals(rows):
  text = str(pj.describe(PARAMS, jax.tree.map(lambda _: True, PARAMS)))
  lines = text.splitlines()
  assert lines[0].split() == ["path", "type", "shape", "dtype", "bytes", "trainable", "computed"]
  assert len(lines) == 1 + 6 + 1
  assert lines[-1].split() == ["total", "412", f"{pj.count(PARAMS)}"]


def test_the_kernel_of_attention_is_that_of_the_examples_length():
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
      q, k, v = (nn.Dense(4, name=name)(x) for name in "qkv")
      return attention(q, k, v, AttentionMask(jnp.ones(x.shape[:2], bool)), 2)

  text = lambda length: jax.ShapeDtypeStruct((1, length, 4), jnp.float32)
  params = jax.eval_shape(Layer().init, jax.random.key(0), text(1))["params"]
  found = [pj.describe(params, model=Layer(), example=[text(length)]) for length in (8, 4096)]
  assert [f.attention for f in found] == [("dense",), ("blockwise",)]
  assert str(found[1]).endswith("attention: blockwise\n")
  assert pj.describe(params).attention == () and "attention:" not in str(pj.describe(params))
