"""A short fixed run of the fuzzer, in this process; `make fuzz` is the long one."""

import pytest

from tests.fuzz import harness
from tests.fuzz.kind import Kind

# Kinds whose cases take milliseconds, and how many of each.
CASES = {
  **dict.fromkeys(("safetensors", "index", "csv", "tsv", "jsonl", "flags", "sweeps"), 60),
  **dict.fromkeys(("adapter", "gguf", "tokenizer"), 30),
  **dict.fromkeys(("model-bert", "model-llama", "model-gpt2"), 6),
}


@pytest.mark.fast_for("(?!model-).*|model-llama")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")  # what is said of new parameters is for the check to read
def test_damaged_inputs_are_refused_in_a_sentence_or_read_right(name, tmp_path):
  kind: Kind = harness.kinds()[name]
  sound = tmp_path / "sound"
  sound.mkdir()
  kind.prepare(sound)
  for number in range(CASES[name]):
    verdict = harness.judge(kind, 0, number, sound, tmp_path / name)
    assert verdict.outcome in ("accepted", "refused"), f"{name} {number}: {verdict}"


def test_the_sound_input_is_accepted(tmp_path):
  """Otherwise everything would be refused, and nothing shown."""
  for name in CASES:
    kind = harness.kinds()[name]
    kind.damage = lambda rng, folder: None
    sound = tmp_path / f"{name}-sound"
    sound.mkdir()
    kind.prepare(sound)
    verdict = harness.judge(kind, 0, 0, sound, tmp_path / name)
    assert verdict.outcome == "accepted", f"{name}: {verdict}"


def test_a_reader_that_checks_nothing_is_found_out(tmp_path):
  """The negative control: tensors that are read with other values are a silent acceptance."""
  kind = harness.kinds()["safetensors"]
  sound = tmp_path / "sound"
  sound.mkdir()
  kind.prepare(sound)
  read = kind.read
  kind.read = lambda folder: {name: array + 1 for name, array in read(folder).items()}
  kind.damage = lambda rng, folder: None
  assert harness.judge(kind, 0, 0, sound, tmp_path / "case").outcome == "silent"
