"""Headers of GGUF files: what the gguf package reads, and what nobody should believe."""

import os
import struct

import gguf
import numpy as np
import pytest

from peftjax.io import gguf as reader
from peftjax.io import gguf_header
from tests import gguf_files
from tests.gguf_files import array, entry, raw, tensor, text


@pytest.fixture(scope="module")
def sound(pytestconfig, tmp_path_factory):
  """A small model's file, with a value of every kind."""
  directory = pytestconfig.rootpath / "tests" / "golden" / "llama_tiny"
  return gguf_files.model(
    tmp_path_factory.mktemp("sound") / "m.gguf",
    directory,
    kind=gguf.GGMLQuantizationType.F16,
    any__texts=["", "a", "é"],
    any__numbers=[-1, 2],
    any__floats=[0.5],
    any__truths=[True, False],
  )


def test_a_header_is_what_the_package_reads(sound):
  """Every value, and every tensor's shape, type and place."""
  want, got = gguf.GGUFReader(sound), gguf_header.read(sound)
  values = {k: f.contents() for k, f in want.fields.items() if not k.startswith("GGUF.")}
  assert got.metadata == values
  assert all(type(got.metadata[k]) is type(v) for k, v in values.items())
  for each in want.tensors:
    mine = got.tensors[each.name]
    assert (mine.shape, mine.kind) == (tuple(each.shape[::-1]), each.tensor_type.name)
    assert (mine.start, mine.size) == (each.data_offset, each.n_bytes)
    data = got.data[mine.start : mine.start + mine.size]
    np.testing.assert_array_equal(data, each.data.reshape(-1).view(np.uint8))
  assert len(want.tensors) == len(got.tensors)


def test_every_width_of_number_is_read(tmp_path):
  kinds = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    10: "<Q",
    11: "<q",
    12: "<d",
  }
  entries = [entry(str(k), k, struct.pack(code, 7)) for k, code in kinds.items()]
  entries += [entry(f"a{k}", 9, array(k, 2, 2 * struct.pack(c, 7))) for k, c in kinds.items()]
  (tmp_path / "m.gguf").write_bytes(raw([*entries, entry("7", 7, b"\1")]))
  got = gguf_header.read(tmp_path / "m.gguf").metadata
  assert got.pop("7") is True
  for kind in kinds:
    assert got[str(kind)] == 7 and got[f"a{kind}"] == [7, 7]
    assert type(got[str(kind)]) is (float if kind in (6, 12) else int)


HUGE = 2**63
BAD = {
  "it does not begin with GGUF but with b'GGML'": raw(magic=b"GGML"),
  "it is of version 1; 2 and 3 are read": raw(version=1),
  "it is of version 0": raw(version=0),
  "it is big-endian": raw(version=3 << 24),
  "it claims to have 9223372036854775808 tensors": raw(counts=(HUGE, 0)),
  "it claims to have 65537 tensors": raw(counts=(65537, 0), data=bytes(2**22)),
  "it claims to have 9223372036854775808 values": raw(counts=(0, HUGE)),
  "it claims to have 100 values": raw(counts=(0, 100)),
  "it ends after 32 bytes, within the name of a value": raw([struct.pack("<Q", HUGE)]),
  "within 'k'": raw([entry("k", 8, struct.pack("<Q", HUGE))]),
  "'k' has a value of type 13": raw([entry("k", 13, b"")]),
  "'k' is an array of arrays": raw([entry("k", 9, array(9, HUGE))]),
  "'kk' is an array of arrays": raw([entry("kk", 9, array(9, 1, array(9, 1, array(9, 1))))]),
  "within 'texts'": raw([entry("texts", 9, array(8, HUGE))]),
  "within 'bytes'": raw([entry("bytes", 9, array(0, HUGE))]),
  "within 'doubles'": raw([entry("doubles", 9, array(12, 2**61))]),
  "'many' has a value of type 99": raw([entry("many", 9, array(99, HUGE))]),
  "within 'last'": raw([entry("last", 9, array(8, 2, text("a") + struct.pack("<Q", HUGE)))]),
  "has the byte 2 for true": raw([entry("k", 7, b"\2")]),
  "'latin' has bytes that are not UTF-8": raw([entry("latin", 8, text("é".encode("latin1")))]),
  "the name of a value has bytes that are not UTF-8": raw([entry(b"\xff", 0, b"\0")]),
  "it has the value 'k' twice": raw(2 * [entry("k", 0, b"\0")]),
  "general.alignment is 0;": raw([entry("general.alignment", 4, struct.pack("<I", 0))]),
  "general.alignment is 24;": raw([entry("general.alignment", 4, struct.pack("<I", 24))]),
  "alignment is 2147483648;": raw([entry("general.alignment", 4, struct.pack("<I", 2**31))]),
  "alignment is 'a';": raw([entry("general.alignment", 8, text("a"))]),
  "within the name of a tensor": raw((), [struct.pack("<Q", HUGE)]),
  "tensor 't' has 0 dimensions": raw((), [tensor("t", [])]),
  "tensor 't' has 4294967295 dimensions": raw((), [text("t") + b"\xff" * 4], bytes(64)),
  r"tensor 't' has shape \(0, 4\); every": raw((), [tensor("t", [4, 0])]),
  r"F32 of shape \(9223372036854775808,\), ends at": raw((), [tensor("t", [HUGE])]),
  "ends at byte 3402823669209384634": raw((), [tensor("t", [HUGE, HUGE])]),
  "ends at byte 80, and the file has 79": raw((), [tensor("t", [4])], bytes(15)),
  "has the type 4, which": raw((), [tensor("t", [4], 4)], bytes(64)),
  "has the type 4294967295, which": raw((), [tensor("t", [4], 2**32 - 1)], bytes(64)),
  "has rows that 32 do not divide": raw((), [tensor("t", [48], 8)], bytes(64)),
  "tensor 't' begins at byte 32 of the data": raw((), [tensor("t", [4], offset=32)], bytes(64)),
  "tensor 'b' begins at byte 0 .* end at 32": raw(
    (), [tensor("a", [4]), tensor("b", [4])], bytes(64)
  ),
  "begins at byte 9223372036854775808": raw((), [tensor("t", [4], offset=HUGE)], bytes(64)),
  "it has tensor 't' twice": raw((), [tensor("t", [4]), tensor("t", [4], offset=32)], bytes(64)),
}


