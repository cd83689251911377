"""A conversation as the text a model was trained to continue."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftjax.io import gguf


def template(path: str | Path) -> str:
  """The Jinja template of a Hugging Face directory or a GGUF file.

  Raises:
    ValueError: if it has none: the model was not trained on conversations.
  """
  path = Path(path)
  if path.suffix == ".gguf":
    found = gguf.metadata(path, "tokenizer.chat_template")
  elif (path / "chat_template.jinja").is_file():
    found = (path / "chat_template.jinja").read_text(encoding="utf-8")
  else:
    config = path / "tokenizer_config.json"
    found = json.loads(config.read_text("utf-8")).get("chat_template") if config.is_file() else None
  if not isinstance(found, str):
    raise ValueError(f"{path} has no chat template: give the prompt as plain text instead")
  return found


def render(template: str, messages: Sequence[dict[str, str]], **tokens: Any) -> str:
  """The conversation, up to where the model is to answer.

  Args:
    template: in Jinja; it is rendered in a sandbox, as it comes with the model.
    messages: {"role": "system", "user" or "assistant", "content": ...}.
    tokens: `bos_token`, `eos_token`, as templates call them.

  Raises:
    ValueError: if the template refuses the conversation.
  """
  from jinja2.exceptions import TemplateError
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  def refuse(message: str) -> None:
    raise TemplateError(message)

  environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
  environment.globals["raise_exception"] = refuse
  try:
    return environment.from_string(template).render(
      messages=list(messages), add_generation_prompt=True, **tokens
    )
  except TemplateError as error:
    raise ValueError(f"the chat template cannot render this conversation: {error}") from error
