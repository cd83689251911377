"""Families of encoders and their heads: transformers' outputs, training, and what is refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import peftjax as pj
from peftjax import hf_peft, sharding
from peftjax.core import paths
from peftjax.models import hf_config
from peftjax.models.pretrained import load
from tests.core.programs import jit

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.name for path in GOLDEN.glob("encoder_*"))


@pytest.mark.fast_for(".*-scanned")
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_transformers(name, scan):
  model, params, new = load(GOLDEN / name, scan_layers=scan)
  want = load_file(GOLDEN / name / "expected.safetensors")

  @jit
  def run(params, *inputs):
    return pj.apply(model, params, *inputs), pj.apply(model, params, *inputs, hidden=True)[0]

  logits, hidden = run(params, want["tokens"], want["mask"], want["types"])
  real = want["mask"] > 0
  kind = next((kind for kind in ("token", "span") if name.endswith(kind)), "text")
  of = ... if kind == "text" else real
  np.testing.assert_allclose(logits[of], want["logits"][of], atol=2e-5)
  np.testing.assert_allclose(hidden[real], want["hidden"][real], atol=2e-5)
  assert logits.dtype == jnp.float32 and not new
  assert model.config.labels_of == kind


@pytest.mark.parametrize("name", NAMES)
def test_default_and_all_linear_targets_and_rules_know_every_family(name):
  """Queries and values by default, and all kernels but the head's; rules split every kernel."""
  _, params = pj.load_pretrained(GOLDEN / name)
  kernels = [path for path in paths.leaves(params) if path.endswith("kernel")]
  default = [path for path in kernels if path.endswith(("query/kernel", "value/kernel"))]
  assert sorted(pj.lora(2, 4).claims(params)) == sorted(default) and len(default) == 4
  linear = [path for path in kernels if not path.startswith("head/")]
  assert sorted(pj.lora(2, 4, "all-linear").claims(params)) == sorted(linear)
  mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"))
  specs = paths.leaves(sharding.specs(params, mesh))
  assert all(any(specs[path]) for path in kernels)
  two = P("fsdp", "tensor")
  assert all(
    specs[p] == two for p in kernels if p.endswith(("query/kernel", "intermediate/dense/kernel"))
  )


def test_a_head_for_each_token_trains():
  """The loss of two steps falls, and only adapters and head move."""
  model, params = pj.load_pretrained(GOLDEN / "encoder_bert_token")
  assert "pooler" not in params["bert"]
  method = pj.chain(pj.lora(2, 4), pj.unfreeze("head/.*"))
  attached = method.attach(jax.random.key(0), params)
  train, frozen = pj.partition(attached, method.trainable(attached))
  given = load_file(GOLDEN / "encoder_bert_token" / "expected.safetensors")
  labels = np.arange(36).reshape(4, 9) % 3

  def loss(train):
    logits = pj.apply(model, pj.combine(train, frozen), given["tokens"], given["mask"])
    each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (each * given["mask"]).sum() / given["mask"].sum()

  step = jit(jax.value_and_grad(loss))
  before, grads = step(train)
  after, _ = step(jax.tree.map(lambda x, g: x - 0.1 * g, train, grads))
  assert after < before - 1e-3


@pytest.fixture
def change(tmp_path):
  """A golden directory with its config changed."""

  def make(name, **fields):
    shutil.copytree(GOLDEN / name, tmp_path / name)
    path = tmp_path / name / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return tmp_path / name

  return make


def test_heads_of_tokens_and_of_texts_are_not_taken_for_each_other():
  token, text = GOLDEN / "encoder_bert_token", GOLDEN / "encoder_distilbert"
  with pytest.raises(ValueError, match="BertForTokenClassification, whose head is not for whole"):
    load(token, labels_of="text")
  with pytest.raises(ValueError, match="ForSequenceClassification, whose head is not for each"):
    load(text, labels_of="token")
  made = load(token, num_labels=3, labels_of="text")
  assert {p for p in paths.leaves(made.params) if "head/" in p or "pooler" in p} == set(made.new)
  made = load(text, num_labels=3, labels_of="token")
  assert set(made.new) == {"head/classifier/bias", "head/classifier/kernel"}
  assert made.model.config.head_dropout == 0.1  # of texts it is another: seq_classif_dropout
  with pytest.raises(ValueError, match="labels_of"):
    load(text, labels_of="word")
  with pytest.raises(ValueError, match="llama has no labels_of"):
    load(GOLDEN / "llama_tiny", labels_of="token")