@pytest.mark.parametrize("told", BAD)
def test_a_damaged_header_is_named(told, tmp_path):
  """At once: no count is believed, no array nests, no tensor lies elsewhere than it should."""
  (tmp_path / "m.gguf").write_bytes(BAD[told])
  for read in (gguf_header.read, reader.GGUFFile, reader.tokenizer):
    with pytest.raises(ValueError, match=rf"m\.gguf is not a sound GGUF file: .*{told}"):
      read(tmp_path / "m.gguf")


def test_a_header_without_end_is_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 1000)
  (tmp_path / "m.gguf").write_bytes(raw([entry("k", 8, text("a" * 2000))]))
  with pytest.raises(ValueError, match="its header has more than 1000 bytes, at 'k'"):
    gguf_header.read(tmp_path / "m.gguf")


def test_every_cut_of_a_file_is_noticed(sound, tmp_path):
  """Up to the last tensor's last byte."""
  good = sound.read_bytes()
  last = max(each.start + each.size for each in gguf_header.read(sound).tensors.values())
  for size in [*range(0, 5000, 97), len(good) // 2, last - 1]:
    (tmp_path / "m.gguf").write_bytes(good[:size])
    with pytest.raises(ValueError, match=r"m\.gguf is not a sound GGUF file"):
      reader.GGUFFile(tmp_path / "m.gguf")


def test_what_is_no_regular_file_is_refused(tmp_path):
  os.mkfifo(tmp_path / "pipe.gguf")
  (tmp_path / "folder.gguf").mkdir()
  for read in (reader.GGUFFile, reader.tokenizer, reader.chat_templates):
    for name in ("pipe", "folder"):
      with pytest.raises(ValueError, match=rf"{name}\.gguf is not a regular file"):
        read(tmp_path / f"{name}.gguf")
    with pytest.raises(ValueError, match=r"none\.gguf cannot be read"):
      read(tmp_path / "none.gguf")


def mutated(good, draw, end):
  """A few bytes of the header other than they were, often those of numbers, or some lost."""
  data = bytearray(good)
  for _ in range(draw.integers(1, 4)):
    at = int(draw.integers(0, end))
    match draw.integers(0, 5):
      case 0:
        data[at] = draw.integers(0, 256)
      case 1:
        data[at : at + 8] = struct.pack("<Q", draw.choice([0, 1, 2**31, 2**32 - 1, 2**62]))
      case 2:
        data[at : at + 4] = struct.pack("<I", draw.choice([0, 1, 4, 8, 9, 12, 2**31 - 1]))
      case 3:
        del data[at : at + int(draw.integers(1, 9))]
      case 4:
        data[at:at] = draw.bytes(draw.integers(1, 9))
  return bytes(data)


def test_mutations_are_read_or_refused(sound, tmp_path):
  """Nothing but a ValueError that names the file; what is read has the sizes that it says."""
  good, draw = sound.read_bytes(), np.random.default_rng(12)
  end = min(each.start for each in gguf_header.read(sound).tensors.values())
  path = tmp_path / "m.gguf"
  refused = 0
  for _ in range(200):
    path.write_bytes(mutated(good, draw, end))
    for read in (reader.GGUFFile, reader.tokenizer, reader.chat_templates):
      try:
        made = read(path)
      except ValueError as error:
        assert "m.gguf" in str(error) and len(str(error)) < 2000
        refused += 1
        continue
      if isinstance(made, reader.GGUFFile):
        for name in made.names():
          assert made.read_rows(name, 0, 1).shape == (1, *made.info(name).shape[1:])
  assert refused > 100
