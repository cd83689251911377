"""`pj.texts` and `pj.fit`: the same numbers as `experiments.train`, without a config."""

import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peftjax as pj
from peftjax import data
from peftjax.training import workdir as workdirs
from peftjax.training.history import History
from tests import tiny, tiny_lm

KEY = jax.random.key(0)
METHOD = pj.chain(pj.lora(rank=4), pj.unfreeze("head/.*"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
  return tiny_lm.model_dir(tmp_path_factory.mktemp("decoder") / "model")


@pytest.fixture(scope="module")
def splits(corpus):
  return data.load("files", seed=0, train_file=str(corpus)).splits


@pytest.fixture(scope="module")
def few(model_dir):
  """24 texts of three classes."""
  rows = tiny.texts(24)
  return pj.texts([r[0] for r in rows], [r[1] for r in rows], tokenizer=model_dir, max_length=16)


@pytest.fixture(scope="module")
def encoder(model_dir):
  return pj.load_pretrained(model_dir, num_labels=3, key=jax.random.fold_in(KEY, 0))


@pytest.mark.slow(reason="a run of its own, several seconds")
def test_the_numbers_are_those_of_a_run(finished, splits, corpus, model_dir, encoder, tmp_path):
  """Losses, rates, scores and the choice of the best, to the bit; the workdir has them too."""
  names = ["business", "sport", "tech"]
  made = {
    part: pj.texts(
      splits[part].texts,
      [names[i] for i in splits[part].labels],
      tokenizer=data.load_tokenizer(model_dir),
      max_length=16,
    )
    for part in ("train", "validation")
  }
  before = jax.tree.map(np.asarray, encoder[1])
  workdir, result = finished
  settings = workdirs.settings(workdir)
  params, history = pj.fit(
    *encoder,
    settings.build_method(),
    made["train"],
    eval_data=made["validation"],
    epochs=settings.train.epochs,
    batch_size=settings.train.batch_size,
    learning_rate=settings.optimizer.learning_rate,
    workdir=tmp_path / "new",
  )
  want = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert len(history.rows) == len(want) == 10
  for row, other in zip(history.rows, want, strict=True):
    assert row == {key: other[key] for key in row}
  assert history.best_step == result["best_step"]
  assert history.scores == result["metrics"]["validation"]
  kept = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
  assert list(map(json.loads, kept)) == list(history.rows)
  ours, theirs = (f / "peft/adapter_model.safetensors" for f in (tmp_path / "new", workdir))
  assert ours.read_bytes() == theirs.read_bytes()
  # What was given is as it was, and still there though the head was trained.
  jax.tree.map(np.testing.assert_array_equal, before, encoder[1])
  trained, old = (tree["head"]["classifier"]["bias"] for tree in (params, before))
  assert not np.array_equal(trained, old)
  with pytest.raises(ValueError, match="not an empty folder"):
    pj.fit(*encoder, METHOD, made["train"], workdir=tmp_path / "new")


@pytest.mark.slow(reason="two runs are compiled")
def test_a_second_fit_goes_on(encoder, few):
  """From the adapters that the first one returned; the wrong method is refused."""
  params, first = pj.fit(*encoder, METHOD, few, steps=2, batch_size=24, learning_rate=1e-2)
  again, second = pj.fit(encoder[0], params, METHOD, few, steps=2, batch_size=24)
  assert second.rows[0]["loss"] < first.rows[0]["loss"]
  assert jax.tree.structure(again) == jax.tree.structure(params)
  with pytest.raises(ValueError, match="adapters already, but none of IA3"):
    pj.fit(encoder[0], params, pj.ia3(["key"], []), few, steps=2)


@pytest.mark.slow(reason="compiles a decoder and, scanned, products with codes")
@pytest.mark.parametrize("quant, scan", [(None, False), (pj.quant.nf4(block_size=32), True)])
def test_a_decoder_learns_completions(decoder, quant, scan):
  """Dense, and in four bits with scanned layers: no layout is written."""
  model, params = pj.load_pretrained(decoder, quant=quant, scan_layers=scan)
  pairs = [("1 2 3 4 4", " 5 6 7 8 9"), ("3 1 0 2 2", " 3 4 5 6 7")] * 8
  made = pj.texts(pairs, tokenizer=decoder, max_length=24)
  _, history = pj.fit(
    model,
    params,
    pj.lora(rank=4, targets="all-linear"),
    made,
    eval_data=made,
    steps=12,
    batch_size=8,
    learning_rate=2e-2,
  )
  losses = history.series("loss")[1]
  assert losses[-1] < 0.7 * losses[0]
  assert set(history.scores) == {"perplexity", "loss"}


def test_completions_alone_are_predicted(decoder):
  made = pj.texts([("1 2 3", " 4 5")], tokenizer=decoder)
  assert made.prompts == [3] and len(made.documents[0]) == 6  # the end of the text too
  assert pj.texts(["1 2 3 4 5"], tokenizer=decoder).prompts == [0]


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.DenseGeneral((4, 4), name="hidden")(x))
    return nn.Dense(2, name="out")(x.reshape(len(x), -1))


@pytest.mark.parametrize(
  "number", [False, pytest.param(True, marks=pytest.mark.slow(reason="the same, with numbers"))]
)
def test_a_module_of_ones_own_takes_arrays(number):
  x = jax.random.normal(KEY, (30, 8))
  y = x[:, 0] if number else (x[:, 0] > 0).astype(int)
  params = Net().init(KEY, x)["params"]
  _, history = pj.fit(
    Net(),
    params,
    pj.lora(rank=2, targets="all-linear"),
    (x, y),
    eval_data=(x, y),
    batch_size=8,
    epochs=4,
    learning_rate=2e-2,
  )
  assert len(history.series("loss")[0]) == 16
  scores = history.series("validation_loss" if number else "validation_accuracy")[1]
  assert (scores[-1] < scores[0]) if number else (scores[-1] > 0.6)


def test_a_module_of_nnx_takes_arrays():
  x = jax.random.normal(KEY, (30, 8))

  class Own(nnx.Module):
    def __init__(self, rngs):
      self.hidden, self.out = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x):
      return self.out(nnx.relu(self.hidden(x)))

  model, params = pj.nnx.split(Own(nnx.Rngs(0)))
  method, given = pj.lora(rank=2, targets=["hidden", "out"]), (x, (x[:, 0] > 0).astype(int))
  params, history = pj.fit(
    model, params, method, given, epochs=6, batch_size=10, learning_rate=3e-2
  )
  losses = history.series("loss")[1]
  assert losses[-1] < losses[0] and pj.apply(model, params, x).shape == (30, 2)


