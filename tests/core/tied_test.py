"""Tied heads: one array that is lookup table and head, through everything that walks a tree."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax.core import paths, tree
from peftjax.core.tied import Tied
from peftjax.methods.lora_weight import LoRA
from peftjax.nn.linear import Embedding, Head, Linear
from peftjax.quant.weight import Quantized
from tests.core.programs import jit

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = np.array([[5, 6, 7, 8], [9, 10, 95, 0]], np.int32)
KEY = jax.random.key(0)
TABLE = "embed/embedding"


class Toy(nn.Module):
  """A table, something between, and a head: what a decoder has of them."""

  @nn.compact
  def __call__(self, tokens):
    embed = Embedding(96, 64, name="embed")
    x = jnp.sin(Linear(64, name="between")(embed(tokens)))
    return Head(96, TABLE, name="lm_head")(x, embed.table())


MODEL = Toy()
run = jit(lambda p: pj.apply(MODEL, p, TOKENS))


@pytest.fixture(scope="module")
def params():
  made = MODEL.init(KEY, TOKENS)["params"]
  return jax.tree.map(lambda x: 10 * x, made)


@pytest.mark.parametrize(
  "name, table",
  [("llama3_tiny", "model/embed_tokens/embedding"), ("gpt2_tiny", "transformer/wte/embedding")],
)
def test_decoders_say_in_their_trees_whether_they_are_tied(name, table):
  """Loaded or initialised; an array in its place makes a head of its own, nothing a tied one."""
  model, params = pj.load_pretrained(GOLDEN / name, scan_layers=True)
  run = jit(lambda p: pj.apply(model, p, TOKENS))
  assert params["lm_head"]["kernel"] == Tied(of=table)
  init = lambda: model.init(KEY, TOKENS)["params"]
  assert paths.tied(jax.eval_shape(init)) == {"lm_head/kernel": Tied(of=table)}
  want = run(params)
  own = pj.tree.untie(params)
  own["lm_head"]["kernel"] = own["lm_head"]["kernel"] * 2
  near(run(own), 2 * want)
  attached = adapted(params, table)
  near(run(pj.merge(attached)), run(attached))


def test_nothing_in_the_place_of_the_head_is_tied_too(params):
  """As trees were before there was a marker."""
  near(run({name: x for name, x in params.items() if name != "lm_head"}), run(params))
  near(run(pj.tree.untie(params)), run(params))


def adapted(params, table, **how):
  """LoRA on the table, stirred."""
  params = pj.lora(2, 4, table, **how).attach(KEY, params)
  stir = lambda w: w.replace(a=w.a + 0.1, b=w.b + 0.1) if isinstance(w, LoRA) else w
  return jax.tree.map(stir, params, is_leaf=paths.is_leaf)


def near(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "fmt", [None, pj.quant.nf4(32), pj.quant.int8(32)], ids=["dense", "nf4", "int8"]
)
def test_merging_an_adapted_table_keeps_the_outputs(params, fmt):
  """The adapter changed the lookup alone, so the head becomes an array: the base's."""
  base = pj.quantize(params, fmt, TABLE) if fmt else params
  attached = adapted(base, TABLE)
  want = run(attached)
  assert np.abs(want - run(base)).max() > 0.1
  merged = pj.merge(attached, dense=fmt is not None)
  near(run(merged), want)
  assert merged["lm_head"]["kernel"].shape == (64, 96)
  near(run(pj.merge(pj.tree.untie(attached), dense=fmt is not None)), want)
  if fmt is None:
    back = pj.tree.unmerge(merged, attached)
    assert paths.tied(back)
    near(run(back), want)


def test_a_quantised_table_is_seen_by_both_uses(params):
  """Logits are those of the dequantised table as lookup and head, also after untying."""
  for fmt in (pj.quant.nf4(32), pj.quant.nf4(32, False)):
    quantised = pj.quantize(params, fmt, TABLE)
    want = run(pj.merge(quantised, dense=True))
    near(run(quantised), want)
    own = pj.tree.untie(quantised)
    assert isinstance(own["lm_head"]["kernel"], Quantized)
    np.testing.assert_array_equal(
      own["lm_head"]["kernel"].materialize(), paths.leaves(quantised)[TABLE].materialize().T
    )
  assert paths.tied(pj.merge(quantised, dense=True))  # no adapter: still one array


