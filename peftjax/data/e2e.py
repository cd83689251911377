"""The E2E NLG challenge: descriptions of restaurants from records of them.

Source: Novikova et al., "The E2E Dataset: New Challenges For End-to-End Generation", 2017.
"""

import dataclasses
import re

from peftjax.data import local
from peftjax.data.examples import Corpus
from peftjax.io.records import clip

_FIELD = re.compile(r"\s*([^\[\],]+)\[([^\[\]]*)\]\s*(?:,|$)")


def read(files: dict[str, str]) -> Corpus:
  """The official CSV files, with the columns mr and ref, as prompts and completions.

  Raises:
    ValueError: for what `local.read` raises, or a record of another form.
  """
  corpus = local.read(files, "mr", "ref", None, regression=False)
  splits = {
    part: dataclasses.replace(
      every,
      texts=[prompt(record) for record in every.texts],
      pairs=[f" {text.strip()}" for text in every.pairs or ()],
    )
    for part, every in corpus.splits.items()
  }
  return dataclasses.replace(corpus, name="e2e", splits=splits)


def prompt(record: str) -> str:
  """A record as the text that a description follows.

  >>> prompt("name[The Eagle], food[French], area[riverside]")
  'name : The Eagle | food : French | area : riverside ||'
  """
  fields = _FIELD.findall(record)
  if not fields or _FIELD.sub("", record).strip():
    raise ValueError(
      f"the record {clip(record)} is none of E2E's; write it as name[The Eagle], ..."
    )
  return " | ".join(f"{key} : {value}" for key, value in fields) + " ||"
