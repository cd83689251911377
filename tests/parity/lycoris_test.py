"""LoHa, LoKr and OFT against peft: outputs of its directories, and of ours in it."""

import jax
import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, OFTConfig, PeftModel, get_peft_model

import peftjax as pj
from peftjax import hf_peft
from peftjax.core import paths
from tests.parity.reference import GOLDEN, decoder

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
  pytest.mark.filterwarnings("ignore:Invalid `(oft_block_size|r)`.*Adjusted"),
]
IDS = np.random.default_rng(0).integers(3, 40, (2, 9))
LINEAR = ["q_proj", "o_proj", "down_proj"]
CASES = {
  "loha": LoHaConfig(r=3, alpha=5, target_modules=LINEAR),
  "loha patterns": LoHaConfig(
    r=3, alpha=5, target_modules=LINEAR, rank_pattern={"o_proj": 2}, alpha_pattern={"q_proj": 9}
  ),
  "lokr": LoKrConfig(r=2, alpha=5, target_modules=LINEAR),
  "lokr whole": LoKrConfig(r=64, alpha=5, target_modules=LINEAR),
  "lokr factor": LoKrConfig(r=3, alpha=5, decompose_factor=4, target_modules=LINEAR),
  "lokr both": LoKrConfig(r=1, alpha=5, decompose_both=True, target_modules=LINEAR),
  "oft": OFTConfig(oft_block_size=8, target_modules=LINEAR),
  "oft default": OFTConfig(target_modules=LINEAR),  # whose blocks of 32 fit no module
  "oft exact": OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=LINEAR),
  "oft shared": OFTConfig(oft_block_size=4, block_share=True, target_modules=LINEAR),
  "oft r": OFTConfig(r=4, oft_block_size=0, target_modules=LINEAR),
  "oft r adjusted": OFTConfig(r=5, oft_block_size=0, target_modules=LINEAR),
  **{
    f"oft {n} terms": OFTConfig(
      oft_block_size=8, num_cayley_neumann_terms=n, target_modules=LINEAR, layers_to_transform=[1]
    )
    for n in (2, 3, 4, 7)
  },
}


def drawn(model):
  """Every array of the adapter random, as if it were trained."""
  torch.manual_seed(0)
  with torch.no_grad():
    for name, array in model.named_parameters():
      if "hada_" in name or "lokr_" in name:
        array.normal_(std=0.3)
      if "oft_" in name:
        array.normal_(std=0.05)
  return model.eval()


def logits(model):
  with torch.no_grad():
    return model(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", CASES)
def test_directories_go_both_ways(name, scan, tmp_path):
  base = GOLDEN / "llama3_tiny"
  theirs = drawn(get_peft_model(decoder(base), CASES[name]))
  theirs.save_pretrained(tmp_path / "theirs")
  model, params = pj.load_pretrained(base, scan_layers=scan)
  loaded, mask = hf_peft.load(tmp_path / "theirs", params, model)
  ours = lambda params: np.asarray(pj.apply(model, params, IDS))
  want = logits(theirs)
  np.testing.assert_allclose(ours(loaded), want, rtol=1e-4, atol=1e-4)
  assert np.abs(ours(params) - want).max() > 1e-2  # the comparison sees the adapter
  hf_peft.save(tmp_path / "ours", loaded, model, trained=mask, task_type="CAUSAL_LM")
  again = PeftModel.from_pretrained(decoder(base), tmp_path / "ours").eval()
  np.testing.assert_allclose(logits(again), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("ours", "config"),
  [
    (pj.loha(3, 6, LINEAR), LoHaConfig(r=3, alpha=6, target_modules=LINEAR)),
    (pj.lokr(2, 6, LINEAR), LoKrConfig(r=2, alpha=6, target_modules=LINEAR)),
    (
      pj.lokr(1, 6, LINEAR, factor=4, decompose_both=True),
      LoKrConfig(r=1, alpha=6, decompose_factor=4, decompose_both=True, target_modules=LINEAR),
    ),
    (pj.oft(8, LINEAR), OFTConfig(oft_block_size=8, target_modules=LINEAR)),
    (
      pj.oft(4, LINEAR, block_share=True),
      OFTConfig(oft_block_size=4, block_share=True, target_modules=LINEAR),
    ),
  ],
  ids=["loha", "lokr", "lokr both", "oft", "oft shared"],
)
def test_as_many_parameters_are_trained(ours, config):
  base = GOLDEN / "llama3_tiny"
  _, params = pj.load_pretrained(base)
  attached = ours.attach(jax.random.key(0), params)
  theirs = get_peft_model(decoder(base), config).get_nb_trainable_parameters()[0]
  assert pj.count(attached, ours.trainable(attached)) == theirs
  assert any(type(x) is ours.codec.leaf for x in paths.leaves(attached).values())