@pytest.mark.parametrize(
  "name, fields, message",
  [
    ("encoder_bert_token", {"architectures": ["ElectraForPreTraining"]}, "means Bert"),
    ("encoder_distilbert", {"n_heads": 5}, "n_heads is 5; it must divide dim 16"),
    ("encoder_distilbert", {"activation": "mish"}, "activation is 'mish'; it must be one of"),
    ("encoder_distilbert", {"hidden_size": 8}, "hidden_size is 8; dim, the same thing, is 16"),
    ("encoder_electra", {"embedding_size": 12}, r"word_embeddings.weight has shape \(60, 10\)"),
    ("encoder_electra", {"is_decoder": True}, "is_decoder is True; only encoders"),
    ("encoder_xlm_roberta", {"pad_token_id": None}, "pad_token_id is None; positions start"),
    ("encoder_deberta", {"conv_kernel_size": 3}, "conv_kernel_size is 3; the convolution"),
    ("encoder_deberta", {"relative_attention": False}, "relative_attention False it must name n"),
    ("encoder_deberta", {"pos_att_type": "c2p|p2p"}, "pos_att_type is 'c2p.p2p'; only c2p and"),
    ("encoder_deberta", {"position_buckets": 60}, "position_buckets is 60; half of it must be"),
    ("encoder_deberta", {"position_buckets": 2**40}, "position_buckets is 1099511627776; it must"),
    ("encoder_deberta", {"embedding_size": 8}, "embedding_size is 8; only 16"),
    ("encoder_deberta", {"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd is 'batch_norm'; it must"),
    ("encoder_deberta", {"pooler_hidden_act": "tanh"}, "pooler_hidden_act is 'tanh'; it must be"),
    ("encoder_camembert_token", {"position_embedding_type": "relative_key"}, "only absolute"),
  ],
)
def test_what_is_not_computed_is_refused_before_a_weight_is_read(
  name, fields, message, change, monkeypatch
):
  monkeypatch.setattr(jax, "eval_shape", None)
  with pytest.raises(ValueError, match=message):
    load(change(name, **fields))


def test_a_peft_directory_says_what_its_head_labels(tmp_path):
  """As peft calls the tasks; of the other kind it is not loaded, though the shapes are the same."""
  model, params = pj.load_pretrained(GOLDEN / "encoder_bert_token", scan_layers=True)
  layout = pj.linen.layout(model, np.zeros((1, 4), np.int32))
  attached = pj.lora(2, 4).attach(jax.random.key(0), params, layout)
  hf_peft.save(tmp_path, attached, model)
  said = json.loads((tmp_path / "adapter_config.json").read_text())
  assert said["task_type"] == "TOKEN_CLS" and said["modules_to_save"] == ["classifier"]
  loaded, _ = hf_peft.load(tmp_path, params, model)
  jax.tree.map(np.testing.assert_array_equal, loaded, attached)
  text = load(GOLDEN / "encoder_bert_token", num_labels=3, labels_of="text")
  with pytest.raises(
    ValueError, match="TOKEN_CLS', whose head labels each token, and .* each text"
  ):
    hf_peft.load(tmp_path, text.params, text.model)


def test_a_peft_directory_of_a_head_for_answers(tmp_path):
  """The head is saved as peft's QUESTION_ANS has it, and read again."""
  model, params = pj.load_pretrained(GOLDEN / "encoder_bert_span")
  assert params["head"].keys() == {"qa_outputs"}
  attached = pj.lora(2, 4).attach(jax.random.key(0), params)
  hf_peft.save(tmp_path, attached, model)
  said = json.loads((tmp_path / "adapter_config.json").read_text())
  assert said["task_type"] == "QUESTION_ANS" and said["modules_to_save"] == ["qa_outputs"]
  loaded, _ = hf_peft.load(tmp_path, params, model)
  jax.tree.map(np.testing.assert_array_equal, loaded, attached)
  whole = pj.merge(attached)
  pj.save_pretrained(tmp_path / "whole", whole, of=GOLDEN / "encoder_bert_span")
  config = json.loads((tmp_path / "whole" / "config.json").read_text())
  assert config["architectures"] == ["BertForQuestionAnswering"]
  with pytest.raises(ValueError, match="BertForQuestionAnswering, whose head is not for each tok"):
    load(GOLDEN / "encoder_bert_span", labels_of="token")


def test_discriminators_and_bodies_get_a_new_head(change):
  """What the pretraining head of a discriminator is called is of no account."""
  directory = change("encoder_electra", architectures=["ElectraForPreTraining"])
  assert not load(directory).new  # of the right names
  assert hf_config.read({"model_type": "electra"}).embedding_width == 128
