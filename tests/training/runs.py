"""Reading and comparing workdirs."""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from peftjax.training.logs import TIME_FIELDS

RESULT_TIME_FIELDS = ("seconds", "seconds_to_first_step", "peak_memory_mb")


def rows(workdir: pathlib.Path) -> list[dict]:
  """`metrics.jsonl` without the fields that depend on the clock."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k not in TIME_FIELDS} for line in lines]


def result(workdir: pathlib.Path) -> dict:
  """`result.json` without the fields that depend on the clock."""
  fields = json.loads((workdir / "result.json").read_text())
  return {key: value for key, value in fields.items() if key not in RESULT_TIME_FIELDS}


def arrays(workdir: pathlib.Path, name: str) -> tuple[int, dict[str, np.ndarray]]:
  """Step and arrays by path of the checkpoint `latest` or `best`, read by Orbax alone."""
  folder = (workdir / "checkpoints" / name).absolute()
  [step] = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
  with ocp.PyTreeCheckpointer() as checkpointer:
    saved = checkpointer.metadata(folder / str(step) / "arrays").item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    tree = checkpointer.restore(folder / str(step) / "arrays", restore_args=as_numpy)
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def assert_same(got: pathlib.Path, want: pathlib.Path) -> None:
  """Both runs agree bit for bit in all but the fields that depend on the clock."""
  assert rows(got) == rows(want)
  assert result(got) == result(want)
  for name in ("latest", "best"):
    (step, new), (old_step, old) = arrays(got, name), arrays(want, name)
    assert (name, step, sorted(new)) == (name, old_step, sorted(old))
    for path, array in old.items():
      assert array.dtype == new[path].dtype, path
      np.testing.assert_array_equal(new[path], array, err_msg=f"{name} {path}")
  exported = sorted(path.name for path in (want / "peft").glob("*"))
  assert sorted(path.name for path in (got / "peft").glob("*")) == exported
  for file in exported:
    assert (got / "peft" / file).read_bytes() == (want / "peft" / file).read_bytes(), file


def contents(folder: pathlib.Path) -> dict[str, bytes | None]:
  """Every file (and folder, as None) below `folder` with its bytes."""
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
    for path in sorted(folder.rglob("*"))
  }
