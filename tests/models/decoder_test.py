"""Decoders: transformers' logits, scanned and unrolled, cached and at once, sharing a row."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import peftjax as pj
from peftjax.core import paths
from peftjax.models import match, stack
from peftjax.models.cache import Cache
from tests.core.programs import jit

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.name.endswith("_tiny"))
NAMES = [name for name in NAMES if not name.startswith(("bert", "roberta"))]
RARE = pytest.mark.slow(reason="the same law for more models")
LATER = ("qwen3_tiny", "phi3_tiny", "mixtral_tiny", "qwen3_moe_tiny")
SOME = [pytest.param(n, marks=RARE if n in LATER else []) for n in NAMES]


def load(name, **how):
  return *pj.load_pretrained(GOLDEN / name, **how), load_file(
    GOLDEN / name / "expected.safetensors"
  )


def real(expected, logits):
  """Logits of real tokens; what stands on padding is of no account."""
  return np.asarray(logits)[expected["mask"] > 0]


@pytest.mark.fast_for(".*-scanned|(bnb|gpt2|llama3)_tiny-unrolled")
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(name, scan):
  """From the files transformers wrote, padding before the texts included."""
  model, params, expected = load(name, scan_layers=scan)
  got = jit(lambda p: pj.apply(model, p, expected["tokens"], expected["mask"]))(params)
  np.testing.assert_allclose(real(expected, got), real(expected, expected["logits"]), atol=1e-4)


@pytest.mark.fast_for("gpt2_tiny-unrolled|(llama3|gemma3)_tiny-scanned")
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", SOME)
def test_a_cache_gives_the_logits_of_all_at_once(name, scan):
  """Nine tokens, then one after the other: as transformers computes them in one go."""
  model, params, expected = load(name, scan_layers=scan)
  step = jit(lambda p, tokens, mask, cache: pj.apply(model, p, tokens, mask, cache=cache))
  cache, seen = Cache.empty(model.config, 4, 20), []
  for start, stop in [(0, 9), *((i, i + 1) for i in range(9, 14))]:
    part = slice(start, stop)
    logits, cache = step(params, expected["tokens"][:, part], expected["mask"][:, part], cache)
    seen.append(logits)
  got = jnp.concatenate(seen, axis=1)
  np.testing.assert_allclose(real(expected, got), real(expected, expected["logits"]), atol=1e-4)
  assert cache.index == 14


@pytest.mark.fast_for("gpt2_tiny")
@pytest.mark.parametrize("name", ["llama3_tiny", "gpt2_tiny"])
def test_documents_in_one_row_do_not_see_each_other(name):
  """Two texts packed into one row have the logits they have alone."""
  model, params, _ = load(name)
  tokens = jnp.asarray(np.random.default_rng(0).integers(1, 96, (1, 12)), jnp.int32)
  segments = jnp.array([[1] * 5 + [2] * 7])
  positions = jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None]
  forward = jit(lambda params, *given: pj.apply(model, params, *given))
  packed = forward(params, tokens, None, positions, segments)
  alone = [forward(params, part) for part in (tokens[:, :5], tokens[:, 5:])]
  np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=1e-5)
  mixed = pj.apply(model, params, tokens)
  assert np.abs(mixed[:, 5:] - packed[:, 5:]).max() > 0.1


@pytest.mark.slow(reason="4 programs, 8 s a family")
@pytest.mark.parametrize(
  "name",
  [
    "llama3_tiny",
    *(
      pytest.param(name, marks=RARE)
      for name in ("qwen2_tiny", "gemma2_tiny", "gemma3_tiny", "phi3_tiny", "gpt2_tiny")
    ),
  ],
)
def test_remat_and_scan_have_the_same_gradients(name):
  """Gradients of every parameter, layers unrolled or scanned, kept or computed again."""
  _, _, expected = load(name)
  tokens, mask = expected["tokens"], expected["mask"]
  weigh = jnp.cos(jnp.arange(96.0))[None, None] * mask[..., None]

  def gradients(**how):
    """By the unrolled model's paths."""
    model, params, _ = load(name, **how)
    grads = jit(jax.grad(lambda p: (pj.apply(model, p, tokens, mask) * weigh).sum()))(params)
    found = {}
    for path, grad in paths.leaves(grads).items():
      layers = paths.layer_paths(path, match.stack_of(path, grad))
      found.update(zip(layers, grad if len(layers) > 1 else [grad], strict=True))
    return found

  plain = gradients()
  scanned = dict(scan_layers=True)
  for how in (dict(remat=True), scanned, *(scanned | dict(remat=x) for x in (True, *stack.REMAT))):
    chex.assert_trees_all_close(gradients(**how), plain, rtol=1e-4, atol=2e-4)


def test_too_long_a_text_is_refused():
  """Instead of reading positions that are not there."""
  model, params, _ = load("gpt2_tiny")
  with pytest.raises(ValueError, match="33 tokens, but this model has 32 positions"):
    pj.apply(model, params, jnp.ones((1, 33), jnp.int32))


@pytest.mark.parametrize("name, path", [("llama3_tiny", "model"), ("gpt2_tiny", "transformer")])
def test_all_linear_is_the_projections_of_the_layers(name, path):
  """Not the table, nor the head of an untied model."""
  _, params, _ = load(name)
  found = pj.select(params, "all-linear")
  assert found and all(p.startswith(f"{path}/layers_") and p.endswith("kernel") for p in found)
  assert len(found) == (14 if name == "llama3_tiny" else 8)
