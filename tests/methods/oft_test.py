"""OFT: its equation, kernels of several axes, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import peftjax as pj
from peftjax import hf_peft
from peftjax.core.layout import Axes, ConvAxes
from peftjax.methods.oft import OFT
from peftjax.models.bert import BertClassifier
from tests.core.programs import jit
from tests.models import tiny

MODEL = BertClassifier(tiny.config())
rng = np.random.default_rng(0)


def _leaf(shape=(12, 5), entries=3, blocks=4, terms=5, axes=None):
  draw = lambda *s: jnp.asarray(0.2 * rng.standard_normal(s), jnp.float32)
  return OFT(draw(*shape), draw(blocks, entries), axes=axes or Axes(), terms=terms)


def _blocks(leaf):
  """The rotation of a leaf by the papers' formulas, in float64."""
  for row in np.asarray(leaf.q, np.float64):
    size = round((1 + (1 + 8 * len(row)) ** 0.5) / 2)
    skew = np.zeros((size, size))
    skew[np.triu_indices(size, 1)] = row
    skew -= skew.T
    eye = np.eye(size)
    if leaf.terms is None:
      yield (eye - skew) @ np.linalg.inv(eye + skew)
    else:
      series = sum(np.linalg.matrix_power(skew, i) for i in range(leaf.terms - 1))
      yield series + skew @ series


@pytest.mark.parametrize("terms", [4, 5, 6, None])
@pytest.mark.parametrize("blocks, entries", [(4, 3), (1, 66), (2, 15), (1, 3)])
def test_the_weight_is_the_rotated_base(blocks, entries, terms):
  """By blocks, by one of full size, and by one for all; orthogonal if exact."""
  leaf = _leaf(blocks=blocks, entries=entries, terms=terms)
  made = list(_blocks(leaf))
  whole = np.zeros((12, 12))
  for i in range(12 // (size := len(made[0]))):
    at = slice(i * size, (i + 1) * size)
    whole[at, at] = made[i % len(made)]
  want = whole @ np.asarray(leaf.base)
  np.testing.assert_allclose(leaf.materialize(), want, atol=2e-6)
  x = np.asarray(rng.standard_normal((2, 3, 12)), np.float32)
  np.testing.assert_allclose(pj.einsum("btd,df->btf", x, leaf), x @ want, atol=2e-5)
  np.testing.assert_allclose(leaf.unmerged(leaf.materialize()), leaf.base, atol=2e-6)
  if terms is None:
    np.testing.assert_allclose(whole @ whole.T, np.eye(12), atol=1e-12)


def test_few_terms_are_those_of_peft():
  """Two are I + 2Q, and three are four."""
  leaf = _leaf((2, 2), entries=1, blocks=1).replace(base=jnp.eye(2), q=jnp.full((1, 1), 0.3))
  two, three, four = (leaf.replace(terms=n).materialize() for n in (2, 3, 4))
  np.testing.assert_allclose(two, [[1, 0.6], [-0.6, 1]], atol=1e-6)
  np.testing.assert_array_equal(three, four)


@pytest.mark.parametrize(
  "shape, axes, eqn",
  [
    ((12, 3, 2), Axes((-3,), (-2, -1)), "btd,dnh->btnh"),
    ((3, 4, 5), Axes((-3, -2), (-1,)), "btnh,nhd->btd"),
    ((3, 4, 5), Axes((-3, -2), (-1,)), "bntk,nkd->btd"),
  ],
)
def test_kernels_of_several_axes(shape, axes, eqn):
  """As of linen's attention, whatever the order of the activations' axes."""
  leaf = _leaf(shape, axes=axes)
  sizes = dict(zip(eqn.split(",")[1].partition("->")[0], shape, strict=True), b=2, t=3)
  x = np.asarray(rng.standard_normal([sizes[c] for c in eqn.partition(",")[0]]), np.float32)
  want = jnp.einsum(eqn, x, leaf.materialize())
  np.testing.assert_allclose(jit(lambda x: leaf.einsum(eqn, x))(x), want, atol=1e-5)


def test_what_cannot_be_turned_is_refused():
  params = {"up": {"kernel": jnp.ones((12, 4))}, "words": {"embedding": jnp.ones((8, 4))}}
  attach = lambda method, **layout: method.attach(jax.random.key(0), params, layout or None)
  with pytest.raises(ValueError, match="block_size 5 does not divide its 12 inputs; .* as 4"):
    attach(pj.oft(5, "up"))
  with pytest.raises(ValueError, match="words/embedding is a table"):
    attach(pj.oft(2, "words"))
  with pytest.raises(ValueError, match="up/kernel is a convolution"):
    attach(pj.oft(2, "up"), **{"up/kernel": ConvAxes()})
  with pytest.raises(ValueError, match="neumann_terms"):
    pj.oft(neumann_terms=1)
  params = attach(pj.oft(2, "up"))
  with pytest.raises(ValueError, match="has an adapter already"):
    attach(pj.oft(2, "up"))


@pytest.fixture
def saved(tmp_path):
  """A directory of the tiny encoder, with `adapter_config.json` changed, and what was in it."""
  params = tiny.params()
  attached = pj.oft(8).attach(jax.random.key(0), params)
  draw = lambda on, x: jnp.full_like(x, 0.1) if on else x
  attached = jax.tree.map(draw, pj.oft(8).trainable(attached), attached)
  hf_peft.save(tmp_path, attached, MODEL)

  def load(**fields):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return hf_peft.load(tmp_path, params, MODEL)

  return load, attached, tmp_path


def test_a_directory_gives_the_leaves_back(saved):
  load, attached, folder = saved
  jax.tree.map(np.testing.assert_array_equal, load()[0], attached)
  said = json.loads((folder / "adapter_config.json").read_text())
  assert (said["oft_block_size"], said["r"], said["block_share"]) == (8, 0, False)
  names = load_file(folder / "adapter_model.safetensors")
  assert sum(name.endswith(".oft_R.weight") for name in names) == 4


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"coft": True}, "coft=True, which makes more of the adapter"),
    ({"bias": "all"}, "bias='all', which makes more"),
    ({"r": 4}, "r=4 and oft_block_size=8: one of them must be 0"),
    ({"oft_block_size": 4}, r"float32 \(8, 28\); the model means floats of \(16, 6\)"),
    ({"num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms is 1000000000"),
    ({"peft_version": "0.17.1"}, "of a PEFT before 0.18, whose series was another"),
    ({"peft_version": None}, "of a PEFT before 0.18"),
  ],
)
def test_files_that_mean_another_computation_are_refused(saved, fields, message):
  with pytest.raises(ValueError, match=message):
    saved[0](**fields)


def test_blocks_that_one_directory_cannot_say_are_refused(tmp_path):
  """It has one size, from which peft goes to the nearest that divides a module's inputs."""
  params = tiny.params()
  one = pj.chain(pj.oft(8, "query"), pj.oft(4, "value")).attach(jax.random.key(0), params)
  with pytest.raises(ValueError, match=r"of the sizes \[4, 8\], and a PEFT directory"):
    hf_peft.save(tmp_path, one, MODEL)
