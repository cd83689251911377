"""Continues prompts with a fine-tuned language model, or answers them with an encoder-decoder.

  python -m experiments.generate --workdir=DIR --prompt="Shares in the airline"
  python -m experiments.generate --workdir=DIR --chat --prompt="What is NF4?" --temperature=0.7

  python -m experiments.generate --workdir=DIR --part=test --output=written.jsonl

Prints each prompt and the best checkpoint's continuation; with --base, before that the
continuation of the model before it was trained. --part takes the prompts of one part of the run's
data, each once, and --output writes the texts for experiments.score.
"""

import json
from pathlib import Path

from absl import app, flags

from experiments import runtime

WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of a run of experiments.train with configs/causal_lm.py or configs/seq2seq.py, here or "
  "in a bucket.",
  required=True,
)
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
PART = flags.DEFINE_enum(
  "part", None, ("train", "validation", "test"), "Prompts of the data that the run was made on."
)
OUTPUT = flags.DEFINE_string("output", None, "Write JSON lines of prompt and text, print nothing.")
BATCH = flags.DEFINE_integer("batch", 32, "Prompts at a time.", lower_bound=1)
TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens to write, at most.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "0 takes the likeliest token; above it tokens are drawn.", lower_bound=0.0
)
TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Draw among the likeliest tokens that sum up to this.", 0.0, 1.0
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0, upper_bound=2**31 - 1)
CHAT = flags.DEFINE_bool("chat", False, "Put the prompt into the model's chat template.")
BASE = flags.DEFINE_bool("base", False, "Also show the model's continuation before training.")


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  if not PROMPT.value and not PART.value:
    raise ValueError('no prompt; write --prompt="...", or --part=test for those of the run')
  runtime.check_output("--output", OUTPUT.value)
  if OUTPUT.value and BASE.value:
    raise ValueError("--output has the texts of one model; leave --base out")
  runtime.set_up("~/.cache/peftjax")
  from peftjax.training.logs import write_atomic
  from peftjax.training.writer import Writer

  for name in ("before training", "after training") if BASE.value else ("",):
    writer = Writer(WORKDIR.value, adapted=name != "before training")
    prompts = [*PROMPT.value, *(writer.prompts(PART.value) if PART.value else ())]
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH.value):
      texts += writer.write(
        prompts[start : start + BATCH.value],
        max_new_tokens=TOKENS.value,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        seed=SEED.value,
        as_chat=CHAT.value,
      )
    made = list(zip(prompts, texts, strict=True))
    if OUTPUT.value:
      rows = (json.dumps({"prompt": p, "text": t.strip()}, ensure_ascii=False) for p, t in made)
      write_atomic(Path(OUTPUT.value), "".join(f"{row}\n" for row in rows))
      return
    between = " => " if CHAT.value or writer.answers else ""
    for prompt, text in made:
      print(f"{f'[{name}] ' if name else ''}{prompt}{between}{text}\n")


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
