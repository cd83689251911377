"""A conversation as the text a model was trained to continue."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftjax.io import gguf, records

# Limits on a template; those of real models take some milliseconds and kilobytes.
SECONDS = 2  # computing time; ten times as much may pass in waiting
MEMORY = 2**29
CHARACTERS = 2**22  # rendered: as many tokens as the longest contexts have
_RENDERER = Path(__file__).with_name("chat_renderer.py")


def template(path: str | Path, name: str = "default") -> str:
  """The Jinja template of a Hugging Face directory or a GGUF file.

  Files named *.jinja come before `tokenizer_config.json`, as in transformers: if there is any, the
  latter's are not read.

  Args:
    name: which, if there are several, as "tool_use".

  Raises:
    ValueError: if it has none: the model was not trained on conversations; if it has several but
      none of that name.
  """
  path = Path(path)
  if path.suffix == ".gguf":
    found: Any = gguf.chat_templates(path)
  else:
    found = _files(path) or _configured(path / "tokenizer_config.json")
  if found and isinstance(found, Mapping):
    if name not in found:
      raise ValueError(
        f"{path} has the chat templates {', '.join(sorted(found))} and none named {name!r}. Put the"
        " one to take into a file chat_template.jinja there."
      )
    found = found[name]
  if not isinstance(found, str):
    raise ValueError(f"{path} has no chat template: give the prompt as plain text instead")
  return found


def render(
  template: str,
  messages: Sequence[Mapping[str, str]],
  special: Mapping[str, str] | None = None,
) -> str:
  """The conversation, up to where the model is to answer, as transformers renders it.

  The template comes with the model and is not trusted: another process renders it, in a sandbox,
  with little time, memory and output. The text has its special tokens: tokenise it without adding
  any.

  Args:
    template: the text of the template, in Jinja.
    messages: {"role": "system", "user" or "assistant", "content": ...}.
    special: tokens by the names that templates have for them: bos_token, eos_token, ...

  Raises:
    ValueError: if the template refuses the conversation, is damaged, or takes too much time,
      memory or output.
  """
  request = {
    "limits": {"seconds": SECONDS, "memory": MEMORY, "characters": CHARACTERS},
    "path": [part for part in sys.path if isinstance(part, str)],
    "template": template,
    "values": values(messages, special or {}),
  }
  try:
    done = subprocess.run(
      [sys.executable, "-P", str(_RENDERER)],
      input=json.dumps(request).encode(),
      capture_output=True,
      timeout=10 * SECONDS,
      check=False,
    )
    answer = json.loads(done.stdout)
  except subprocess.TimeoutExpired:
    answer = {"error": f"it takes more than {10 * SECONDS} s"}
  except ValueError:  # it died before it could say why
    answer = {"error": "it takes more time or memory than a template is given"}
  if "text" not in answer:
    told = answer["error"].rstrip(".")
    raise ValueError(
      f"the chat template cannot render this conversation: {told}. Give the prompt as plain text"
      " instead."
    )
  return answer["text"]


def values(messages: Sequence[Mapping[str, str]], special: Mapping[str, str]) -> dict[str, Any]:
  """The names that a template finds, as transformers' `apply_chat_template` has them."""
  found = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
  return {**special, **found, "add_generation_prompt": True}


def _files(folder: Path) -> dict[str, str] | str | None:
  """chat_template.jinja, and others by name in additional_chat_templates."""
  found = {}
  for path in (folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")):
    if path.exists():
      try:
        text = records.read_bytes(path).decode()
      except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}).") from None
      found["default" if path.parent == folder else path.stem] = text
  return found


def _configured(path: Path) -> dict[str, str] | str | None:
  """`chat_template` of tokenizer_config.json: a text, or a list of named ones."""
  found = records.read_object(path).get("chat_template") if path.exists() else None
  if isinstance(found, list):
    named = [t for t in found if isinstance(t, dict)]
    named = [
      t for t in named if isinstance(t.get("name"), str) and isinstance(t.get("template"), str)
    ]
    if len(named) == len(found):
      return {t["name"]: t["template"] for t in named}
  if not isinstance(found, str | None):
    raise ValueError(
      f"{path}: chat_template is {records.clip(found)}; it must be a text or a list of"
      ' {"name": ..., "template": ...}.'
    )
  return found
