"""Our LoRA step against Hugging Face PEFT's on torch, on a model of each kind.

  python -m experiments.benchmarks.family_step --out=family_step.jsonl

A decoder (SmolLM2-135M, batch 4 x 256, all linear layers), an encoder-decoder of T5-small's shape
(8 x 128 tokens to 64, all linear layers) and a ViT of the tiny shape (16 images of 224 x 224, query
and value), the last two with random weights. Float32, AdamW, r = 8, each model's own dropout; both
sides train the same weights on the same batch with the same threads, each in its own process, and
take turns. Costs are medians. Needs `make parity`'s packages.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import runtime
from experiments.benchmarks import report
from experiments.benchmarks.turns import Worker, medians

# Hugging Face configurations of models with random weights; batch and tokens of a row by family.
RANDOM: Mapping[str, Mapping[str, Any]] = {
  "t5": dict(
    d_model=512,
    d_kv=64,
    d_ff=2048,
    num_layers=6,
    num_heads=8,
    vocab_size=32128,
    decoder_start_token_id=0,
  ),
  "vit": dict(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768),
}
SHAPES = {"decoder": (4, 256), "t5": (8, 128), "vit": (16, 224)}

OUT = flags.DEFINE_string("out", None, "Append the rows to this file as JSON lines.")
FAMILIES = flags.DEFINE_list("families", [*SHAPES], f"Of {', '.join(SHAPES)}.")
TURNS = flags.DEFINE_integer("turns", 4, "How often the sides change.")
STEPS = flags.DEFINE_integer("steps", 2, "Steps of a turn.")
OURS, PEER = "experiments.benchmarks.family_ours", "experiments.benchmarks.family_peer"


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  if set(FAMILIES.value) - {*SHAPES}:
    raise app.UsageError(f"--families takes {', '.join(SHAPES)}")
  with tempfile.TemporaryDirectory() as folder:
    for family in FAMILIES.value:
      rows, length = SHAPES[family]
      args = (family, directory(family, Path(folder)), str(rows), str(length))
      env = {"PEFTJAX_BENCHMARK_CACHE": folder}
      workers = [Worker(OURS, *args, env=env), Worker(PEER, *args)]
      # A turn's first step finds the other side's caches: not counted.
      seconds = medians(workers, TURNS.value, STEPS.value, uncounted=1)
      peaks = [worker.close() for worker in workers]
      made = [
        report.Row.of(f"family_{family}", [1e3 * s for s in seconds], "ms"),
        report.Row.of(f"family_{family}_peak_mem", peaks, "MiB", "resident"),
      ]
      report.end(f"LoRA step of a {family}, batch {rows} x {length}", made, OUT.value)


def directory(family: str, folder: Path) -> str:
  """The model of a family: the sample, or one with random weights that transformers saves."""
  if family not in RANDOM:
    from peftjax.data import samples

    return str(samples.model("smollm2"))
  import transformers

  transformers.set_seed(0)
  config = transformers.AutoConfig.for_model(family, **RANDOM[family])
  kind = {
    "t5": transformers.T5ForConditionalGeneration,
    "vit": transformers.ViTForImageClassification,
  }[family]
  if family == "vit":
    config.num_labels = 10
  kind(config).save_pretrained(folder / family)
  return str(folder / family)


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
