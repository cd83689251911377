"""One feed-forward block, its backward pass by hand, against three other ways to have it.

  python -m experiments.benchmarks.feed_forward --out=feed_forward.jsonl

`autodiff` differentiates the plain formula, `checkpoint` does so under `jax.checkpoint`, and with
`activation` only the activation's derivative is by hand, as in our models' blocks. For each
variant, at BERT-base's shape with as many parameters when gated:

  saved  values that one block's backward pass keeps, beside the parameters: residuals of `jax.vjp`
  layer  additional memory per layer in the compiled program of a scan over layers
  time   of value and gradients in x and all parameters, compiled; medians, the ways take turns
  frozen the same with the parameters frozen, as where only other layers are adapted

float32. About six minutes on two cores that nothing else uses.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import app, flags

from experiments import runtime, timing
from experiments.benchmarks import report
from experiments.tables import report as tables
from peftjax.nn.feed_forward import VARIANTS, FeedForward, feed_forward, gated_width
from peftjax.nn.ffn import activate

OUT = flags.DEFINE_string("out", None, "Append the rows to this file as JSON lines.")
NAMES = flags.DEFINE_list("variants", list(VARIANTS), "Variants to measure.")
TOKENS = flags.DEFINE_integer("tokens", 1024, "Tokens, T.")
WIDTH = flags.DEFINE_integer("width", 768, "D.")
FFN = flags.DEFINE_integer("ffn", 3072, "F of the variants that are not gated.")
TURNS = flags.DEFINE_integer("turns", 8, "Number of turns that each way takes.")

MIB = 2**20
PLAIN: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  "identity": lambda z: z,
  "relu": jax.nn.relu,
  "sigmoid": jax.nn.sigmoid,
  "gelu": lambda z: jax.nn.gelu(z, approximate=False),
  "gelu_tanh": lambda z: jax.nn.gelu(z, approximate=True),
  "swish": jax.nn.silu,
}
Block = Callable[[Any, jax.Array], jax.Array]  # takes parameters and x


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  runtime.set_up(None)
  if unknown := set(NAMES.value) - set(VARIANTS):
    raise app.UsageError(f"unknown variants {sorted(unknown)}; there are {', '.join(VARIANTS)}")
  rows: list[report.Row] = []
  for name in NAMES.value:
    compared = compare(name)
    rows += compared
    if OUT.value:
      report.write(OUT.value, compared)
  show(f"Feed-forward block, {TOKENS.value} x {WIDTH.value}, {report.machine()}", rows)


def ways(name: str) -> dict[str, Block]:
  """The block by hand, and the ways it is compared with."""
  f = VARIANTS[name].activation
  affine = lambda x, layer: x @ layer["kernel"] + layer["bias"][None]

  def hand(p: Any, x: jax.Array) -> jax.Array:
    (w1, b1), (w2, b2) = ((p[k]["kernel"], p[k]["bias"]) for k in ("up", "down"))
    gate = p.get("gate", {})
    gates = dict(w_gate=gate.get("kernel"), b_gate=gate.get("bias"))
    return feed_forward(x, w1, b1, w2, b2, **gates, activation=f)

  def autodiff(p: Any, x: jax.Array) -> jax.Array:
    z = affine(x, p["up"])
    h = PLAIN[f](affine(x, p["gate"])) * z if "gate" in p else PLAIN[f](z)
    return affine(h, p["down"])

  def activation(p: Any, x: jax.Array) -> jax.Array:
    gate = affine(x, p["gate"]) if "gate" in p else None
    return affine(activate(f, affine(x, p["up"]), gate), p["down"])

  checkpoint = jax.checkpoint(autodiff)
  return dict(hand=hand, activation=activation, autodiff=autodiff, checkpoint=checkpoint)


def compare(name: str) -> list[report.Row]:
  width = gated_width(FFN.value) if VARIANTS[name].gated else FFN.value
  keys = jax.random.split(jax.random.key(0), 3)
  x, g = (jax.random.normal(key, (TOKENS.value, WIDTH.value)) for key in keys[:2])
  params = jax.jit(FeedForward(name, width).init)(keys[2], x)["params"]
  blocks = ways(name)
  saved = {way: saved_mib(block, params, x) for way, block in blocks.items()}
  layer = {way: layer_mib(block, params, x) for way, block in blocks.items()}
  costs = {
    "saved": (saved, "MiB"),
    "layer": (layer, "MiB"),
    "time": (times(blocks, (0, 1), params, x, g), "ms"),
    "frozen": (times(blocks, (1,), params, x, g), "ms"),
  }
  note = f"F = {width}"
  return [
    report.Row(f"{name}_{what}_{way}", cost["hand"], cost[way], unit, note)
    for what, (cost, unit) in costs.items()
    for way in blocks
    if way != "hand"
  ]


def saved_mib(block: Block, params: Any, x: jax.Array) -> float:
  """Size of the residuals of `jax.vjp`, each once; those that are parameters cost nothing."""
  residuals = lambda p, x: jax.tree.leaves(jax.vjp(block, p, x)[1])
  program = jax.make_jaxpr(residuals)(params, x).jaxpr
  there = set(program.invars[: len(jax.tree.leaves(params))])
  kept = {v for v in program.outvars if isinstance(v, type(program.invars[0]))} - there
  return sum(v.aval.size * v.aval.dtype.itemsize for v in kept) / MIB


def layer_mib(block: Block, params: Any, x: jax.Array) -> float:
  """The memory that six scanned layers of a compiled training step hold more than two, by four."""

  def temporaries(layers: int) -> int:
    stack = jax.tree.map(lambda p: jax.ShapeDtypeStruct((layers, *p.shape), p.dtype), params)
    step = lambda x, p: (x + block(p, x), None)
    loss = lambda p, x: jax.lax.scan(step, x, p)[0].sum()
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(stack, x).compile()
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes

  return (temporaries(6) - temporaries(2)) / 4 / MIB


def times(blocks: Mapping[str, Block], of: tuple[int, ...], *args: Any) -> dict[str, float]:
  """Milliseconds of value and gradients, for each way."""
  loss = lambda block: lambda p, x, g: (block(p, x) * g).sum()
  runs = {way: jax.jit(jax.value_and_grad(loss(b), of)) for way, b in blocks.items()}
  calls = [functools.partial(run, *args) for run in runs.values()]
  return dict(zip(runs, timing.medians(calls, TURNS.value), strict=True))


def show(title: str, rows: list[report.Row]) -> None:
  """A line for each variant and cost: ours, and the ratio to ours of each other way."""
  others, lines = ("activation", "autodiff", "checkpoint"), []
  for first in range(0, len(rows), len(others)):
    line = rows[first : first + len(others)]
    name, what, _ = line[0].case.rsplit("_", 2)
    ratios = (f"{row.ratio:.2f}" for row in line)
    lines.append((name, what, line[0].unit, f"{line[0].ours:.1f}", *ratios))
  columns = ("variant", "cost", "unit", "by hand", *others)
  told = "Ratios: their cost over that by hand; above 1 we are ahead."
  tables.write(tables.Report(title, columns, lines, (told,)), "terminal")


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
