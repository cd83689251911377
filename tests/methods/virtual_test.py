"""Prefixes and prompts: what attends to them, what is never scored, in encoders and decoders."""

import pathlib
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core import paths
from peftjax.models.bert import BertClassifier
from peftjax.models.cache import Cache
from tests.core.programs import jit
from tests.models import tiny

KEY = jax.random.key(0)
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TOKENS = np.array([[3, 5, 7, 11, 2, 9], [4, 4, 8, 1, 6, 2]], np.int32)
METHODS = {
  "prefix": pj.prefix(3, deviation=0.5),
  "prompt": pj.prompt(3),
}
FAMILIES = ("llama_tiny", "mistral_tiny", "gpt2_tiny")


def load(family, method, scan=False):
  model, params = pj.load_pretrained(GOLDEN / family, scan_layers=scan)
  layout = pj.linen.layout(model, TOKENS)
  return model, params, method.attach(KEY, params, layout)


def logits(model, params, *args, **kwargs):
  return jit(lambda p: pj.apply(model, p, *args, **kwargs))(params)


@pytest.mark.fast_for("prefix-llama_tiny|prompt-gpt2_tiny")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_scanned_and_unrolled_decoders_agree(name, family):
  outputs = []
  for scan in (False, True):
    model, params, attached = load(family, METHODS[name], scan)
    outputs.append(logits(model, attached, TOKENS))
  assert outputs[0].shape[:2] == TOKENS.shape
  np.testing.assert_allclose(*outputs, rtol=2e-5, atol=2e-5)
  assert np.abs(outputs[0] - logits(model, params, TOKENS)).max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_words_is_these_words_before_the_text(family):
  """Same logits as the plain model has on the longer text, at the text's own places."""
  model, params, attached = load(family, METHODS["prompt"])
  ids = np.array([[13, 17, 19]] * 2, np.int32)
  body = next(p for p in paths.leaves(attached) if p.endswith("prompt/embeddings")).split("/")[0]
  table = next(
    x for p, x in paths.leaves(params).items() if re.search(r"(tokens|wte)/embedding", p)
  )
  prompt = attached[body]["prompt"].replace(embeddings=table[ids[0]])
  attached = {**attached, body: {**attached[body], "prompt": prompt}}
  want = logits(model, params, np.concatenate([ids, TOKENS], 1))[:, 3:]
  np.testing.assert_allclose(logits(model, attached, TOKENS), want, rtol=1e-5, atol=1e-5)


