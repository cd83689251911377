"""Checkpoints: every array back as it was, whole or not at all."""

import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import peftjax as pj
from peftjax.io import disk
from peftjax.methods.lora_weight import LoRA
from peftjax.training import checkpoint
from peftjax.training.checkpoint import Checkpoints

ARRAYS = {
  "adapter": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "hole": None},
  "half": np.linspace(0, 1, 5).astype(ml_dtypes.bfloat16),
  "codes": np.arange(7, dtype=np.uint8),
  "step": np.int32(12),
}


@pytest.fixture
def checkpoints(tmp_path):
  made = Checkpoints(tmp_path / "checkpoints")
  yield made
  made.close()


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for new, old in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert new.dtype == old.dtype
    np.testing.assert_array_equal(np.asarray(new), np.asarray(old))


def test_round_trip_of_every_dtype(checkpoints):
  """float32, bfloat16, packed bytes and counters come back bit for bit, holes included."""
  like = jax.tree.map(jnp.asarray, ARRAYS)
  checkpoints.save("latest", 12, like, {"best": {"value": 0.1 + 0.2}, "labels": ["ä"]})
  checkpoints.wait()
  assert checkpoints.meta("best") is None
  assert_same(checkpoints.arrays("latest", jax.tree.map(jnp.zeros_like, like)), like)
  assert checkpoints.meta("latest") == {"best": {"value": 0.1 + 0.2}, "labels": ["ä"]}


def test_round_trip_of_adapter_leaves(checkpoints):
  """The made arrays of LoRA leaves go by path and come back into LoRA leaves."""
  params = {"query": {"kernel": jnp.ones((6, 4))}, "key": {"kernel": jnp.ones((6, 4))}}
  method = pj.lora(rank=2, alpha=4, targets=["query"])
  first, second = (method.attach(jax.random.key(seed), params) for seed in (0, 1))
  keep = pj.tree.adapter_mask(first, method.trainable(first))
  saved, other = (pj.partition(tree, keep)[0] for tree in (first, second))
  assert list(checkpoint.to_nested(saved)["query"]["kernel"]) == ["a", "b", "scale", "rank"]
  checkpoints.save("best", 1, saved, {})
  checkpoints.wait()
  back = checkpoints.arrays("best", other)
  assert_same(back, saved)
  assert isinstance(back["query"]["kernel"], LoRA)
  assert (other["query"]["kernel"].a != back["query"]["kernel"].a).any()


def test_restored_under_another_mesh(checkpoints):
  """Arrays come back where `like` has them, whatever mesh they were saved from."""
  value = np.arange(64, dtype=np.float32).reshape(8, 8)
  place = lambda text, spec: NamedSharding(pj.sharding.make_mesh(text), spec)
  old = jax.device_put(value, place("data:8", P("data")))
  checkpoints.save("latest", 1, {"x": old}, {})
  checkpoints.wait()
  want = place("fsdp:2,tensor:4", P("fsdp", "tensor"))
  got = checkpoints.arrays("latest", {"x": jax.device_put(jnp.zeros((8, 8)), want)})["x"]
  np.testing.assert_array_equal(got, value)
  assert got.sharding == want
  alone = checkpoints.arrays("latest", {"x": jnp.zeros((8, 8))})["x"]
  np.testing.assert_array_equal(alone, value)
  assert len(alone.devices()) == 1


def test_only_the_newest_is_kept(checkpoints, tmp_path):
  """A newer step replaces the older one once it is whole; best and latest are apart."""
  for step in (1, 2, 3):
    checkpoints.save("latest", step, {"x": jnp.full(3, step)}, {"n": step})
  checkpoints.save("best", 2, {"x": jnp.full(3, 2)}, {"n": 2})
  checkpoints.wait()
  assert checkpoints.meta("latest") == {"n": 3} and checkpoints.meta("best") == {"n": 2}
  checkpoints.close()
  assert [path.name for path in (tmp_path / "checkpoints" / "latest").iterdir()] == ["3"]


def test_a_step_that_is_there_stays(checkpoints):
  """A run that repeats a step after a kill does not write it again."""
  checkpoints.save("latest", 1, {"x": jnp.ones(3)}, {"n": 1})
  checkpoints.wait()
  checkpoints.save("latest", 1, {"x": jnp.zeros(3)}, {"n": 2})
  checkpoints.wait()
  assert checkpoints.meta("latest") == {"n": 1}