def test_requantising_an_adapted_table_leaves_the_head(params):
  quantised = pj.quantize(params, pj.quant.nf4(32), TABLE)
  folded, errors = pj.quant.requantize(adapted(quantised, TABLE))
  assert list(errors) == [TABLE]
  np.testing.assert_array_equal(
    folded["lm_head"]["kernel"].materialize(), paths.leaves(quantised)[TABLE].materialize().T
  )
  assert paths.tied(pj.quant.requantize(quantised)[0])


def test_training_the_table_trains_both_uses(params):
  """As in torch: one array, counted once, with the sum of both gradients."""
  size = lambda p, method: pj.count(p, method.trainable(p))
  every = pj.unfreeze(".*")
  assert size(params, every) == pj.count(params) == sum(x.size for x in jax.tree.leaves(params))
  method = pj.unfreeze(TABLE)
  assert size(params, method) == paths.leaves(params)[TABLE].size
  loss = lambda p: jnp.sin(pj.apply(MODEL, p, TOKENS)).sum()
  grad = lambda p, where: paths.leaves(
    jit(pj.value_and_grad(loss, pj.unfreeze(where).trainable(p)))(p)[1]
  )
  both, apart = grad(params, TABLE), grad(pj.tree.untie(params), [TABLE, "lm_head"])
  want = apart[TABLE] + apart["lm_head/kernel"].T
  np.testing.assert_allclose(both[TABLE], want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  "act",
  [
    lambda p: pj.lora(2, 4, "lm_head").attach(KEY, p),
    lambda p: pj.dora(2, 4, ["between", "lm_head"]).claims(p),
    lambda p: pj.lora(2, 4, r".*(kernel|embedding)").attach(KEY, p),
    lambda p: pj.unfreeze("lm_head").claims(p),
    lambda p: pj.unfreeze(".*kernel").trainable(p),
    lambda p: pj.quantize(p, pj.quant.nf4(32), ["all-linear", "lm_head"]),
    lambda p: pj.lora(2, 4, TABLE, init="pissa").attach(KEY, p),
  ],
)
def test_what_needs_a_head_of_its_own_says_how_to_get_one(params, act):
  with pytest.raises(ValueError, match=r"tied to|pj\.tree\.untie\(params\)") as told:
    act(params)
  assert "pj.tree.untie(params)" in str(told.value)


def test_the_rest_of_the_library_walks_past_it(params):
  """Parts, masks, shardings, optimizers, adapters of one base, descriptions."""
  attached = adapted(params, TABLE)
  method = pj.chain(pj.lora(2, 4, TABLE))
  train, frozen = pj.partition(attached, method.trainable(attached))
  assert paths.tied(train) == paths.tied(frozen) == paths.tied(attached)
  assert jax.tree.structure(pj.combine(train, frozen)) == jax.tree.structure(attached)
  tx = optax.adam(1e-3)
  updates, _ = tx.update(train, tx.init(train), train)
  assert paths.tied(optax.apply_updates(train, updates))
  where = pj.sharding.shardings(attached, pj.sharding.make_mesh("fsdp:2,tensor:4"))
  assert paths.tied(jax.device_put(attached, where))
  adapter, _ = pj.partition(attached, pj.tree.adapter_mask(attached, method.trainable(attached)))
  assert all(map(paths.tied, pj.tree.align_ranks(adapter, adapter)))
  assert pj.count(attached) == pj.count(params) + paths.leaves(attached)[TABLE].a.size + (
    paths.leaves(attached)[TABLE].b.size
  )
  row = next(row for row in pj.describe(attached) if row.path == "lm_head/kernel")
  assert row.type == f"tied to {TABLE}" and row.bytes == row.trainable == 0
  assert row.shape == (64, 96) and row.dtype == "float32"
  assert paths.tied(pj.tree.to_lora(attached))
  with pytest.raises(ValueError, match="is tied to .*, which is not in this tree"):
    pj.tree.untie({"lm_head": params["lm_head"]})
  assert tree.untie({"a": 1}) == {"a": 1}
