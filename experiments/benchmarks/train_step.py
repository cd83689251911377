"""Our training step against Hugging Face PEFT's on torch.

  python -m experiments.benchmarks.train_step --out=step.jsonl

MiniLM, float32, AdamW, r = 8, the model's own dropout of 0.1; both sides train the same weights on
the same batch with the same threads, each in its own process, and take turns. Costs are medians.
Needs `make parity`'s packages. About four minutes on two cores.
"""

import tempfile

from absl import app, flags

from experiments import runtime
from experiments.benchmarks import report
from experiments.benchmarks.turns import Worker, medians

OUT = flags.DEFINE_string("out", None, "Append the rows to this file as JSON lines.")
MODEL = flags.DEFINE_string("model", "", "A Hugging Face directory; by default MiniLM.")
CASES = flags.DEFINE_list("cases", ["query_value", "all_linear", "full"], "Parts to fine-tune.")
BATCH = flags.DEFINE_integer("batch", 32, "Rows per batch.")
LENGTH = flags.DEFINE_integer("length", 64, "Tokens per row.")
TURNS = flags.DEFINE_integer("turns", 8, "Number of turns that each side takes.")
STEPS = flags.DEFINE_integer("steps", 5, "Steps per turn.")

OURS, PEER = "experiments.benchmarks.step_ours", "experiments.benchmarks.step_peer"


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  from peftjax.data import samples

  directory = str(MODEL.value or samples.model("minilm"))
  rows = []
  with tempfile.TemporaryDirectory() as cache:
    for case in CASES.value:
      rows += compare(case, [case, directory, str(BATCH.value), str(LENGTH.value)], cache)
  report.end(f"Training step, batch {BATCH.value} x {LENGTH.value}", rows, OUT.value)


def compare(case: str, args: list[str], cache: str) -> list[report.Row]:
  """Seconds of a step, and for the first case memory and start, cold and with programs kept."""
  env = {"PEFTJAX_BENCHMARK_CACHE": cache}
  ours, peer = Worker(OURS, *args, env=env), Worker(PEER, *args)
  # A turn's first step finds the other side's caches: not counted.
  seconds = medians([ours, peer], TURNS.value, STEPS.value, uncounted=1)
  peaks = ours.close(), peer.close()
  rows = [report.Row.of(f"step_{case}", [1e3 * s for s in seconds], "ms")]
  if case == CASES.value[0]:
    rows.append(report.Row("peak_mem", *peaks, "MiB", f"resident, {case}"))
    rows.append(
      report.Row("start_seconds_cold", ours.start_seconds, peer.start_seconds, "s", "to 1st step")
    )
    again, other = Worker(OURS, *args, env=env), Worker(PEER, *args)
    again.close(), other.close()
    rows.append(
      report.Row("start_seconds_warm", again.start_seconds, other.start_seconds, "s", "to 1st step")
    )
  return rows


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
