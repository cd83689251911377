"""`pj.combine_adapters` against peft's `add_weighted_adapter`, matrix by matrix."""

import functools

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.merge_utils import dare_linear
from scipy import stats

import peftjax as pj
from peftjax import hf_peft
from peftjax.core import paths
from peftjax.methods import arithmetic
from peftjax.methods.combine import KINDS
from peftjax.methods.lora_weight import LoRA
from peftjax.models import gpt2, llama
from tests.golden.make_bert import draw
from tests.parity.reference import GOLDEN, compute, decoder, inputs

pytestmark = [
  pytest.mark.parity,
  # Of a density of 1, of Conv1D kernels and of tables that are saved.
  pytest.mark.filterwarnings("ignore"),
]
_TOKENS = inputs(96, length=9)[0][:2]
_FAMILY = {"llama_tiny": llama, "gpt2_tiny": gpt2}


@functools.cache
def _ours(base, scan=False):
  return pj.load_pretrained(GOLDEN / base, scan_layers=scan)


def _theirs(base, configs, folder):
  """The model with adapters "tree0", "tree1", ... of drawn numbers, which are saved to folders."""
  made = None
  for i, fields in enumerate(configs):
    config = LoraConfig(task_type="CAUSAL_LM", **fields)
    if made is None:
      made = get_peft_model(decoder(GOLDEN / base), config, "tree0")
    else:
      made.add_adapter(f"tree{i}", config)
  draw(made, 5, "lora_")
  made.save_pretrained(folder)
  return made


def _loaded(base, configs, folder, scan=False):
  model, params = _ours(base, scan)
  trees = [hf_peft.load(folder / f"tree{i}", params, model)[0] for i in range(len(configs))]
  return model, trees


def _added(theirs, weights, kind, rank, density):
  """peft's ΔW of the sum by module, less the scale √r that rsLoRA's new adapter is left with."""
  names = [f"tree{i}" for i in range(len(weights))]
  theirs.add_weighted_adapter(
    names, list(weights), "new", kind, svd_rank=rank, density=density, svd_full_matrices=False
  )
  found = {}
  for name, module in theirs.base_model.model.named_modules():
    if isinstance(module, LoraLayer):
      found[name] = module.get_delta_weight("new").detach().numpy() / module.scaling["new"]
  return found


def _combined(base, trees, weights, kind, rank, density):
  key = jax.random.key(0) if kind.startswith("dare") else None
  return pj.combine_adapters(trees, weights, kind, rank=rank, density=density, key=key)


def _deltas(base, params):
  family, found = _FAMILY[base], {}
  for path, leaf in paths.leaves(params).items():
    if isinstance(leaf, LoRA):
      name, delta = family.hf_name(path).removesuffix(".weight"), np.asarray(leaf.delta())
      found[name] = delta.T if family.OUT_FIRST and path.endswith("kernel") else delta
  return found


def _of(rank, alpha, *targets, **fields):
  targets = list(targets) or ["q_proj", "k_proj", "down_proj"]
  return {"r": rank, "lora_alpha": alpha, "target_modules": targets, **fields}


_EQUAL = [_of(4, 8), _of(4, 3), _of(4, 1)]
_TABLE = [_of(3, 6, "embed_tokens", "o_proj"), _of(3, 2, "embed_tokens", "o_proj")]
_RS = [_of(4, 8, use_rslora=True), _of(4, 3, use_rslora=True)]
_UNEQUAL = [_of(2, 8), _of(5, 3), _of(4, 1, "q_proj", "v_proj")]
_PATTERNS = [_of(4, 8, alpha_pattern={"k_proj": 3}, rank_pattern={"down_proj": 2})] * 2
_WIDE = [_of(4, 8, "c_attn", "wte"), _of(4, 5, "c_attn", "wte")]
_MIXED = [_of(4, 8), _of(4, 3, "q_proj", "v_proj")]
_FIVE = ("linear", "cat", "svd", "ties", "ties_svd")
_PRUNING = [kind for kind in KINDS if kind not in ("svd", "cat", "linear")]
# Random entries are peft's own; at a density of 1 there are none.
_density = lambda kind: 1.0 if kind.startswith("dare") else 0.4 if kind in _PRUNING else None

