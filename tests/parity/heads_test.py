"""Tied, untied, differing and missing heads: logits are transformers', merged ones too."""

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import peftjax as pj
from peftjax.core import paths
from peftjax.methods.lora_weight import LoRA
from tests.golden.make_decoders import CASES, batch, make, run

pytestmark = pytest.mark.parity
TABLES = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}


def _differs(tensors, table):
  tensors["lm_head.weight"] = 0.3 * tensors[table][::-1].copy()


def _equal(tensors, table):
  tensors["lm_head.weight"] = tensors[table].copy()


def _alone(tensors, table):
  tensors["lm_head.weight"] = tensors.pop(table)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("change", [None, _differs, _equal, _alone])
@pytest.mark.parametrize("kind", TABLES)
def test_a_head_is_read_as_transformers_reads_it(kind, change, tied, tmp_path, recwarn):
  if not tied and change is _alone:
    pytest.skip("transformers draws a table at random")
  name = "llama3_tiny" if kind == "llama" else "gpt2_tiny"
  fields = {**CASES[name][1], "tie_word_embeddings": tied}
  make(kind, fields, seed=3).save_pretrained(tmp_path)
  if change is not None:
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors, TABLES[kind])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
  theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
  inputs = batch(3)
  real = inputs["mask"] > 0
  model, params = pj.load_pretrained(tmp_path, scan_layers=kind == "llama")
  logits = jax.jit(lambda p: pj.apply(model, p, inputs["tokens"], inputs["mask"]))
  np.testing.assert_allclose(logits(params)[real], run(theirs, inputs)[real], atol=1e-4)
  shared = theirs.lm_head.weight.data_ptr() == theirs.get_input_embeddings().weight.data_ptr()
  assert bool(paths.tied(params)) == shared == (tied and change is not _differs)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
  "kind, scan, fmt",
  [
    ("llama", True, None),
    ("llama", False, pj.quant.nf4(32)),
    ("gpt2", False, None),
    ("gpt2", True, None),
  ],
)
def test_an_adapted_table_is_pefts_and_merging_keeps_it(kind, scan, fmt, tmp_path):
  """PEFT adapts the lookup alone; here merging gives the head an array of its own."""
  from peft import LoraConfig, get_peft_model

  name = "llama3_tiny" if kind == "llama" else "gpt2_tiny"
  make(kind, CASES[name][1], seed=4).save_pretrained(tmp_path)
  model, params = pj.load_pretrained(tmp_path, scan_layers=scan, quant=fmt)
  params = pj.lora(2, 4, model.config.table).attach(jax.random.key(0), params)
  stir = lambda w: w.replace(a=w.a + 0.1, b=w.b + 0.1) if isinstance(w, LoRA) else w
  params = jax.tree.map(stir, params, is_leaf=paths.is_leaf)
  inputs = batch(4)
  real = inputs["mask"] > 0
  logits = jax.jit(lambda p: pj.apply(model, p, inputs["tokens"], inputs["mask"]))
  got = np.asarray(logits(params))[real]
  merged = np.asarray(logits(pj.merge(params, dense=fmt is not None)))[real]
  np.testing.assert_allclose(merged, got, atol=1e-3 if fmt else 1e-4)
  if fmt is not None:
    return
  base = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
  module = TABLES[kind].split(".")[-2]
  theirs = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=[module]))
  weight = paths.leaves(params)[model.config.table]
  (layer,) = [m for m in theirs.modules() if hasattr(m, "lora_embedding_A") and m.lora_embedding_A]
  with torch.no_grad():
    layer.lora_embedding_A["default"].copy_(torch.from_numpy(np.array(weight.a)))
    layer.lora_embedding_B["default"].copy_(torch.from_numpy(np.array(weight.b)))
  np.testing.assert_allclose(got, run(theirs, inputs)[real], atol=1e-4)
