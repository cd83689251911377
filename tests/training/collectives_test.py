"""What devices send each other in a training step, read from the compiled program."""

import re

import jax
import numpy as np
import pytest

from peftjax.collectives import collectives, sent
from peftjax.core import paths
from peftjax.core.weight import Weight
from peftjax.training.run import Run
from peftjax.training.settings import from_config
from tests import tiny_lm

ROWS, TOKENS = 40, 24  # on a device more than any width

# Bytes by kind that a device has after the collectives of a step, of an NF4 base with LoRA, as
# jaxlib 0.10.2 compiles it. A change of the code that moves them says why.
SENT = {
  "data:8": {"all-reduce": 24_584},
  "fsdp:8": {"all-gather": 97_088, "all-reduce": 24_656},
  "data:2,fsdp:4": {"all-gather": 97_088, "all-reduce": 24_656},
  # Its blocks cannot be split along these inputs, so "tensor" splits outputs, which are gathered.
  "data:2,fsdp:2,tensor:2": {
    "all-gather": 927_904,
    "all-reduce": 950_664,
    "collective-permute": 7_040,
  },
}


# A loop of XLA:TPU, shortened: it does not say its trips, and one gather is in two fusions.
TPU = """
%start (p.0: u8[8,4]) -> (u8[8,4], u8[8,16]) {
  %all-gather.1 = u8[8,16]{1,0:T(8,128)(4,1)} all-gather(%p.0), channel_id=13, dimensions={1}, \
frontend_attributes={chain_id="4"}
}

%done (p.1: u8[8,4]) -> u8[8,16] {
  %all-gather.2 = u8[8,16]{1,0} all-gather(%p.1), channel_id=13, frontend_attributes={chain_id="4"}
}

%below (t.0: (s32[], u8[8,4])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(32)
  %i.0 = s32[] get-tuple-element(%t.0), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.0, %constant.7), direction=LT, metadata={op_name="lt"}
}

%body (t.1: (s32[], u8[8,4])) -> (s32[], u8[8,4]) {
  %fusion.1 = (u8[8,4], u8[8,16]) fusion(%t.1), kind=kCustom, calls=%start
  %all-reduce.1 = f32[2] all-reduce(%x), channel_id=2, to_apply=%sum
  %fusion.2 = u8[8,16] fusion(%fusion.1), kind=kCustom, calls=%done
}

ENTRY %main (a.0: u8[8,4]) -> u8[8,4] {
  %while.1 = (s32[], u8[8,4]) while(%tuple.1), condition=%below, body=%body
}
"""


def test_loops_and_chains_of_a_tpu():
  assert sent(collectives(TPU)) == {"all-gather": 32 * 128, "all-reduce": 32 * 8}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  """The compiled step by base and mesh."""
  folder = tmp_path_factory.mktemp("collectives")
  model, rows = tiny_lm.model_dir(folder / "model"), tiny_lm.corpus(folder / "rows.jsonl")
  made = {}

  def text(quant, mesh):
    if (quant, mesh) not in made:
      few = dict(train__batch_size=ROWS, train__eval_batch_size=ROWS)
      run = Run(from_config(tiny_lm.config(model, rows, f"quant={quant}", **few)), mesh)
      batch = run.place(next(iter(run.stream.iterate(0, 1))))
      assert batch["tokens"].shape == (ROWS, TOKENS)
      compiled = run._step.lower(run.state, run.frozen, batch, run.dropout_key).compile()
      made[quant, mesh] = run, compiled.as_text()
    return made[quant, mesh]

  return text


def base_shapes(run):
  """Of the matrices of the base, one layer."""
  found = [
    leaf.shape[-2:] for leaf in paths.leaves(run.frozen).values() if isinstance(leaf, Weight)
  ]
  return {*found, *(shape[::-1] for shape in found)}


def dot_rows(text):
  """Leading sizes of the products of activations `[rows, width]`."""
  return {int(rows) for rows in re.findall(r"= \w+\[(\d+),\d+\]\S* dot\(", text)}


slow = pytest.mark.slow(reason="compiles a step for eight devices; another mesh of one law")
MESHES = ["data:2,fsdp:4", *(pytest.param(m, marks=slow) for m in SENT if m != "data:2,fsdp:4")]


@pytest.mark.parametrize("mesh", MESHES)
def test_devices_compute_their_own_rows_and_send_codes(mesh, texts):
  run, text = texts("nf4", mesh)
  found = collectives(text)
  ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
  assert max(dot_rows(text)) == ROWS * TOKENS // ways
  bases = base_shapes(run)
  for one in found:
    if one.dtype != "u8":
      assert not {shape[shape[:1] == (1,) :] for shape in one.shapes} & bases, one
  assert sent(found) == SENT[mesh]


def test_no_device_waits_for_a_fence(texts):
  """Single numbers are summed for the loss and the norm of the gradient, and for nothing else."""
  _, text = texts("nf4", "data:2,fsdp:4")
  scalars = [one for one in collectives(text) if max(map(len, one.shapes)) == 0]
  assert len(scalars) <= 2 and all(one.times == 1 for one in scalars), scalars


@slow
def test_without_the_constraints_devices_compute_the_rows_of_others(texts, monkeypatch):
  from peftjax.core import mesh

  monkeypatch.setattr(mesh, "constrain", lambda x, spec: x)
  jax.clear_caches()
  run, text = texts("nf4", "fsdp:4,data:2")
  assert max(dot_rows(text)) > ROWS * TOKENS // 8
  jax.clear_caches()


def test_collectives_of_a_loop_count_as_often_as_it_turns():
  text = """HloModule m

%body (p: (f32[8])) -> (f32[8]) {
  %ar = f32[8]{0} all-reduce(%x), to_apply=%add
  ROOT %ag = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%y), dimensions={0}
}

%cond (p: (f32[8])) -> pred[] {
  ROOT %c = pred[] compare(%a, %b)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (f32[8]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %b = bf16[4]{0} reduce-scatter(%w), dimensions={0}
}
"""
  found = collectives(text)
  assert [(one.kind, one.dtype, one.bytes, one.times) for one in found] == [
    ("all-reduce", "f32", 32, 3),
    ("all-gather", "f32", 256, 3),
    ("reduce-scatter", "bf16", 8, 1),
  ]
  assert sent(found) == {"all-reduce": 96, "all-gather": 768, "reduce-scatter": 8}


MESHES_OF_ONE_RUN = ("data:8", "fsdp:8", "fsdp:2,tensor:4", "data:2,sequence:2,tensor:2")


@slow
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_ten_losses_are_the_same_on_every_mesh_and_whatever_the_order_of_devices(
  quant, tmp_path, monkeypatch
):
  model, rows = tiny_lm.model_dir(tmp_path / "model"), tiny_lm.corpus(tmp_path / "rows.jsonl")
  few = dict(train__batch_size=ROWS, train__eval_batch_size=ROWS, train__steps=10)
  settings = from_config(tiny_lm.config(model, rows, f"quant={quant}", **few))

  def losses(mesh):
    run = Run(settings, mesh)
    return [row["loss"] for _ in run.steps() for row in run.fetch(all_of_them=True)]

  want = losses(None)
  for mesh in MESHES_OF_ONE_RUN:
    np.testing.assert_allclose(losses(mesh), want, rtol=1e-5, err_msg=mesh)
  devices = [jax.devices()[i] for i in (3, 6, 0, 5, 1, 7, 4, 2)]
  monkeypatch.setattr(jax, "devices", lambda *_: devices)
  np.testing.assert_allclose(losses("data:2,fsdp:2,tensor:2"), want, rtol=1e-5)
