"""What a writer gives the model and makes of its ids, without a model."""

import json

import numpy as np
import pytest

from peftjax.training import writer
from tests.golden import tokenizer_dirs


@pytest.fixture
def made(tmp_path, monkeypatch):
  """Makes a `Writer` of a directory of `tokenizer_dirs`, and lists what the model was given."""

  def make(name, answer, **files):
    folder = tokenizer_dirs.write(name, tmp_path / "model")
    for file, content in files.items():
      (folder / file.replace("__", ".")).write_text(content)
    given = []

    def generate(model, params, tokens, mask, **how):
      rows = [np.asarray(t)[np.asarray(m)].tolist() for t, m in zip(tokens, mask, strict=True)]
      given.append((rows, how["stop"]))
      new = np.asarray([answer] * len(rows))
      return new, np.full(len(rows), len(answer))

    monkeypatch.setattr(writer, "generate", generate)
    one = writer.Writer.__new__(writer.Writer)
    one.path, one.model, one.params = folder, None, None
    one._read_tokenizer()
    return one, given

  return make


CONFIG = json.dumps({"model_type": "llama", "eos_token_id": 2})


def test_prompts_begin_as_texts_do(made):
  """<s>, and no </s> though this tokenizer puts it behind a text."""
  one, given = made("llama2_eos", [285], config__json=CONFIG)
  texts = one.write(["the", "the film"])
  [(rows, stop)] = given
  tokenizer = one._tokenizer
  assert rows == [tokenizer.encode(text).ids[:-1] for text in ("the", "the film")]
  assert all(row[0] == 1 for row in rows) and stop == (2,)
  for text, row, new in zip(("the", "the film"), rows, texts, strict=True):
    assert tokenizer.decode([*row, 285]) == text + new


def test_a_chat_has_the_template_and_its_tokens_once(made):
  one, given = made(
    "llama2",
    [285, 2],
    config__json=CONFIG,
    chat_template__jinja="{{ bos_token }}[INST] {{ messages[0].content }} [/INST]",
    generation_config__json='{"eos_token_id": [2, 7]}',
  )
  [text] = one.write(["the"], as_chat=True)
  [([row], stop)] = given
  assert row.count(1) == 1 and row[0] == 1 and stop == (2, 7)
  assert one._tokenizer.decode(row).strip() == "[INST] the [/INST]"
  assert text == one._tokenizer.continuation(row, [285])


def test_a_prompt_without_tokens_is_refused(made):
  """Of a tokenizer that puts nothing before a text."""
  config = json.dumps({"model_type": "gpt2", "eos_token_id": 0})
  one, given = made("gpt2", [5], config__json=config)
  with pytest.raises(ValueError, match="the prompt '' has no tokens"):
    one.write(["the", ""])
  assert not given


def test_what_ends_a_text_is_typed(made):
  with pytest.raises(ValueError, match="generation_config.json: eos_token_id is 'x'"):
    made("llama2", [5], config__json=CONFIG, generation_config__json='{"eos_token_id": "x"}')
