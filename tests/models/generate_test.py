"""Generation: what a loop without a cache would write, stops, padding, drawing."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core import paths
from peftjax.methods.lora_weight import LoRA
from peftjax.models.generate import draw, generate
from tests.core.programs import jit

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPTS = np.array([[5, 6, 7, 8], [9, 10, 11, 12]], np.int32)


def adapted(name="llama3_tiny", fmt=None, scan=True):
  """A model, quantised if asked for, with an adapter that does something."""
  model, params = pj.load_pretrained(GOLDEN / name, scan_layers=scan)
  layout = pj.linen.layout(model, PROMPTS)
  if fmt:
    params = pj.quantize(params, fmt, layout=layout)
  params = pj.lora(2, 4, "all-linear").attach(jax.random.key(0), params, layout)
  stir = lambda w: w.replace(b=w.b + 0.05) if isinstance(w, LoRA) else w
  return model, jax.tree.map(stir, params, is_leaf=paths.is_leaf)


def by_hand(model, params, prompt, count):
  """The likeliest token after all tokens so far, `count` times, without a cache."""
  forward = jit(lambda p, tokens: pj.apply(model, p, tokens))
  tokens = list(prompt)
  for _ in range(count):
    row = np.pad(tokens, (0, 16 - len(tokens)))[None]  # no token sees what comes after it
    tokens.append(int(forward(params, row)[0, len(tokens) - 1].argmax()))
  return tokens[len(prompt) :]


@pytest.mark.fast_for(".*None.*")
@pytest.mark.parametrize(
  "name, fmt, scan",
  [
    ("llama3_tiny", None, False),
    ("llama3_tiny", pj.quant.nf4(32), True),
    ("gpt2_tiny", None, True),
  ],
)
def test_greedy_is_the_likeliest_token_each_time(name, fmt, scan):
  """With an adapter, dense or in four bits, scanned or not."""
  model, params = adapted(name, fmt, scan)
  new, counts = generate(model, params, PROMPTS, max_new_tokens=6)
  assert counts.tolist() == [6, 6]
  for row, prompt in zip(new, PROMPTS, strict=True):
    assert row.tolist() == by_hand(model, params, prompt, 6)


def test_padding_before_a_prompt_changes_nothing():
  """A short prompt beside a long one continues as alone."""
  model, params = adapted()
  tokens = np.array([[0, 0, 5, 6], [9, 10, 11, 12]], np.int32)
  new, _ = generate(model, params, tokens, tokens > 0, max_new_tokens=5)
  assert new[0].tolist() == by_hand(model, params, [5, 6], 5)


def test_a_text_ends_at_its_stop_token():
  """The stop token is its last, padding follows, and the other text goes on."""
  model, params = adapted()
  free, _ = generate(model, params, PROMPTS, max_new_tokens=6)
  one, two = free.tolist()
  at = next(i for i, token in enumerate(one) if token not in two and token not in one[:i])
  new, counts = generate(model, params, PROMPTS, max_new_tokens=6, stop=[one[at]], pad_id=77)
  assert counts.tolist() == [at + 1, 6]
  assert new[0].tolist() == one[: at + 1] + [77] * (5 - at) and new[1].tolist() == two


def test_drawing_follows_the_probabilities():
  """Frequencies of 4,000 draws; top-p keeps the fewest tokens that reach it, and always one."""
  logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))[None]
  keys = jax.random.split(jax.random.key(0), 4000)
  often = lambda t, p: (
    np.bincount(jax.vmap(lambda k: draw(k, logits, t, p)[0])(keys), minlength=4) / 4000
  )
  np.testing.assert_allclose(often(1.0, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
  np.testing.assert_allclose(often(1.0, 0.7), [0.625, 0.375, 0, 0], atol=0.03)
  np.testing.assert_allclose(often(1.0, 1e-6), [1, 0, 0, 0])
  hot = np.array([0.5, 0.3, 0.15, 0.05]) ** 0.5
  np.testing.assert_allclose(often(2.0, 1.0), hot / hot.sum(), atol=0.03)


def test_drawn_texts_depend_on_the_key_alone():
  """One key, one text; another key, another."""
  model, params = adapted()
  write = lambda seed: generate(
    model, params, PROMPTS, max_new_tokens=8, temperature=1.5, key=jax.random.key(seed)
  )[0].tolist()
  assert write(0) == write(0) != write(1)


@pytest.mark.parametrize(
  "how, message",
  [
    (dict(max_new_tokens=29), "do not fit in the 32 positions"),
    (dict(max_new_tokens=0), "do not fit"),
    (dict(max_new_tokens=2, temperature=-1.0), "temperature -1.0 is not a number of at least 0"),
    (dict(max_new_tokens=2, temperature=float("nan")), "temperature nan is not a number"),
    (dict(max_new_tokens=2, top_p=0.0), "top_p 0.0"),
    (dict(max_new_tokens=2, temperature=1.0), "key=jax.random.key"),
  ],
)
def test_what_cannot_be_done_is_refused(how, message):
  model, params, *_ = adapted()
  with pytest.raises(ValueError, match=message):
    generate(model, params, PROMPTS, **how)
