"""Our QLoRA step against Hugging Face PEFT's with bitsandbytes.

  python -m experiments.benchmarks.qlora_step --out=qlora_step.jsonl

Linear layers in NF4 with double quantisation, r = 16 on all of them, gradient checkpointing, AdamW:
both sides train on the same tokens, each in its own process, and take turns. Costs are medians.
Needs `make parity`'s packages.

On a CPU: SmolLM2-135M, batch 4 x 256, float32, the same weights and threads; memory is the peak
resident size of the process. On a GPU that JAX can use: bfloat16 activations, and Llamas of 1.3 and
7 billion random weights too, batch 4 x 1024; memory is the most that the process had allocated on
the GPU. Both count loading. The share of peak is of the FLOP/s the GPU does at most in dense
bfloat16 products; `shapes.step_flops` says what counts as an operation of a step.
"""

from absl import app, flags

from experiments import runtime
from experiments.benchmarks import report, shapes, turns
from peftjax.training import flops

OUT = flags.DEFINE_string("out", None, "Append the rows to this file as JSON lines.")
MODEL = flags.DEFINE_list(
  "model", None, f"One of {', '.join(shapes.MODELS)}; by default all on a GPU, on a CPU the first."
)
BATCH = flags.DEFINE_integer("batch", 4, "Rows per batch.")
LENGTH = flags.DEFINE_integer("length", None, "Tokens per row; by default 256, for a Llama 1024.")
TURNS = flags.DEFINE_integer("turns", 5, "Number of turns that each side takes.")
STEPS = flags.DEFINE_integer("steps", 2, "Steps per turn.")
ALONE = flags.DEFINE_bool("alone", False, "Our side only, where the peer's packages are missing.")


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  models = MODEL.value or (shapes.MODELS if report.gpu() else shapes.MODELS[:1])
  if strange := set(models) - set(shapes.MODELS):
    raise app.UsageError(f"--model={','.join(sorted(strange))}: not of {', '.join(shapes.MODELS)}")
  for model in models:
    length = LENGTH.value or (1024 if model in shapes.RANDOM else 256)
    rows = compare(model, BATCH.value, length)
    report.end(f"QLoRA of {model}, batch {BATCH.value} x {length}", rows, OUT.value)


def compare(model: str, batch: int, length: int) -> list[report.Row]:
  gpu = report.gpu()
  args = (model, str(batch), str(length), "cuda" if gpu else "cpu")
  workers = turns.sides("qlora_step", *args, alone=ALONE.value)
  seconds = turns.medians(workers, TURNS.value, STEPS.value)
  memory = [worker.close() for worker in workers]
  speed = f"{batch * length / seconds[0]:,.0f} tokens/s"
  if peak := flops.peak(gpu):
    done = shapes.step_flops(shapes.config(model), batch, length) / seconds[0]
    speed += f", {done / peak:.0%} of peak"
  suffix = f"_{model}" if model in shapes.RANDOM else ""
  where = "on the GPU" if gpu else "resident"
  return [
    report.Row.of(f"qlora_step{suffix}", seconds, "s", speed),
    report.Row.of(f"qlora_peak_mem{suffix}", memory, "MiB", where),
  ]


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
