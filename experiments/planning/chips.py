"""Accelerators that need not be there: their memory and links, and the devices of a topology."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Chip(NamedTuple):
  """One chip, as its maker describes it.

  Attributes:
    name: name for people, and in `peftjax.training.flops.PEAKS`, where its speed is.
    memory: bytes of HBM.
    bandwidth: bytes per second from HBM.
    links: bytes per second to other chips, over all links.
    accelerator: the TPU library's name for a slice of them, without the number.
    config: setting by which the TPU library makes a chip one device; by default it is.
  """

  name: str
  memory: int
  bandwidth: float
  links: float
  accelerator: str
  config: str = "default"


GIB = 2**30

# Cloud TPU's documentation of system architectures; links in one direction.
CHIPS: dict[str, Chip] = {
  "v4": Chip("TPU v4", 32 * GIB, 1228e9, 300e9, "v4", config="megacore"),
  "v5e": Chip("TPU v5e", 16 * GIB, 819e9, 200e9, "v5litepod"),
  "v5p": Chip("TPU v5p", 95 * GIB, 2765e9, 600e9, "v5p"),
  "v6e": Chip("TPU v6e", 32 * GIB, 1640e9, 448e9, "v6e"),
}


def prepare(topology: str) -> None:
  """Prepares the import of JAX: the TPU library asks the machine nothing, and the host is a CPU.

  Raises:
    ValueError: an unknown chip, or the TPU compiler is not installed.
  """
  if topology == "local":
    return
  chip = chip_of(topology)
  beside = Path(sys.prefix) / "tpu"  # jax warns wherever it finds the library among its packages
  if importlib.util.find_spec("libtpu") is None:
    if not (beside / "libtpu").is_dir():
      raise ValueError(
        f"--topology={topology} needs the TPU compiler, which needs no TPU: "
        "pip install 'peftjax[tpu-aot]'"
      )
    sys.path.append(str(beside))
  os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": f"{chip.accelerator}-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # none is taken, so another process may compile too
  }


def chip_of(topology: str) -> Chip:
  """The chip of `"v5e:2x4"`."""
  kind, _, shape = topology.partition(":")
  if kind not in CHIPS or not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}", shape):
    raise ValueError(
      f"--topology={topology}: write local, or CHIP:SHAPE such as v5e:2x4 or v5p:2x2x1, with a "
      f"chip of {', '.join(CHIPS)}"
    )
  return CHIPS[kind]


def devices_of(topology: str, count: int | None) -> Sequence[Any]:
  """The devices of a topology, or its first `count`.

  Raises:
    ValueError: the library knows no such topology, or it has fewer devices.
  """
  import jax
  from jax.experimental import topologies

  if topology == "local":
    found = jax.devices()
  else:
    try:
      found = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, chip_config_name=chip_of(topology).config
      ).devices
    except Exception as error:
      told = (str(error).splitlines() or [""])[0][:200]
      raise ValueError(
        f"--topology={topology} is none that the TPU compiler has ({told}); write another shape, "
        "such as v5e:2x4 or v5p:2x2x1"
      ) from None
  if count is not None and not 0 < count <= len(found):
    raise ValueError(f"--devices={count}: {topology} has {len(found)}; write a number from 1 to it")
  return found[:count]