_CASES = [
  *(("llama_tiny", _EQUAL, (0.7, -0.4, 1.5), kind, None) for kind in KINDS),
  *(("llama_tiny", _RS, (1.0, 0.5), kind, None) for kind in ("linear", "cat", "svd", "ties")),
  *(("llama_tiny", _MIXED, (0.5, -2.0), k, None) for k in ("linear", "ties", "cat", "ties_svd")),
  *(("llama_tiny", _PATTERNS, (0.3, 0.6), kind, None) for kind in ("linear", "cat", "ties")),
  *(("llama_tiny", _UNEQUAL, (0.7, -0.4, 1.0), kind, None) for kind in ("cat", "svd", "ties_svd")),
  *(("llama_tiny", _UNEQUAL, (0.7, 0.4, 1.0), "svd", rank) for rank in (1, 9)),
  *(
    ("llama_tiny", _TABLE, (0.7, 0.4), kind, None) for kind in ("linear", "cat", "svd", "ties_svd")
  ),
  *(
    ("gpt2_tiny", _WIDE, (-0.7, 0.4), k, None) for k in ("linear", "cat", "svd", "ties", "ties_svd")
  ),
  *(("llama_tiny", _EQUAL[:1], (0.7,), kind, None) for kind in ("linear", "cat", "svd")),
]


@pytest.mark.parametrize("base, configs, weights, kind, rank", _CASES, ids=lambda x: str(x)[:40])
def test_every_matrix_of_the_sum(base, configs, weights, kind, rank, tmp_path):
  theirs = _theirs(base, configs, tmp_path)
  _, trees = _loaded(base, configs, tmp_path)
  want = _added(theirs, weights, kind, rank, _density(kind))
  got = _deltas(base, _combined(base, trees, weights, kind, rank, _density(kind)))
  assert set(got) == set(want)
  for name, delta in want.items():
    assert np.abs(delta).max() > 0
    np.testing.assert_allclose(
      got[name], delta, atol=2e-5 * np.abs(delta).max(), rtol=0, err_msg=name
    )


@pytest.mark.parametrize("kind, density", [("linear", None), ("cat", None), ("ties", 0.3)])
def test_logits_of_a_scanned_model(kind, density, tmp_path):
  base, weights = "llama_tiny", (0.6, -0.3, 0.2)
  theirs = _theirs(base, _EQUAL, tmp_path)
  model, trees = _loaded(base, _EQUAL, tmp_path, scan=True)
  _added(theirs, weights, kind, None, density)
  theirs.set_adapter("new")
  want = compute(theirs, [_TOKENS]).logits.numpy()
  got = pj.apply(model, _combined(base, trees, weights, kind, None, density), _TOKENS)
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_dare_drops_as_many_and_keeps_the_mean():
  """Of one factor, over draws: peft's entries and ours are alike, and so the shares of zeros."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 8, 12)).astype(np.float32)
  weights, density, draws = np.array([0.7, -0.4], np.float32), 0.3, 400
  torch.manual_seed(0)
  tensors = [torch.from_numpy(each) for each in x]
  theirs = [dare_linear(tensors, torch.from_numpy(weights), density).numpy() for _ in range(draws)]
  uniform = lambda shape: rng.random(shape, np.float32)
  ours = [
    arithmetic.weighted(arithmetic.dropped(x, density, uniform), weights) for _ in range(draws)
  ]
  assert stats.ks_2samp(np.ravel(theirs), np.ravel(ours)).pvalue > 1e-3
  zeros = lambda drawn: np.mean(np.ravel(drawn) == 0)
  assert abs(zeros(theirs) - zeros(ours)) < 0.01 and abs(zeros(ours) - 0.49) < 0.01
  exact, spread = arithmetic.weighted(x, weights), np.std(ours, axis=0).max() / np.sqrt(draws)
  assert np.abs(np.mean(ours, axis=0) - exact).max() < 5 * spread
