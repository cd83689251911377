"""Continues prompts with a fine-tuned language model.

  python -m experiments.generate --workdir=DIR --prompt="Shares in the airline"
  python -m experiments.generate --workdir=DIR --chat --prompt="What is NF4?" --temperature=0.7

Prints each prompt and what the best checkpoint writes after it; with --base, before that what the
model wrote before it was trained.
"""

from absl import app, flags

from experiments import runtime

WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of a run of experiments.train with configs/causal_lm.py, here or in a bucket.",
  required=True,
)
PROMPT = flags.DEFINE_multi_string(
  "prompt", None, "A prompt; may be given several times.", required=True
)
TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens to write, at most.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "0 takes the likeliest token; above it tokens are drawn.", lower_bound=0.0
)
TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Draw among the likeliest tokens that sum up to this.", 0.0, 1.0
)
SEED = flags.DEFINE_integer("seed", 0, "Of the drawing.", lower_bound=0, upper_bound=2**31 - 1)
CHAT = flags.DEFINE_bool("chat", False, "Put the prompt into the model's chat template.")
BASE = flags.DEFINE_bool("base", False, "Also show what the model wrote before training.")


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  runtime.set_up("~/.cache/peftjax")
  from peftjax.training.writer import Writer

  for name in ("before training", "after training") if BASE.value else ("",):
    writer = Writer(WORKDIR.value, adapted=name != "before training")
    texts = writer.write(
      PROMPT.value,
      max_new_tokens=TOKENS.value,
      temperature=TEMPERATURE.value,
      top_p=TOP_P.value,
      seed=SEED.value,
      as_chat=CHAT.value,
    )
    for prompt, text in zip(PROMPT.value, texts, strict=True):
      print(f"{f'[{name}] ' if name else ''}{prompt}{' => ' if CHAT.value else ''}{text}\n")


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
