"""Damaged inputs of every kind: refused in one sentence, or read as an independent parser does.

  python -m tests.fuzz --inputs=10000 --seed=0
  python -m tests.fuzz --kind=adapter --only=1234 --seed=0

A case is a function of seed, kind and number alone. Workers have a limit of memory, and a case that
takes longer than 20 s is a hang. Exit code 1 and a line each if there was a silent acceptance, an
unclear exception, a hang or a crash.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
from pathlib import Path

from rich.progress import track

from tests.fuzz.harness import FAULTS, judge, kinds, plan, run
from tests.fuzz.kind import Kind


def main() -> int:
  parser = argparse.ArgumentParser(
    prog="python -m tests.fuzz",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--inputs", type=int, default=10_000, help="how many in all")
  parser.add_argument("--seed", type=int, default=0, help="of the damage")
  parser.add_argument("--kind", action="append", choices=sorted(kinds()), help="only this one")
  parser.add_argument("--only", type=int, help="one case by its number, in this process")
  parser.add_argument("--workers", type=int, default=2, help="processes")
  given = parser.parse_args()
  chosen = given.kind or list(kinds())
  print(f"seed {given.seed}", flush=True)
  if given.only is not None:
    return _one(kinds()[chosen[0]], given.seed, given.only)
  jobs = plan(given.inputs, chosen)
  counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  seen: collections.Counter[str] = collections.Counter()
  cases = run(jobs, given.seed, given.workers)
  for (name, number), verdict in track(cases, "fuzz", total=len(jobs)):
    counts[name][verdict.outcome] += 1
    if verdict.outcome in FAULTS:
      alike = f"{name} {verdict.outcome} {verdict.told[:40]}"
      seen[alike] += 1
      if seen[alike] <= 5:
        print(f"{verdict.outcome}: --kind={name} --only={number}: {verdict.told}", flush=True)
  outcomes = ("accepted", "refused", *FAULTS)
  print(f"{'kind':<14}" + "".join(f"{outcome:>10}" for outcome in outcomes))
  for name, found in counts.items():
    print(f"{name:<14}" + "".join(f"{found[outcome]:>10}" for outcome in outcomes))
  faults = sum(found[outcome] for found in counts.values() for outcome in FAULTS)
  print(f"{len(jobs)} inputs with seed {given.seed}: {faults} faults")
  return 1 if faults else 0


def _one(kind: Kind, seed: int, number: int) -> int:
  """Shows one case; its folder stays."""
  root = Path(tempfile.mkdtemp(prefix="fuzz"))
  sound = root / "sound"
  sound.mkdir()
  kind.prepare(sound)
  verdict = judge(kind, seed, number, sound, root / kind.name)
  print(f"{root / kind.name}\n{verdict.outcome}: {verdict.told}")
  return 1 if verdict.outcome in FAULTS else 0


if __name__ == "__main__":
  sys.exit(main())