def test_a_history_draws_itself():
  rows = [{"step": i, "loss": 1 / i, "grad_norm": 1.0, "learning_rate": 0.1} for i in (1, 2, 3)]
  rows.insert(2, {"step": 2, "epoch": 1.0, "validation_loss": 0.4, "validation_accuracy": 0.5})
  history = History(tuple(rows), 2)
  assert history.series("loss") == ([1, 2, 3], [1.0, 0.5, 1 / 3])
  assert history.scores == {"loss": 0.4, "accuracy": 0.5}
  assert repr(history) == "<3 steps: loss 1.0000 to 0.3333; step 2, loss 0.4000, accuracy 0.5000>"
  losses, accuracy = history.plot().axes
  assert [line.get_label() for line in losses.lines] == ["loss", "validation_loss"]
  assert accuracy.lines[0].get_ydata() == [0.5]
  assert history._repr_png_().startswith(b"\x89PNG")
  with pytest.raises(ValueError, match="no row has 'f1'; there are: loss, grad_norm"):
    history.series("f1")


@pytest.mark.parametrize(
  "texts, labels, more, message",
  [
    ("one text", None, {}, "texts is 'one text'; give a list"),
    ([], None, {}, "texts is empty"),
    (["a", 1], None, {}, r"texts\[1\] is 1; write a text for each"),
    ([("a", "b"), "c"], ["x", "y"], {}, r"texts\[1\] is 'c'"),
    (["a"], ["x", "y"], {}, "2 labels for 1 texts"),
    (["a", "b"], ["x", 1], {}, "labels are of the kind int, str"),
    (["a", "b"], [True, False], {}, "labels are of the kind bool"),
    (["a", "b"], ["x", "x"], {}, r"the classes are \['x'\].*two"),
    (["a", "b"], ["x", "z"], {"label_names": ["x", "y"]}, "label 'z' is none of the classes"),
    (["a"], None, {"label_names": ["x"]}, "label_names without labels"),
    (["a", "b"], [0.5, float("nan")], {}, "nan is not a finite number"),
    (["a", "b"], [0, 1], {"max_length": 0}, "max_length=0: write a whole number"),
    (["a", "b"], [0, 1], {"tokenizer": "no/model"}, "no folder no/model"),
  ],
)
def test_texts_that_are_none(model_dir, monkeypatch, texts, labels, more, message):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import of it fails
  with pytest.raises(ValueError, match=message):
    pj.texts(texts, labels, **{"tokenizer": model_dir, **more})


def test_labels_are_classes_or_numbers(model_dir):
  make = lambda labels: pj.texts(["a", "b", "c"], labels, tokenizer=model_dir)
  assert make([10, 9, 10]).label_names == ("9", "10")
  assert make(np.array(["b", "a", "a"])).label_names == ("a", "b")
  assert make([1, 2.5, 0]).label_names == ()
  assert make([1, 2.5, 0]).examples.labels.dtype == np.float32
  assert repr(make([10, 9, 10])) == "<3 texts with 2 classes, up to 3 tokens>"


def test_data_of_another_model_are_refused(encoder, few, decoder):
  model, params = encoder
  plain = pj.texts(["1 2"], tokenizer=decoder)
  with pytest.raises(ValueError, match="BertClassifier takes texts with labels"):
    pj.fit(model, params, METHOD, plain)
  with pytest.raises(ValueError, match=r"data is a list; give the result of pj\.texts"):
    pj.fit(model, params, METHOD, ["a text"])
  with pytest.raises(ValueError, match="give two of a kind"):
    pj.fit(model, params, METHOD, few, eval_data=plain)
  with pytest.raises(ValueError, match="batch_size=0"):
    pj.fit(model, params, METHOD, few, batch_size=0)
  with pytest.raises(ValueError, match=r"inputs \(2, 3\).*labels \(3,\)"):
    pj.fit(model, params, METHOD, (jnp.ones((2, 3)), jnp.ones(3)))
  two = pj.texts(["a", "b"], [0, 1], tokenizer=few.source)
  with pytest.raises(ValueError, match="the model has 3 outputs, and the labels need 2"):
    pj.fit(model, params, METHOD, two)
  other = pj.texts(["a"] * 3, ["x", "y", "z"], tokenizer=few.source)
  with pytest.raises(ValueError, match=r"write pj\.texts\(\.\.\., label_names=data\.label_names\)"):
    pj.fit(model, params, METHOD, few, eval_data=other)
