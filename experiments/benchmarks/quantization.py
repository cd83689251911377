"""Quantising and dequantising a 4096 x 4096 matrix against bitsandbytes.

  python -m experiments.benchmarks.quantization --out=quantization.jsonl

NF4 in blocks of 64 with double quantisation. A dequantisation is timed into a buffer that is there
("warm": ours donates it, the peer's kernel is handed it) and into fresh memory; a product is that
of 2,048 tokens with the quantised matrix. Both sides have the same threads or, where there is one,
the same GPU, each its own process, and take turns. Costs are medians. Needs `make parity`'s
packages.
"""

from absl import app, flags

from experiments import runtime
from experiments.benchmarks import report, turns

OUT = flags.DEFINE_string("out", None, "Append the rows to this file as JSON lines.")
SIZE = flags.DEFINE_integer("size", 4096, "Rows and columns of the matrix.")
TURNS = flags.DEFINE_integer("turns", 6, "Number of turns that each side takes.")
STEPS = flags.DEFINE_integer("steps", 5, "Repetitions per turn.")
ALONE = flags.DEFINE_bool("alone", False, "Our side only, where the peer's packages are missing.")

OPERATIONS = ("quantize", "dequantize_warm", "dequantize_fresh", "matmul")
DTYPES = ("float32", "bfloat16")


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  rows = [compare(operation, dtype) for operation in OPERATIONS for dtype in DTYPES]
  report.end(f"NF4 with double quantisation, {SIZE.value}²", rows, OUT.value)


def compare(operation: str, dtype: str) -> report.Row:
  args = (operation, dtype, str(SIZE.value), "cuda" if report.gpu() else "cpu")
  workers = turns.sides("quantization", *args, alone=ALONE.value)
  # A turn's first step finds the other side's caches: not counted.
  seconds = turns.medians(workers, TURNS.value, STEPS.value, uncounted=1)
  for worker in workers:
    worker.close()
  return report.Row.of(f"{operation}_{dtype}", [1e3 * s for s in seconds], "ms")


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
