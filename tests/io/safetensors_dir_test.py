"""Reading a Hugging Face directory: sound files come back, hostile ones say what is wrong."""

import json
import os
import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from peftjax.io import safetensors_dir
from peftjax.io.safetensors_dir import TensorDir, read_config, write

_INDEX = "model.safetensors.index.json"


def _tensors() -> dict[str, np.ndarray]:
  x = np.arange(24, dtype=np.float32).reshape(4, 6) / 7
  return {
    "float32": x,
    "float16": x.astype(np.float16),
    "bfloat16": x.astype(ml_dtypes.bfloat16),
    "float64": x.astype(np.float64),
    "bool": x > 1,
    "transposed": x.T,
    "strided": x[::2, 1::2],
    "scalar": np.float32(3).reshape(()),
    "empty": np.zeros((0, 3), np.float32),
    **{f"{kind}{bits}": x.astype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 64)},
  }


def _entry(shape, offsets, dtype="F32") -> dict:
  return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _file(path: Path, header, data: bytes = b"", length: int | None = None) -> None:
  """A safetensors file from its parts: an 8-byte header length, the header, the data."""
  head = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + data)


def _index(directory: Path, weight_map) -> None:
  (directory / _INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _error(directory: Path, *words: str) -> str:
  """The message of opening `directory`: a ValueError of one screen that holds all `words`."""
  with pytest.raises(ValueError, match=re.escape(str(directory))) as caught:
    TensorDir(directory)
  message = str(caught.value)
  for word in words:
    assert word in message
  assert len(message) < 2_000
  assert message.count("\n") < 10
  return message


def test_write_read_round_trip_of_every_dtype(tmp_path):
  tensors = _tensors()
  write(tmp_path / "model.safetensors", tensors)
  opened = TensorDir(tmp_path)
  assert opened.names() == tuple(sorted(tensors))
  for name, value in tensors.items():
    assert opened.info(name) == (value.shape, value.dtype)
    got = opened.read(name)
    assert (got.shape, got.dtype) == (value.shape, value.dtype)
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, value)


def test_bfloat16_bits_survive(tmp_path):
  bits = np.array([0x0000, 0x8000, 0x3F80, 0x7F80, 0xFF80, 0x7FC1, 0x0001], np.uint16)
  write(tmp_path / "model.safetensors", {"w": bits.view(ml_dtypes.bfloat16)})
  np.testing.assert_array_equal(TensorDir(tmp_path).read("w").view(np.uint16), bits)


def test_opening_reads_no_data_and_read_returns_a_copy(tmp_path):
  write(tmp_path / "model.safetensors", {"w": np.zeros(3, np.float32)})
  opened = TensorDir(tmp_path)
  opened.read("w")[:] = 1
  np.testing.assert_array_equal(opened.read("w"), np.zeros(3))
  write(tmp_path / "model.safetensors", {"w": np.ones(3, np.float32)})
  np.testing.assert_array_equal(opened.read("w"), np.ones(3))
  write(tmp_path / "model.safetensors", {"w": np.ones(4, np.float32)})
  with pytest.raises(ValueError, match="'w' changed"):
    opened.read("w")
  os.truncate(tmp_path / "model.safetensors", 70)
  with pytest.raises(ValueError, match="'w' cannot be read"):
    opened.read("w")


def test_unknown_name_lists_near_ones(tmp_path):
  write(tmp_path / "model.safetensors", {"encoder.query": np.zeros(1, np.float32)})
  for method in (TensorDir(tmp_path).info, TensorDir(tmp_path).read):
    with pytest.raises(ValueError, match=r"no tensor 'encoder\.qeury'(.|\n)*encoder\.query"):
      method("encoder.qeury")


def test_another_stem(tmp_path):
  write(tmp_path / "adapter_model.safetensors", {"a": np.ones(2, np.float32)})
  assert TensorDir(tmp_path, "adapter_model").names() == ("a",)
  _error(tmp_path, "no model.safetensors", "adapter_model.safetensors")


def test_shards(tmp_path):
  tensors = _tensors()
  names = sorted(tensors)
  shards = {"model-1-of-2.safetensors": names[:5], "model-2-of-2.safetensors": names[5:]}
  for shard, part in shards.items():
    write(tmp_path / shard, {name: tensors[name] for name in part})
  _index(tmp_path, {name: shard for shard, part in shards.items() for name in part})
  opened = TensorDir(tmp_path)
  assert opened.names() == tuple(names)
  for name in names:
    np.testing.assert_array_equal(opened.read(name), tensors[name])


