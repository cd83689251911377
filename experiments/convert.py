"""Writes a fine-tuned model, or its adapter, in another format.

  python -m experiments.convert --workdir=DIR --format=hf --output=NEW_DIR
  python -m experiments.convert --base=DIR --adapter=PEFT_DIR --format=hf --output=NEW_DIR
  python -m experiments.convert --workdir=DIR --format=lora --rank=8 --output=NEW_DIR

Formats: hf, a whole model for transformers, the adapter merged; gguf, the same for llama.cpp, with
a .gguf file as base; peft, the adapter alone as Hugging Face PEFT has it; lora, any adapter of
matrices as PEFT's LoRA of a rank, with the error on each matrix. Nothing that was trained is
left out: whatever a format cannot hold is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

from experiments import runtime

if TYPE_CHECKING:
  from peftjax.io.shards import Tensor
  from peftjax.training.finished import Finished

FORMATS = ("hf", "gguf", "peft", "lora")
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of a run of experiments.train, here or in a bucket."
)
BASE = flags.DEFINE_string("base", None, "In its place: a Hugging Face directory or .gguf file.")
ADAPTER = flags.DEFINE_string("adapter", None, "A PEFT directory of an adapter of --base.")
FORMAT = flags.DEFINE_enum("format", None, FORMATS, "Format to write.", required=True)
OUTPUT = flags.DEFINE_string(
  "output", None, "A new directory or, with --format=gguf, a new file.", required=True
)
DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ("float32", "bfloat16", "float16"),
  "Data type of weights, with hf and gguf; by default each keeps its own.",
)
SHARD_SIZE = flags.DEFINE_string("shard_size", "5GB", "Largest size of a file, with hf.")
RANK = flags.DEFINE_integer("rank", None, "Rank of the adapter, with lora.", lower_bound=1)

# The reason why a run has a model of this library.
OURS = (
  "and other formats are of families that this library knows; its adapter is in checkpoints/best"
)


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  check_given()
  runtime.set_up("~/.cache/peftjax")
  from peftjax.training import finished

  given = (
    finished.load(WORKDIR.value, ours=OURS)
    if WORKDIR.value
    else of_files(Path(BASE.value or ""), ADAPTER.value)
  )
  write = {"hf": write_model, "gguf": write_gguf, "peft": write_adapter, "lora": write_lora}
  write[FORMAT.value](given, OUTPUT.value)
  print(f"wrote {OUTPUT.value}")


def check_given() -> None:
  """Checks that need no file's contents.

  Raises:
    ValueError: flags that do not go together, or something at the output's place.
  """
  from peftjax.io import new_directory, shards

  kind = FORMAT.value
  if bool(WORKDIR.value) == bool(BASE.value):
    raise ValueError("write one of --workdir=DIR, of a finished run, and --base=DIR, of a model")
  if ADAPTER.value and not BASE.value:
    raise ValueError("--adapter belongs to a --base; a run of --workdir has its own")
  if kind in ("peft", "lora") and not (WORKDIR.value or ADAPTER.value):
    raise ValueError(f"--format={kind} writes an adapter; name one: --adapter=DIR or --workdir=DIR")
  if (kind == "lora") != (RANK.value is not None):
    raise ValueError("--rank=R goes with --format=lora, and that with a rank")
  if DTYPE.value and kind in ("peft", "lora"):
    raise ValueError(f"--dtype is for a whole model; --format={kind} keeps the adapter's own")
  shards.bytes_of(SHARD_SIZE.value)
  if kind != "gguf":
    return new_directory.check(OUTPUT.value)
  if not OUTPUT.value.endswith(".gguf") or os.path.lexists(OUTPUT.value):
    raise ValueError(f"--output={OUTPUT.value} is not a new file; name one that ends in .gguf")
  if BASE.value:
    check_gguf(Path(BASE.value))


def check_gguf(base: Path) -> None:
  """Raises ValueError if no GGUF file can be written from that base."""
  if base.suffix != ".gguf":
    raise ValueError(
      "a GGUF file is written from a base that is one, whose tokenizer it takes over, and "
      f"{base} is none. Write --format=hf, and let llama.cpp's convert_hf_to_gguf.py convert that."
    )


def of_files(base: Path, adapter: str | None) -> Finished:
  """A base with the adapter of a PEFT directory, if there is one."""
  import jax

  import peftjax as pj
  from peftjax.training.finished import Finished

  labels = outputs_of(adapter) if adapter else None
  model, params = pj.load_pretrained(base, num_labels=labels)
  mask = jax.tree.map(lambda _: False, params)
  if adapter:
    params, mask = pj.load_peft(adapter, params, model)
  return Finished(base, model, params, mask, pj.chain(), [])


def outputs_of(adapter: str) -> int | None:
  """The number of outputs of the head in a PEFT directory, if there is one."""
  from peftjax.io.safetensors_dir import TensorDir

  tensors = TensorDir(adapter, "adapter_model")
  ends = ("classifier.weight", "classifier.out_proj.weight")
  shapes = [tensors.info(name).shape for name in tensors.names() if name.endswith(ends)]
  return shapes[0][0] if shapes else None


def write_model(given: Finished, output: str) -> None:
  """Writes a Hugging Face directory."""
  from peftjax.io import new_directory, shards
  from peftjax.models import saved

  plan = saved.plan(given.params, given.base, DTYPE.value, given.labels or None)
  with new_directory.writing(output) as folder, shown(plan.tensors) as tensors:
    size = shards.bytes_of(SHARD_SIZE.value)
    saved.write(folder, plan._replace(tensors=tensors), given.base, size)


def write_gguf(given: Finished, output: str) -> None:
  """Writes a GGUF file."""
  from peftjax.io import gguf_writer
  from peftjax.models import saved

  check_gguf(given.base)
  plan = saved.plan(given.params, given.base, DTYPE.value)
  with shown(plan.tensors) as tensors:
    gguf_writer.write(output, given.base, tensors)


def write_adapter(given: Finished, output: str) -> None:
  """Writes a directory of Hugging Face PEFT."""
  import peftjax as pj
  from peftjax.io import new_directory

  with new_directory.writing(output) as folder:
    pj.save_peft(
      folder,
      given.params,
      given.model,
      base_model=str(given.base),
      trained=given.mask,
      **given.method.peft_options(),
    )


def write_lora(given: Finished, output: str) -> None:
  """Writes the same as LoRA of a rank; prints ‖ΔW − B A‖ / ‖ΔW‖ of each matrix."""
  from peftjax.methods.truncate import convert_to_lora

  params, errors = convert_to_lora(given.params, int(RANK.value or 0))
  write_adapter(given._replace(params=params, mask=mask_of(params, given.mask)), output)
  print("relative error of each matrix:")
  for path, error in errors.items():
    print(f"{error:.4f}\t{path}")


def mask_of(params: Any, mask: Any) -> Any:
  """`mask` in the structure of `params`, where LoRA whose factors are trained replaces adapters."""
  import jax

  from peftjax.core import paths
  from peftjax.core.adapted import Adapted
  from peftjax.methods.lora_weight import LoRA

  before = paths.leaves(mask)

  def of(path: str, leaf: Any) -> Any:
    was = before[path]
    on = any(jax.tree.leaves(was.base if isinstance(was, Adapted) else was))
    if not isinstance(leaf, LoRA):
      return jax.tree.map(lambda _: on, leaf)
    base = jax.tree.map(lambda _: on, leaf.base)
    return jax.tree.map(lambda _: False, leaf).replace(a=True, b=True, base=base)

  return paths.map_leaves(of, params)


@contextmanager
def shown(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
  """The tensors; a bar on stderr moves as they are made."""
  from rich.console import Console
  from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

  columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
  with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
    task = progress.add_task("writing", total=sum(tensor.bytes for tensor in tensors))

    def moving(tensor: Tensor) -> Tensor:
      def make() -> Any:
        array = tensor.make()
        progress.advance(task, tensor.bytes)
        return array

      return tensor._replace(make=make)

    yield [moving(tensor) for tensor in tensors]


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
