"""Writes what transformers renders of `chat_templates.TEMPLATES`.

Run:   python -m tests.golden.make_chat_templates
With:  transformers 5.23.0, jinja2 3.1.6
"""

import json
from pathlib import Path

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from tests.golden.chat_templates import CONVERSATIONS, SPECIAL, TEMPLATES


def rendered(template: str, conversation: list[dict[str, str]]) -> str | None:
  try:
    texts, _ = render_jinja_template(
      [conversation], chat_template=template, add_generation_prompt=True, **SPECIAL
    )
  except TemplateError:
    return None
  return texts[0]


def main() -> None:
  found = {
    name: [rendered(template, conversation) for conversation in CONVERSATIONS]
    for name, template in TEMPLATES.items()
  }
  text = json.dumps(found, ensure_ascii=False, indent=1) + "\n"
  Path(__file__).with_name("chat_templates.json").write_text(text, "utf-8")


if __name__ == "__main__":
  main()