def test_the_single_file_wins_over_an_index(tmp_path):
  write(tmp_path / "model.safetensors", {"w": np.zeros(1, np.float32)})
  _index(tmp_path, {"w": "missing.safetensors"})
  assert TensorDir(tmp_path).names() == ("w",)


_TWO = {"a": _entry([2], [0, 8]), "b": _entry([2], [8, 16])}
_REPEATED = b'{"a":%s,"a":%s}' % ((json.dumps(_TWO["a"]).encode(),) * 2)

_HOSTILE = {
  "header longer than the file": ((_TWO, bytes(16), 10**6), "header of 1000000"),
  "header over the limit": ((_TWO, bytes(16), 2 * 10**8), "at most 100000000"),
  "header length of 2**64 - 1": ((_TWO, bytes(16), 2**64 - 1), str(2**64 - 1)),
  "not JSON": ((b"{hello",), "JSON"),
  "not UTF-8": ((b'{"\xff\xfe": 1}',), "JSON"),
  "UTF-16": ((json.dumps(_TWO).encode("utf-16"), bytes(16)), "JSON"),
  "nested too deep": ((b"[" * 200_000,), "JSON"),
  "a number too long": ((b'{"a":' + b"9" * 10_000 + b"}",), "JSON"),
  "a list": ((b"[1, 2]",), "object"),
  "an entry that is no object": (({"a": 3},), "'a' must have dtype"),
  "an entry without shape": (({"a": {"dtype": "F32", "data_offsets": [0, 8]}},), "'a' must have"),
  "an unknown dtype": (({"a": _entry([2], [0, 8], "Q9")}, bytes(8)), "'a' has the dtype 'Q9'"),
  "a dtype NumPy lacks": (({"a": _entry([4], [0, 2], "F4")}, bytes(2)), "'F4'"),
  "a dtype that is no string": (({"a": _entry([2], [0, 8], ["F32"])}, bytes(8)), "['F32']"),
  "a negative size": (({"a": _entry([-2], [0, 8])}, bytes(8)), "'a' needs whole numbers"),
  "a fractional size": (({"a": _entry([2.0], [0, 8])}, bytes(8)), "[2.0]"),
  "a boolean size": (({"a": _entry([True], [0, 4])}, bytes(4)), "[True]"),
  "a shape that is no list": (({"a": _entry("2", [0, 8])}, bytes(8)), "'a' needs whole numbers"),
  "too many axes": (({"a": _entry([1] * 65, [0, 4])}, bytes(4)), "at most 64"),
  "three offsets": (({"a": _entry([2], [0, 8, 8])}, bytes(8)), "[0, 8, 8]"),
  "a negative offset": (({"a": _entry([2], [-8, 0])}, bytes(8)), "[-8, 0]"),
  "offsets the wrong way round": (({"a": _entry([2], [8, 0])}, bytes(8)), "hold -8"),
  "too few bytes for the shape": (({"a": _entry([3], [0, 8])}, bytes(8)), "needs 12 bytes"),
  "a product over 64 bits": (({"a": _entry([2**62] * 2, [0, 8])}, bytes(8)), "'a' of shape"),
  "a truncated file": ((_TWO, bytes(12)), "'b' ends at byte 16 of 12"),
  "bytes after the last tensor": ((_TWO, bytes(20)), "4 bytes at the end"),
  "overlapping tensors": (
    ({"a": _entry([2], [0, 8]), "b": _entry([2], [4, 12])}, bytes(12)),
    "'b' begins at byte 4, not 8: it overlaps",
  ),
  "two tensors in one place": (
    ({"a": _entry([2], [0, 8]), "b": _entry([2], [0, 8])}, bytes(8)),
    "'b' begins at byte 0, not 8: it overlaps",
  ),
  "a hole": (
    ({"a": _entry([2], [0, 8]), "b": _entry([2], [12, 20])}, bytes(20)),
    "'b' begins at byte 12, not 8: it leaves a hole",
  ),
  "a name twice": ((_REPEATED, bytes(8)), "'a' comes twice"),
  "metadata that is no mapping": (({"__metadata__": "x", **_TWO}, bytes(16)), "safetensors"),
  "metadata that is no text": (({"__metadata__": {"x": 3}, **_TWO}, bytes(16)), "safetensors"),
  "a name of a megabyte": (({"a" * 10**6: _entry([3], [0, 8])}, bytes(8)), "aaa..."),
  "a shape of a megabyte": (({"a": _entry([1] * 10**6, [0, 8])}, bytes(8)), "1, 1..."),
}


