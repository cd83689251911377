"""Sphinx: `make docs` builds these pages, any warning an error, and fetches nothing."""

import os
import pathlib
import re
import sys

FOLDER = pathlib.Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import generate  # noqa: E402

os.environ["PYTHONPATH"] = str(FOLDER.parent)  # the kernels of notebooks run this checkout

project = "peftjax"
author = "The peftjax authors"
extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.mathjax",
  "sphinx.ext.napoleon",
]
html_theme = "furo"
html_title = "peftjax"
# Fragments that pages include; they are no pages.
exclude_patterns = ["generated/tables", "generated/benchmarks", "generated/parts"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Shown by name: what they allow is in `peftjax.core.ranges`.
_RANGES = ("Count", "Fraction", "Length", "NotNegative", "Positive", "Size")
autodoc_type_aliases = {name: name for name in _RANGES}
python_use_unqualified_type_names = True
autosummary_generate = False  # tables alone: the pages are those of `generate`
napoleon_numpy_docstring = False
default_role = "code"  # docstrings write `name`


def as_rest(app, what, name, obj, options, lines):
  """Escapes docstrings, which are plain text: |x| is not a substitution, nor "r." a list item."""
  lines[:] = [re.sub(r"^(\s+)(?=[A-Za-z]\.( |$))", r"\1\\", x.replace("|", r"\|")) for x in lines]


def by_name(app, what, name, obj, options, signature, returned):
  """Strips the forward references that `autodoc_type_aliases` leaves inside unions."""
  plain = lambda text: text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text)
  return plain(signature), plain(returned)


def setup(app):
  app.connect("builder-inited", lambda app: generate.write(FOLDER / "generated"), priority=100)
  app.connect("autodoc-process-docstring", as_rest, priority=900)  # napoleon's comes before
  app.connect("autodoc-process-signature", by_name)
  app.connect("build-finished", generate.write_llms)
