"""Labels texts with a trained adapter.

  python -m experiments.predict --workdir=DIR --text="Shares rose after the earnings report"
  python -m experiments.predict --workdir=DIR --file=texts.txt --output=labels.jsonl

Prints one line a text: the label, its probability and the text (for a regression, the value).
"""

import json

from absl import app, flags

from experiments import runtime

WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of a run of experiments.train.", required=True
)
TEXT = flags.DEFINE_multi_string("text", [], "A text; may be given several times.")
FILE = flags.DEFINE_string("file", None, "A UTF-8 file with one text a line.")
OUTPUT = flags.DEFINE_string(
  "output", None, "Also write JSON lines with every class's probability."
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}; quote a text: --text="..."')
  runtime.set_up("~/.cache/peftjax")
  from peftjax.training.predict import Predictor, probabilities

  with runtime.readable_errors():
    texts = read_texts(TEXT.value, FILE.value)
    predictor = Predictor(WORKDIR.value)
    logits = predictor.logits(texts)
    rows = []
    for text, row in zip(texts, logits, strict=True):
      if not predictor.labels:
        rows.append({"text": text, "value": float(row[0])})
        print(f"{row[0]:.4f}\t{text}")
        continue
      p = probabilities(row)
      named = dict(zip(predictor.labels, map(float, p), strict=True))
      rows.append(
        {"text": text, "label": predictor.labels[int(p.argmax())], "probabilities": named}
      )
      print(f"{rows[-1]['label']}\t{p.max():.3f}\t{text}")
    if OUTPUT.value:
      with open(OUTPUT.value, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_texts(given: list[str], path: str | None) -> list[str]:
  """The texts of the flags and of the file's non-empty lines."""
  texts = list(given)
  if path:
    try:
      with open(path, encoding="utf-8") as file:
        texts += [line.strip() for line in file if line.strip()]
    except OSError as error:
      raise ValueError(f"--file: {error}") from None
    except UnicodeDecodeError as error:
      raise ValueError(
        f"--file: {path} is not UTF-8 (byte {error.start}); convert it: "
        f"iconv -f LATIN1 -t UTF-8 {path}"
      ) from None
  if not texts:
    raise ValueError('no text; write --text="..." or --file=FILE with one text a line')
  return texts


if __name__ == "__main__":
  app.run(main)