@pytest.mark.fast_for("gpt2_tiny")
@pytest.mark.parametrize("family", ["llama_tiny", "gpt2_tiny"])  # no window slides past a prefix
def test_a_prefix_of_a_texts_own_keys_and_values_is_that_text(family):
  """The caches of words, put in as a prefix, do what the words did."""
  model, params, attached = load(family, METHODS["prefix"])
  ids = np.array([[13, 17, 19]], np.int32)
  cache = Cache.empty(model.config, 1, 3)
  _, cache = pj.apply(model, params, ids, cache=cache)
  pairs = dict(enumerate(cache.layers))

  def fill(path, node):
    layer = int(path.split("layers_")[1].split("/")[0])
    return pairs[layer][0 if path.endswith("keys") else 1][0]

  attached = paths.map_leaves(lambda p, x: fill(p, x) if "/prefix/" in p else x, attached)
  want = logits(model, params, np.concatenate([ids, TOKENS[:1]], 1))[:, 3:]
  np.testing.assert_allclose(logits(model, attached, TOKENS[:1]), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama_tiny", "gpt2_tiny"])
@pytest.mark.parametrize("name", METHODS)
def test_every_document_of_a_packed_row_has_the_virtual_tokens(name, family):
  """Two documents in one row, against each alone."""
  model, _, attached = load(family, METHODS[name])
  row = np.concatenate([TOKENS[0], TOKENS[1]])[None]
  segments = np.array([[1] * 6 + [2] * 6], np.int32)
  positions = np.array([[*range(6), *range(6)]], np.int32)
  packed = logits(model, attached, row, segments > 0, positions, segments)
  alone = logits(model, attached, TOKENS)
  np.testing.assert_allclose(packed.reshape(alone.shape), alone, rtol=1e-5, atol=1e-5)


def test_a_window_slides_over_a_packed_row_as_over_its_documents_alone():
  """The second document is no farther from the prompt than the first."""
  model, _, attached = load("mistral_tiny", METHODS["prompt"])
  assert model.config.window == 4
  row = np.concatenate([TOKENS[0], TOKENS[1]])[None]
  segments = np.array([[1] * 6 + [2] * 6], np.int32)
  positions = np.array([[*range(6), *range(6)]], np.int32)
  packed = logits(model, attached, row, segments > 0, positions, segments)
  alone = logits(model, attached, TOKENS)
  np.testing.assert_allclose(packed.reshape(alone.shape), alone, rtol=1e-5, atol=1e-5)


def test_a_window_does_not_count_padding_between_prompt_and_text():
  """All at once and by the cache, as the text alone."""
  model, _, attached = load("mistral_tiny", METHODS["prompt"])
  padded, mask = np.pad(TOKENS, [(0, 0), (2, 0)]), np.ones((2, 8), bool)
  mask[:, :2] = False

  @jit
  def cached(params):
    cache = Cache.empty(model.config, 2, 3 + 8)
    first, cache = pj.apply(model, params, padded[:, :4], mask[:, :4], cache=cache)
    rest, _ = pj.apply(model, params, padded[:, 4:], cache=cache)
    return jnp.concatenate([first, rest], 1)

  alone = logits(model, attached, TOKENS)
  for got in (logits(model, attached, padded, mask), cached(attached)):
    np.testing.assert_allclose(got[:, 2:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.fast_for(".*-True")
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_generation_goes_on_as_the_whole_text_would(name, scan):
  """Greedy tokens by the cache are the argmax of the logits of what there is so far."""
  model, _, attached = load("llama_tiny", METHODS[name], scan)
  left = np.array([[False, True, True, True, True, True], [True] * 6])
  new, _ = pj.generate(model, attached, TOKENS, left, max_new_tokens=4)
  tokens, mask = jnp.asarray(TOKENS), jnp.asarray(left)
  for i in range(4):
    want = logits(model, attached, tokens, mask)[:, -1].argmax(-1)
    np.testing.assert_array_equal(new[:, i], want)
    tokens = jnp.concatenate([tokens, want[:, None].astype(jnp.int32)], 1)
    mask = jnp.concatenate([mask, jnp.ones((2, 1), bool)], 1)


@pytest.mark.parametrize("name", METHODS)
def test_an_encoder_does_not_see_padding_behind_virtual_tokens(name):
  """Logits of a padded text are those of the text alone."""
  model = BertClassifier(tiny.config())
  params = METHODS[name].attach(KEY, tiny.params(), pj.linen.layout(model, tiny.TOKENS))
  padded = np.array([[5, 6, 7, 0, 0, 0]], np.int32)
  one = logits(model, params, padded, padded > 0)
  two = logits(model, params, padded[:, :3], padded[:, :3] > 0)
  np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
  states, _ = logits(model, params, padded, padded > 0, hidden=True)
  assert states.shape[:2] == padded.shape


@pytest.mark.parametrize("name", METHODS)
def test_virtual_tokens_count_against_the_positions(name):
  model, _, attached = load("gpt2_tiny", METHODS[name])
  longest = model.config.max_length
  row = np.ones((1, longest - 2), np.int32)
  with pytest.raises(
    ValueError, match=rf"{longest - 2} tokens and 3 virtual ones, but .*{longest}"
  ):
    pj.apply(model, attached, row)
  with pytest.raises(ValueError, match="do not fit"):
    pj.generate(model, attached, row[:, :-2], max_new_tokens=2)


@pytest.mark.fast_for("prefix")
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_the_same_where_activations_are_computed_again(name):
  """In a scan, as configs/causal_lm.py trains."""
  found = []
  for remat in (False, True):
    model, params = pj.load_pretrained(GOLDEN / "llama_tiny", scan_layers=True, remat=remat)
    params = METHODS[name].attach(KEY, params, pj.linen.layout(model, TOKENS))
    train, frozen = pj.partition(params, METHODS[name].trainable(params))
    loss = lambda t, f, model=model: jnp.sin(pj.apply(model, pj.combine(t, f), TOKENS)).sum()
    found.append(jit(jax.grad(loss))(train, frozen))
  chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-5)
  assert all(np.any(x) for x in jax.tree.leaves(found[1]))


class Attention(nn.Module):
  """A third party's, called as ours is."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(8, name="k_proj")(x)


class Body(nn.Module):
  @nn.compact
  def __call__(self, ids):
    return Attention(name="self_attn")(nn.Embed(20, 6, name="wte")(ids))


class Foreign(nn.Module):
  def setup(self):
    self.body = Body()

  def __call__(self, ids):
    return self.body(ids)

  def doubled(self, x):
    return 2 * x


@pytest.mark.parametrize(
  ("name", "path"), [("prefix", "body/self_attn/prefix"), ("prompt", "body/prompt")]
)
def test_what_no_module_reads_is_told(name, path):
  """Of a third party's model: it would be trained with a gradient of zero."""
  model = Foreign()
  params = model.init(KEY, TOKENS)["params"]
  attached = METHODS[name].attach(KEY, params)
  with pytest.raises(ValueError, match=f"no module of this model reads {path}"):
    jax.eval_shape(lambda p: pj.apply(model, p, TOKENS), attached)
  # What is no call of the whole model need not read all of it.
  assert pj.apply(model, attached, TOKENS, method="doubled").shape == TOKENS.shape


def test_wrong_arguments_and_models_are_told():
  for make in (pj.prefix, pj.prompt):
    with pytest.raises(ValueError, match="length=0: write"):
      make(0)
    with pytest.raises(ValueError, match=r"\.\.\./"):
      make(2).attach(KEY, {"dense": {"kernel": jnp.ones((2, 3))}})
    _, _, attached = load("llama_tiny", make(2))
    with pytest.raises(ValueError, match="has a pr"):
      make(2).attach(KEY, attached)
  with pytest.raises(ValueError, match="init 'words' is not one of vocabulary, normal"):
    pj.prompt(2, init="words")
