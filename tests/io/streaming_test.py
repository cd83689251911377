"""Loading with `quant=`: never more in memory than what comes out and two tensors."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
WIDTH, FFN = 2048, 5632
CONFIG = {
  "model_type": "llama",
  "hidden_size": WIDTH,
  "num_attention_heads": 32,
  "num_key_value_heads": 4,
  "intermediate_size": FFN,
  "max_position_embeddings": 2048,
  "rms_norm_eps": 1e-5,
  "tie_word_embeddings": True,
}
_MATRICES = {
  "self_attn.q_proj": (WIDTH, WIDTH),
  "self_attn.k_proj": (256, WIDTH),
  "self_attn.v_proj": (256, WIDTH),
  "self_attn.o_proj": (WIDTH, WIDTH),
  "mlp.gate_proj": (FFN, WIDTH),
  "mlp.up_proj": (FFN, WIDTH),
  "mlp.down_proj": (WIDTH, FFN),
}


class Source(NamedTuple):
  """A checkpoint: its weights, and bytes of its largest tensor and, at most, of it quantised."""

  path: Path
  weights: int
  largest: int
  quantised: float


def _generated(directory, layers, vocab, dtype):
  """A Llama of random weights, a shard for every layer."""
  size = np.dtype(dtype).itemsize * WIDTH * (vocab + layers * 21_504)
  if shutil.disk_usage(directory).free < 2 * size:
    pytest.skip(f"less than {2 * size:,} bytes free at {directory}")
  block = np.random.default_rng(0).standard_normal(WIDTH * max(vocab, FFN), np.float32)
  block = (block * np.float32(0.02)).astype(dtype)
  part = lambda *shape: block[: np.prod(shape)].reshape(shape)
  norm = np.ones(WIDTH, dtype)
  shards = [{"model.embed_tokens.weight": part(vocab, WIDTH), "model.norm.weight": norm}]
  for i in range(layers):
    layer = {f"{name}.weight": part(*shape) for name, shape in _MATRICES.items()}
    layer |= {f"{n}_layernorm.weight": norm for n in ("input", "post_attention")}
    shards.append({f"model.layers.{i}.{name}": array for name, array in layer.items()})
  where = {}
  for i, shard in enumerate(shards):
    where |= dict.fromkeys(shard, f"model-{i:05}.safetensors")
    save_file(shard, directory / f"model-{i:05}.safetensors")
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
  config = {**CONFIG, "num_hidden_layers": layers, "vocab_size": vocab}
  (directory / "config.json").write_text(json.dumps(config))
  return directory


@pytest.fixture(scope="module")
def float32(tmp_path_factory):
  """0.7 GB, of which the largest tensor is a sixteenth."""
  directory = _generated(tmp_path_factory.mktemp("float32"), 4, 2048, np.float32)
  yield Source(directory, 180_373_504, 4 * FFN * WIDTH, 0.115e9)
  shutil.rmtree(directory)


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory):
  """0.4 GB."""
  directory = _generated(tmp_path_factory.mktemp("bfloat16"), 4, 16384, ml_dtypes.bfloat16)
  yield Source(directory, 209_733_632, 2 * 16384 * WIDTH, 0.165e9)
  shutil.rmtree(directory)


@pytest.fixture(scope="module")
def gguf():
  """A real model, its table in Q8_0 and its matrices in Q4_1: read, both are float32."""
  from peftjax.data import samples  # here, as the measured process imports this file too

  return Source(samples.model("smollm2"), 134_515_008, 4 * 49152 * 576, 0.17e9)


def _measured(source, *how):
  """Bytes of a load in a process of its own: of the model, and the most there were at once."""
  alone = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
  done = subprocess.run(
    [sys.executable, "-m", "tests.io.streaming_test", source.path, *how],
    cwd=ROOT,
    env={**os.environ, **alone},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


_SLOW = pytest.mark.slow(reason="gigabytes in a process of its own; 10 s each")


@pytest.mark.parametrize(
  ("name", "layers"),
  [
    pytest.param("float32", "unrolled", marks=_SLOW),
    pytest.param("bfloat16", "scanned", marks=_SLOW),
    pytest.param("gguf", "unrolled", marks=_SLOW),
  ],
)
def test_a_quantised_load_holds_the_model_and_two_tensors(name, layers, request):
  """Anonymous memory above that after the imports, sampled every two milliseconds."""
  source = request.getfixturevalue(name)
  got = _measured(source, "nf4", layers)
  assert got["weights"] == source.weights and got["model"] < source.quantised
  assert got["peak"] <= got["model"] + 2 * source.largest, got


@pytest.mark.parametrize(
  ("name", "times"),
  [
    pytest.param("bfloat16", 1.5, marks=_SLOW),
    pytest.param("float32", 3, marks=_SLOW),
    pytest.param("gguf", 1.4, marks=_SLOW),
  ],
)
def test_a_dense_load_breaks_that_bound(name, times, request):
  """The control: the measurement sees what is there."""
  source = request.getfixturevalue(name)
  got = _measured(source, "dense", "unrolled")
  assert got["peak"] > times * (source.quantised + 2 * source.largest), got


def _anonymous():
  """Bytes of memory of this process that no file backs."""
  status = Path("/proc/self/status").read_text()
  return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def main(path, quant, layers):
  """Loads, and prints what `_measured` returns."""
  import jax

  import peftjax as pj

  start, seen, done = _anonymous(), [0], threading.Event()

  def sample():
    while not done.is_set():
      seen[0] = max(seen[0], _anonymous())
      time.sleep(0.002)

  thread = threading.Thread(target=sample)
  thread.start()
  began = time.perf_counter()
  fmt = pj.quant.nf4() if quant == "nf4" else None
  _, params = pj.load_pretrained(path, quant=fmt, scan_layers=layers == "scanned")
  jax.block_until_ready(params)
  seconds = time.perf_counter() - began
  end = _anonymous()
  done.set()
  thread.join()
  model = sum(x.nbytes for x in jax.tree.leaves(params))
  found = dict(weights=pj.count(params), model=model, peak=max(seen[0], end) - start)
  print(json.dumps({**found, "end": end - start, "seconds": seconds}))


if __name__ == "__main__":
  main(*sys.argv[1:])
