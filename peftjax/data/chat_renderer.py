"""A program of its own, which imports nothing of peftjax and renders one chat template.

Reads a request, {"limits", "path", "template", "values"}, as JSON and writes {"text"} or {"error"}.
The environment is that of transformers' `apply_chat_template`.
"""

import datetime
import json
import resource
import sys


def main() -> None:
  request = json.load(sys.stdin)
  limits = request["limits"]
  for kind, value in (
    (resource.RLIMIT_AS, limits["memory"]),
    (resource.RLIMIT_CPU, limits["seconds"]),
  ):
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if most < 0 else min(value, most), most))  # -1: no limit
  sys.path[:] = request["path"]
  try:
    answer = {"text": render(request["template"], request["values"], limits["characters"])}
  except Exception as error:  # a template can raise anything
    told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    answer = {"error": told[:500]}
  sys.stdout.write(json.dumps(answer))


def render(template: str, values: dict, most: int) -> str:
  """The rendered text, at most `most` characters; raises whatever the template does."""
  size, pieces = 0, []
  for piece in environment().from_string(template).generate(values):
    size += len(piece)
    if size > most:
      raise ValueError(f"it renders to more than {most} characters")
    pieces.append(piece)
  return "".join(pieces)


def environment():
  """Jinja as transformers sets it up."""
  from jinja2 import nodes
  from jinja2.exceptions import SecurityError, TemplateError
  from jinja2.ext import Extension, loopcontrols
  from jinja2.sandbox import ImmutableSandboxedEnvironment
  from jinja2.utils import Namespace

  class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, the marks of what an assistant said."""

    tags = {"generation"}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      call = self.call_method("_said")
      return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _said(self, caller):
      return caller()

  class Dict:
    """`dict` without a type's attributes."""

    def __call__(self, *args, **kwargs):
      return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
      return dict.fromkeys(*args, **kwargs)

  class Names(Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args, **kwargs):
      self, given = args[0], dict(*args[1:], **kwargs)
      for name in given:
        check(name)
      Namespace.__init__(self, given)

    def __setitem__(self, name, value):
      check(name)
      Namespace.__setitem__(self, name, value)

  def check(name):
    if isinstance(name, str) and name.startswith("_"):
      raise SecurityError(f"a namespace has no {name!r}")

  def refuse(message):
    raise TemplateError(message)

  def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
      x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  made = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
  )
  made.filters["tojson"] = tojson
  made.globals["raise_exception"] = refuse
  made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  made.globals["dict"] = Dict()
  made.globals["namespace"] = Names
  return made


if __name__ == "__main__":
  main()
