"""Models, factors and moments are made where they lie, and nowhere whole."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import peftjax as pj
from peftjax import sharding
from peftjax.models import pretrained
from peftjax.training import build
from peftjax.training.run import Run
from peftjax.training.settings import from_config
from tests import tiny_lm


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  folder = tmp_path_factory.mktemp("born")
  model, rows = tiny_lm.model_dir(folder / "model"), tiny_lm.corpus(folder / "rows.jsonl")
  return lambda quant: from_config(
    tiny_lm.config(model, rows, f"quant={quant}", train__batch_size=8, train__eval_batch_size=8)
  )


def most(arrays):
  """The most bytes that one device has of some arrays."""
  held = dict.fromkeys(jax.devices(), 0)
  for x in arrays:
    for shard in x.addressable_shards:
      held[shard.device] += shard.data.nbytes
  return max(held.values())


class Spy:
  """Looks at all arrays whenever one is put somewhere or a program has run."""

  def __init__(self, monkeypatch):
    self.before = {id(x) for x in jax.live_arrays()}
    self.most = self.largest = 0
    for owner, name in ((sharding, "put"), (jax, "device_put"), (sharding, "born")):
      monkeypatch.setattr(owner, name, self.looking(getattr(owner, name)))

  def looking(self, fn):
    def looked(*args, **kwargs):
      out = fn(*args, **kwargs)
      self.look()
      return out

    return looked

  def look(self):
    new = [x for x in jax.live_arrays() if id(x) not in self.before and not x.is_deleted()]
    self.most = max(self.most, most(new))
    self.largest = max([self.largest, *(x.nbytes for x in new)])


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_no_device_sees_more_than_its_share_and_a_leaf(quant, settings, monkeypatch):
  mesh = pj.sharding.make_mesh("fsdp:8")
  spy = Spy(monkeypatch)
  made = build.attached(settings(quant), None, mesh)
  share = most(jax.tree.leaves(made.params))
  assert spy.most <= share + spy.largest
  assert share < sum(x.nbytes for x in jax.tree.leaves(made.params)) / 3  # norms are everywhere


def test_a_model_that_is_loaded_whole_breaks_that_bound(settings, monkeypatch):
  spy, load = Spy(monkeypatch), pretrained.load
  monkeypatch.setattr(pretrained, "load", lambda *a, mesh, **k: load(*a, **k))
  made = build.attached(settings("none"), None, pj.sharding.make_mesh("fsdp:8"))
  assert spy.most > most(jax.tree.leaves(made.params)) + spy.largest


def test_what_is_born_sharded_is_what_attach_makes(settings):
  check_born(settings("nf4"))


@pytest.mark.slow(reason="singular vectors of split matrices compile slowly")
@pytest.mark.parametrize("method", [{"init": "pissa"}, {"rank": 3, "targets": "all-linear"}])
def test_what_is_born_sharded_is_what_attach_makes_of_a_dense_base(settings, method):
  """Also of an initialisation that changes the base."""
  given = settings("none")
  check_born(dataclasses.replace(given, method={**given.method, **method}))


def check_born(given):
  alone, meshed = (
    jax.tree.leaves(build.attached(given, None, mesh).params)
    for mesh in (None, pj.sharding.make_mesh("fsdp:2,tensor:4"))
  )
  for one, two in zip(alone, meshed, strict=True):
    np.testing.assert_allclose(one, two, atol=2e-5)
    assert isinstance(two.sharding, NamedSharding)


def test_moments_lie_with_their_factors(settings):
  run = Run(settings("nf4"), "fsdp:8")
  factors = jax.tree.leaves(run.state.train)
  places = {x.shape: x.sharding for x in factors}
  moments = [x for x in jax.tree.leaves(run.state.opt_state) if x.shape in places]
  assert len(moments) == 2 * len(factors)
  assert all(x.sharding == places[x.shape] for x in moments)


class Devices:
  """A process' part of a mesh, as `put_parts` asks for it."""

  def __init__(self, place, devices):
    self.place, self.devices = place, devices

  def addressable_devices_indices_map(self, shape):
    return {d: at for d, at in self.place.devices_indices_map(shape).items() if d in self.devices}


def test_a_process_reads_the_rows_of_its_own_devices(monkeypatch):
  mesh, table = pj.sharding.make_mesh("fsdp:2,tensor:4"), np.arange(96).reshape(12, 8)
  asked = []
  monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, place, of: of)
  for spec, devices, want in (
    (P("tensor", None), mesh.devices.ravel()[:2], (slice(0, 6), slice(0, 8))),
    (P("tensor", "fsdp"), mesh.devices.ravel()[5:7], (slice(3, 9), slice(4, 8))),
    (P(None, None), mesh.devices.ravel(), (slice(0, 12), slice(0, 8))),
  ):
    place = Devices(NamedSharding(mesh, spec), set(devices))
    of = sharding.put_parts((12, 8), place, lambda part: asked.append(part) or table[part])
    assert asked.pop() == want
    for at in place.addressable_devices_indices_map((12, 8)).values():
      np.testing.assert_array_equal(of(at), table[at])