@pytest.mark.parametrize("case", _HOSTILE)
def test_hostile_file(tmp_path, case):
  parts, words = _HOSTILE[case]
  _file(tmp_path / "model.safetensors", *parts)
  _error(tmp_path, "model.safetensors", words)


@pytest.mark.parametrize("size", [0, 3, 8, 9])
def test_file_cut_in_its_header(tmp_path, size):
  write(tmp_path / "model.safetensors", {"w": np.zeros(3, np.float32)})
  os.truncate(tmp_path / "model.safetensors", size)
  _error(tmp_path, f"has {size} bytes")


def test_header_over_the_limit_in_a_large_file(tmp_path):
  path = tmp_path / "model.safetensors"
  _file(path, _TWO, length=100_000_001)
  os.truncate(path, 100_000_100)  # sparse: takes no space
  _error(tmp_path, "at most 100000000")


def test_every_truncation_raises(tmp_path):
  path = tmp_path / "model.safetensors"
  write(path, {"w": np.zeros(3, np.float32), "v": np.zeros(2, np.int8)})
  whole = path.read_bytes()
  for size in range(len(whole)):
    path.write_bytes(whole[:size])
    _error(tmp_path)


def test_flipped_header_bytes_raise_value_error_or_stay_readable(tmp_path):
  path = tmp_path / "model.safetensors"
  write(path, {"w": np.zeros(3, np.float32), "v": np.zeros(2, np.int8)})
  whole = path.read_bytes()
  for place in range(len(whole) - 14):
    for flip in (0x01, 0x10, 0x80):
      path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
      try:
        opened = TensorDir(tmp_path)
      except ValueError:
        continue
      for name in opened.names():
        opened.read(name)


@pytest.mark.parametrize(
  "shard",
  ["../x.safetensors", "/x", "a/b", "a\\b", "C:x", "", ".", "..", "x\0", "x" * 300, 3, None],
)
def test_index_with_a_path(tmp_path, shard):
  _index(tmp_path, {"w": shard})
  _error(tmp_path, _INDEX, "'w'", "only the plain name")


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_index_without_a_weight_map(tmp_path, weight_map):
  _index(tmp_path, weight_map)
  _error(tmp_path, _INDEX, "weight_map")


def test_index_that_is_not_json(tmp_path):
  (tmp_path / _INDEX).write_bytes(b"<html>")
  _error(tmp_path, _INDEX, "JSON")


def test_index_that_places_a_tensor_twice(tmp_path):
  (tmp_path / _INDEX).write_text('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}')
  _error(tmp_path, _INDEX, "'w' comes twice")


def test_missing_shard(tmp_path):
  write(tmp_path / "one.safetensors", {"w": np.zeros(1, np.float32)})
  _index(tmp_path, {"w": "one.safetensors", "v": "two.safetensors"})
  _error(tmp_path, _INDEX, "'two.safetensors', which is not there", "one.safetensors")


def test_damaged_shard(tmp_path):
  _file(tmp_path / "one.safetensors", {"w": _entry([3], [0, 8])}, bytes(8))
  _index(tmp_path, {"w": "one.safetensors"})
  _error(tmp_path, "one.safetensors", "'w'")


def test_listed_tensor_that_its_shard_lacks(tmp_path):
  for name in ("w", "v"):
    write(tmp_path / f"{name}.safetensors", {name: np.zeros(1, np.float32)})
  _index(tmp_path, {"w": "w.safetensors", "v": "v.safetensors", "u": "v.safetensors"})
  _error(tmp_path, _INDEX, "v.safetensors holds the tensor 'u', and it does not")
  _index(tmp_path, {"w": "v.safetensors", "v": "w.safetensors"})
  _error(tmp_path, _INDEX, "v.safetensors holds the tensor 'w', and it does not")


