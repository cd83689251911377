"""`experiments.from_scratch`: its fields are those of the block, and gated ones have no more."""

import json

import jax
import pytest

from configs import from_scratch as configs
from experiments import from_scratch
from experiments.tables import cells, ffn
from experiments.tables.runs import SEEDS
from peftjax.nn.feed_forward import VARIANTS


def tiny(variant="relu", **changes):
  config = configs.get_config(variant)
  small = dict(ffn=24, width=8, layers=1, heads=2, length=16, batch_size=2, steps=2, eval_rows=4)
  config.update({**small, **changes})
  return config


def size(config):
  model = from_scratch.decoder(config)
  rows = jax.ShapeDtypeStruct((1, config.length), "int32")
  params = jax.eval_shape(model.init, jax.random.key(0), rows)
  return sum(x.size for x in jax.tree.leaves(params))


def test_variants_have_as_many_parameters_and_biases_and_beta_come_on_top():
  assert len({size(tiny(name)) for name in VARIANTS}) == 1
  assert size(tiny(use_bias=True)) == size(tiny()) + 24 + 8
  assert size(tiny("swiglu", learn_beta=True)) == size(tiny()) + 1


@pytest.mark.slow(reason="a run, 6 s")
def test_a_run_learns_and_says_with_what():
  config = tiny("swiglu", steps=30, learning_rate=1e-2)
  result = from_scratch.train(config)
  assert result["config"] == config.to_dict() and result["seed"] == 0
  assert result["loss"] < from_scratch.train(tiny("swiglu", steps=1))["loss"]
  assert from_scratch.train(config)["loss"] == result["loss"]


def test_an_unknown_variant_is_named():
  with pytest.raises(ValueError, match="variant 'tanh' is none of relu, .*swiglu"):
    from_scratch.decoder(tiny("tanh"))


def test_results_of_another_config_are_not_mixed_into_the_table(tmp_path):
  rows = [
    dict(
      cell=f"{name} seed={seed}",
      loss=2.0,
      parameters=1,
      seed=seed,
      config={**configs.get_config(name).to_dict(), "seed": seed},
    )
    for seed in SEEDS
    for name, _ in ffn.VARIANTS
  ]
  assert {row["cell"] for row in rows} == {cell.name for cell in ffn.cells(tmp_path)}
  assert len(ffn.table(rows).lines) == len(ffn.VARIANTS)
  rows[-1]["config"]["steps"] = 500
  (tmp_path / "ffn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  with pytest.raises(ValueError, match="steps=500, but the table now asks for 250"):
    cells.compute(ffn.cells(tmp_path), tmp_path / "ffn.jsonl")