def test_half_written_checkpoint_is_not_seen(checkpoints, tmp_path):
  """The temporary folder that a kill left behind counts for nothing and is cleared away."""
  checkpoints.save("latest", 1, {"x": jnp.ones(3)}, {"n": 1})
  checkpoints.wait()
  half = tmp_path / "checkpoints" / "latest" / "2.orbax-checkpoint-tmp-0"
  (half / "arrays").mkdir(parents=True)
  again = Checkpoints(tmp_path / "checkpoints")
  assert again.meta("latest") == {"n": 1}
  again.save("latest", 2, {"x": jnp.zeros(3)}, {"n": 2})
  again.wait()
  assert again.meta("latest") == {"n": 2}
  again.close()
  assert not half.exists()


def test_arrays_of_another_shape_are_refused(checkpoints):
  """A checkpoint of another rank does not load in silence."""
  checkpoints.save("latest", 1, {"x": jnp.ones((2, 3))}, {})
  checkpoints.wait()
  with pytest.raises(ValueError, match=r"\(2, 3\)"):
    checkpoints.arrays("latest", {"x": jnp.ones((4, 3))})


def damaged(path, how):
  data = bytearray(path.read_bytes())
  if how == "changed":
    data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data[: len(data) // 2]) if how == "cut" else bytes(data))
  if how == "gone":
    path.unlink()


@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_damaged_arrays_are_not_other_parameters(checkpoints, tmp_path, how):
  """Orbax's files carry no digest of an array's bytes: one bit would be another parameter."""
  like = {"x": jnp.arange(5000, dtype=jnp.float32)}
  checkpoints.save("latest", 1, like, {})
  checkpoints.wait()
  files = (tmp_path / "checkpoints" / "latest" / "1" / "arrays").rglob("d/*")
  damaged(max(files, key=lambda path: path.stat().st_size), how)
  with pytest.raises(ValueError, match="latest/1 cannot be read.*") as error:
    checkpoints.arrays("latest", like)
  assert len(str(error.value)) < 600 and "from a copy" in str(error.value)


@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_damaged_record_is_not_another(checkpoints, tmp_path, how):
  checkpoints.save("latest", 1, {"x": jnp.ones(3)}, {"value": 0.5, "steps": [1, 2]})
  checkpoints.wait()
  path = tmp_path / "checkpoints" / "latest" / "1" / "meta" / "metadata"
  if how == "changed":
    path.write_text(path.read_text().replace("0.5", "0.6"))
  else:
    damaged(path, how)
  with pytest.raises(ValueError, match="latest/1 cannot be read.*"):
    checkpoints.meta("latest")


def test_a_full_disk_is_a_sentence(checkpoints, tmp_path, monkeypatch):
  """Also where a thread of Orbax's meets it."""
  quoted = ValueError("RESOURCE_EXHAUSTED: Failed to write 212 bytes: No space left on device")

  def full(self, *args, **kwargs):
    raise quoted

  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "wait_until_finished", full)
  with pytest.raises(disk.DiskError, match="checkpoints/latest: the disk is full; [0-9,]+ bytes"):
    checkpoints.wait()
  monkeypatch.undo()


def test_a_pipe_is_no_model(tmp_path):
  """Reading it would never end."""
  (tmp_path / "config.json").write_text("{}")
  os.mkfifo(tmp_path / "x.safetensors")
  with pytest.raises(ValueError, match="x.safetensors is not a regular file"):
    checkpoint.digest(tmp_path)
  with pytest.raises(ValueError, match="x.safetensors is not a regular file"):
    checkpoint.digest(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "meta/metadata", "arrays/_METADATA"])
def test_a_pipe_is_no_part_of_a_checkpoint(checkpoints, tmp_path, name):
  """Orbax reads some of them before anybody asks."""
  checkpoints.save("latest", 1, {"x": jnp.ones(3)}, {})
  checkpoints.wait()
  path = tmp_path / "checkpoints" / "latest" / "1" / name
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(ValueError, match=f"{name} is not a regular file"):
    Checkpoints(tmp_path / "checkpoints", read_only=True)


def test_digest_depends_on_config_and_weights(tmp_path):
  """The base is config.json and the safetensors files, by content and name, and nothing else."""
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "model.safetensors").write_bytes(b"1")
  first = checkpoint.digest(tmp_path)
  (tmp_path / "README.md").write_text("x")
  assert checkpoint.digest(tmp_path) == first
  (tmp_path / "model.safetensors").write_bytes(b"2")
  second = checkpoint.digest(tmp_path)
  (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
  third = checkpoint.digest(tmp_path)
  assert len({first, second, third}) == 3