def test_tensor_in_two_shards(tmp_path):
  for shard, names in {"one": ["w", "v"], "two": ["u", "w"]}.items():
    write(tmp_path / f"{shard}.safetensors", dict.fromkeys(names, np.zeros(1, np.float32)))
  _index(tmp_path, {"w": "one.safetensors", "v": "one.safetensors", "u": "two.safetensors"})
  _error(tmp_path, "two.safetensors", "'w' is also in one.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickle_is_refused_unread(tmp_path, name):
  (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
  _error(tmp_path, name, "never read", "python -c", "save_pretrained", "NEW_DIRECTORY")


def test_pickled_adapter_is_refused_unread(tmp_path):
  (tmp_path / "adapter_model.bin").write_bytes(b"")
  with pytest.raises(ValueError, match=r"never read(.|\n)*weights_only=True.*adapter_model\.bin"):
    TensorDir(tmp_path, "adapter_model")


def test_missing_directory_lists_what_is_there(tmp_path):
  (tmp_path / "other").mkdir()
  for read in (read_config, TensorDir):
    with pytest.raises(ValueError, match=r"no directory .*gone/deep\.\n.* holds: other/"):
      read(tmp_path / "gone" / "deep")


def test_a_file_in_place_of_the_directory(tmp_path):
  (tmp_path / "model.gguf").touch()
  with pytest.raises(ValueError, match=r"model\.gguf is a file: give the directory"):
    TensorDir(tmp_path / "model.gguf")


def test_missing_files_list_what_is_there(tmp_path):
  for number in range(30):
    (tmp_path / f"{number:02d}.txt").touch()
  _error(tmp_path, "no model.safetensors", "holds: 00.txt, 01.txt", "19.txt and 10 more")
  with pytest.raises(ValueError, match=r"no config\.json(.|\n)*19\.txt and 10 more"):
    read_config(tmp_path)


def test_read_config(tmp_path):
  (tmp_path / "config.json").write_text('{"hidden_size": 64, "name": "é"}', encoding="utf-8")
  assert read_config(tmp_path) == {"hidden_size": 64, "name": "é"}
  (tmp_path / "adapter_config.json").write_text('{"r": 4}')
  assert read_config(tmp_path, "adapter_config.json") == {"r": 4}


@pytest.mark.parametrize(
  ("text", "words"),
  [
    (b"", "JSON"),
    (b"{'a': 1}", "JSON"),
    (b'{"a": "\xff"}', "JSON"),
    (b'{"a": 1, "a": 2}', "'a' comes twice"),
    (b"[1]", "holds a list"),
    (b"null", "holds a NoneType"),
  ],
)
def test_bad_config(tmp_path, text, words):
  (tmp_path / "config.json").write_bytes(text)
  with pytest.raises(ValueError, match=r"config\.json") as caught:
    read_config(tmp_path)
  assert words in str(caught.value)


def test_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
  path = tmp_path / "model.safetensors"
  write(path, {"w": np.ones(2, np.float32)})
  before = path.read_bytes()

  def save_half(arrays, file, metadata):
    Path(file).write_bytes(b"half")
    raise OSError("No space left on device")

  monkeypatch.setattr(safetensors_dir, "save_file", save_half)
  with pytest.raises(OSError, match="No space"):
    write(path, {"w": np.zeros(2, np.float32)})
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


def test_write_replaces_the_file_under_a_reader(tmp_path):
  path = tmp_path / "model.safetensors"
  write(path, {"w": np.ones(2, np.float32)})
  before = path.read_bytes()
  with open(path, "rb") as reader:
    write(path, {"w": np.zeros(2, np.float32)})
    assert reader.read() == before
  assert path.read_bytes() != before


def test_write_refuses_what_cannot_be_read_back(tmp_path):
  for value in (np.array(["text"]), np.zeros(2, np.complex64), np.array([None])):
    with pytest.raises(ValueError, match=r"'w' is .*, which is not written; allowed: bool, uint8"):
      write(tmp_path / "model.safetensors", {"w": value})
  with pytest.raises(ValueError, match="no directory"):
    write(tmp_path / "gone" / "model.safetensors", {})
  assert not list(tmp_path.iterdir())


def test_write_metadata_and_mode(tmp_path):
  path = tmp_path / "model.safetensors"
  write(path, {})
  assert b'"format":"pt"' in path.read_bytes()
  write(path, {}, {"made": "here"})
  assert b'"made":"here"' in path.read_bytes()
  (tmp_path / "plain").touch()
  assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_directories_that_transformers_saved_single_and_sharded():
  golden = Path(__file__).parents[1] / "golden"
  single, sharded = TensorDir(golden / "bert_tiny"), TensorDir(golden / "bert_tiny_sharded")
  assert len(list((golden / "bert_tiny_sharded").glob("model-*.safetensors"))) == 3
  assert single.names() == sharded.names()
  assert single.info("classifier.weight") == ((3, 64), np.float32)
  assert read_config(golden / "bert_tiny") == read_config(golden / "bert_tiny_sharded")
  for name in single.names():
    np.testing.assert_array_equal(single.read(name), sharded.read(name))
