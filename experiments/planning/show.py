"""A plan for people: a table, a picture, and a refusal if it is too much."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
from rich.table import Table

from experiments.planning import costs
from experiments.planning.chips import GIB, Chip
from experiments.planning.model import Planned
from experiments.planning.search import Tried
from peftjax import sharding
from peftjax.core import tree
from peftjax.core.mesh import group

CLASSES = (
  "codes",
  "scales",
  "dense base",
  "adapters",
  "optimizer",
  "gradients",
  "temporaries",
  "batch",
  "code",
)
_LESS = {
  "codes": "split the base over more devices (--mesh=fsdp:-1)",
  "scales": "split the base over more devices (--mesh=fsdp:-1)",
  "dense base": "quantise it (quant=nf4) or split it over more devices (--mesh=fsdp:-1)",
  "adapters": "a lower rank, or more devices (--mesh=fsdp:-1)",
  "optimizer": "--config.optimizer.name=adamw8bit, a lower rank, or more devices (--mesh=fsdp:-1)",
  "gradients": "a lower rank, or more devices (--mesh=fsdp:-1)",
  "temporaries": "fewer or shorter rows, or --config.model.remat=layer",
  "batch": "fewer or shorter rows",
  "code": "--config.model.scan_layers=true",
}


class TooMuch(ValueError):
  """The arrays of a step are more than the memory of a chip, whatever is computed."""


def before(planned: Planned, chip: Chip | None) -> None:
  """Shows the program to be compiled; refuses one that does not fit whatever the compiler does.

  Raises:
    TooMuch: the arrays that the step takes are more than the chip's memory.
  """
  sizes = {name: size for name, size in planned.mesh.shape.items() if size > 1}
  spread = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "one device"
  rows, length = planned.batch["tokens"].shape
  where = f"{planned.mesh.size} x {chip.name}" if chip else f"{planned.mesh.size} of this machine"
  print(f"{rows} rows of {length} tokens on {where} ({spread})", flush=True)
  if chip is None:
    return
  classes = costs.held(planned)
  usable = int(chip.memory * (1 - costs.RESERVE))
  if (total := sum(classes.values())) > usable:
    raise TooMuch(_too_much(classes, total, usable, chip))


def leaves(planned: Planned, count: int) -> None:
  """Shows a table of the largest arrays of the parameters."""
  table = Table(title=f"the {count} largest arrays on a device")
  for name in ("array", "shape", "dtype", "split over"):
    table.add_column(name, overflow="fold")
  table.add_column("MiB on a device", justify="right")
  everything = tree.combine(planned.state.train, planned.frozen)
  for place in sharding.places(everything, planned.mesh, planned.rules)[:count]:
    spec = ", ".join(" x ".join(group(names)) or "-" for names in place.spec)
    size = f"{place.bytes / 2**20:,.2f}"
    table.add_row(place.path, " x ".join(map(str, place.shape)), place.dtype, spec, size)
  rich.get_console().print(table)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
  with rich.get_console().status("compiling, which takes some minutes"):
    yield


def after(row: Mapping[str, Any]) -> None:
  """Shows the table of a plan."""
  table = Table(title=f"one {row['chip']} of {row['devices']}")
  table.add_column("bytes on a device")
  table.add_column("GiB", justify="right")
  for name in CLASSES:
    table.add_row(name, f"{row['bytes'][name] / GIB:.3f}")
  table.add_section()
  table.add_row("peak, by the compiler", f"{row['bytes']['peak'] / GIB:.2f}")
  if "usable" in row:
    table.add_row("of the chip's memory, less a reserve", f"{row['usable'] / GIB:.2f}")
  rich.get_console().print(table)
  sent = ", ".join(f"{kind} {size / 2**20:,.1f} MiB" for kind, size in row["sent_bytes"].items())
  print(f"{row['tflop']:.2f} TFLOP per step, {row['tflop_with_remat']:.2f} with recomputation")
  print(f"a device receives per step: {sent or 'nothing'}")
  if "step_seconds" in row:
    print(
      f"at best {row['step_seconds']:.3f} s per step, bound by {row['bound_by']}: "
      f"{row['tokens_per_second']:,.0f} tokens/s, {100 * row['share_of_peak']:.0f} % of peak"
    )
    print(f"rows of {row['length']} tokens that fit: about {row['rows_that_fit']}")


def tried(found: Sequence[Tried]) -> None:
  """Shows a table of the programs compiled in search of the fastest."""
  table = Table(title="tried")
  for name in ("mesh", "kept per layer", "rows", "batches per update"):
    table.add_column(name)
  for name in ("GiB at the peak", "fits", "tokens/s at best"):
    table.add_column(name, justify="right")
  for c, row in found:
    told = ("", "no", "")
    if row is not None:
      rate = f"{row['tokens_per_second']:,.0f}"
      told = (f"{row['bytes']['peak'] / GIB:.2f}", "yes" if row["fits"] else "no", rate)
    table.add_row(c.mesh, c.kept, str(c.rows), str(c.accumulate), *told)
  rich.get_console().print(table)


def excess(row: Mapping[str, Any], chip: Chip) -> str:
  """The reason why a plan is refused, and what to change."""
  classes = {name: row["bytes"][name] for name in CLASSES}
  return _too_much(classes, row["bytes"]["peak"], row["usable"], chip)


def _too_much(classes: Mapping[str, int], total: int, usable: int, chip: Chip) -> str:
  largest = max(classes, key=lambda name: classes[name])
  return (
    f"{total / GIB:.1f} GiB are {(total - usable) / GIB:.1f} more than a {chip.name} has "
    f"({usable / GIB:.1f} GiB with a reserve). Most are {largest}, {classes[largest] / GIB:.1f} "
    f"GiB: {_LESS[largest]}."
  )


def picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
  """Draws stacked bars of the bytes by class, one bar per plan."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 1.5 + 0.6 * len(rows)), layout="constrained")
  axes = figure.subplots()
  left = [0.0] * len(rows)
  names = [f"{row.get('label', row['chip'])}\n{row['rows']} x {row['length']}" for row in rows]
  for name in CLASSES:
    widths = [row["bytes"][name] / GIB for row in rows]
    axes.barh(range(len(rows)), widths, left=left, label=name)
    left = [a + b for a, b in zip(left, widths, strict=True)]
  axes.set_yticks(range(len(rows)), names)
  axes.invert_yaxis()
  axes.set_xlabel("GiB on a device")
  figure.legend(loc="outside upper center", ncols=5, frameon=False)
  figure.savefig(path)
