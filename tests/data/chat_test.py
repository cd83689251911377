"""Chat templates: as transformers renders them, and what they may not do."""

import json
import os

import pytest

from peftjax.data import chat, chat_renderer
from tests.golden.chat_templates import CONVERSATIONS, SPECIAL, TEMPLATES, golden

USER = [{"role": "user", "content": "h\xe9"}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
  """Each on several conversations: the text, or that the template refuses; here in this process."""
  for said, want in zip(CONVERSATIONS, golden()[name], strict=True):
    values = chat.values(said, SPECIAL)
    if want is None:
      with pytest.raises(Exception, match="alternate|no system|namespace"):
        chat_renderer.render(TEMPLATES[name], values, 10**6)
    else:
      assert chat_renderer.render(TEMPLATES[name], values, 10**6) == want


def test_another_process_renders_the_same_without_standard_input():
  """As where a service starts the program."""
  kept = os.dup(0)
  os.close(0)
  try:
    text = chat.render(TEMPLATES["llama2"], CONVERSATIONS[3], SPECIAL)
  finally:
    os.dup2(kept, 0)
    os.close(kept)
  assert text == golden()["llama2"][3]


@pytest.mark.parametrize(
  "template, told",
  [
    ("{{ raise_exception('no system role') }}", "no system role"),
    ("{{ 1 + 'a' }}", "TypeError"),
    ("{% for %}", "TemplateSyntaxError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{{ raise_exception('x' * 99999) }}", "TemplateError: x{400,500}\\."),
  ],
)
def test_every_error_of_a_template_is_one_sentence(template, told):
  with pytest.raises(ValueError, match=f"cannot render this conversation: .*{told}") as caught:
    chat.render(template, USER)
  assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
  "template, error",
  [
    ("{{ 1 / 0 }}", "division"),
    ("{{ messages[7].content }}", "has no element 7"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ strftime_now.__globals__['os'] }}", "undefined|unsafe"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "recursion"),
    ("{{ 10 ** 5000 }}", "digits"),
    ("{% for i in range(999999) %}{% endfor %}", "[Rr]ange too big"),
    ("{% for i in range(9999) %}{{ 'a' * 999 }}{% endfor %}", "more than 99999 characters"),
  ],
)
def test_what_a_template_may_not_do(template, error):
  with pytest.raises(Exception, match=error):
    chat_renderer.render(template, chat.values(USER, {}), 99999)


@pytest.mark.parametrize(
  "template, told",
  [("{{ 9 ** (9 ** 8) }}", "more time or memory"), ("{{ 'a' * 1000000000 }}", "MemoryError")],
)
def test_time_and_memory_are_bounded(template, told, monkeypatch):
  monkeypatch.setattr(chat, "SECONDS", 1)
  with pytest.raises(ValueError, match=told):
    chat.render(template, USER)


def write(folder, files):
  for name, content in files.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
  return folder


_NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]


@pytest.mark.parametrize(
  "files, name, want",
  [
    ({"tokenizer_config.json": {"chat_template": "A"}}, "default", "A"),
    ({"tokenizer_config.json": {"chat_template": _NAMED}}, "default", "D"),
    ({"tokenizer_config.json": {"chat_template": _NAMED}}, "tool_use", "T"),
    ({"tokenizer_config.json": {"chat_template": "A"}, "chat_template.jinja": "J"}, "default", "J"),
    ({"chat_template.jinja": "J", "additional_chat_templates/rag.jinja": "R"}, "rag", "R"),
    ({"chat_template.jinja": "J", "additional_chat_templates/rag.jinja": "R"}, "default", "J"),
  ],
)
def test_where_a_template_is_found(files, name, want, tmp_path):
  """A file comes before tokenizer_config.json; a list holds several by name."""
  assert chat.template(write(tmp_path, files), name) == want


@pytest.mark.parametrize(
  "files, told",
  [
    ({}, "has no chat template"),
    ({"tokenizer_config.json": {"chat_template": None}}, "has no chat template"),
    ({"tokenizer_config.json": {"chat_template": 7}}, "chat_template is 7; it must be a text or"),
    ({"tokenizer_config.json": {"chat_template": [{"name": "a"}]}}, "it must be a text or a list"),
    ({"tokenizer_config.json": {"chat_template": _NAMED[1:]}}, "tool_use and none named 'default'"),
    ({"tokenizer_config.json": "{"}, "does not hold readable JSON"),
  ],
)
def test_no_template_is_one_sentence(files, told, tmp_path):
  with pytest.raises(ValueError, match=told):
    chat.template(write(tmp_path, files))
