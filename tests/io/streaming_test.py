"""Loading 3 GB with `quant=`: never more in memory than what comes out and two tensors."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
WIDTH, FFN, LAYERS, VOCAB = 2048, 5632, 16, 8192
CONFIG = {
  "model_type": "llama",
  "vocab_size": VOCAB,
  "hidden_size": WIDTH,
  "num_hidden_layers": LAYERS,
  "num_attention_heads": 32,
  "num_key_value_heads": 4,
  "intermediate_size": FFN,
  "max_position_embeddings": 2048,
  "rms_norm_eps": 1e-5,
  "tie_word_embeddings": True,
}
LARGEST = 4 * WIDTH * VOCAB  # bytes of the largest tensor, float32
_MATRICES = {
  "self_attn.q_proj": (WIDTH, WIDTH),
  "self_attn.k_proj": (256, WIDTH),
  "self_attn.v_proj": (256, WIDTH),
  "self_attn.o_proj": (WIDTH, WIDTH),
  "mlp.gate_proj": (FFN, WIDTH),
  "mlp.up_proj": (FFN, WIDTH),
  "mlp.down_proj": (WIDTH, FFN),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A Llama of 721 million random weights, float32, a shard for every layer."""
  directory = tmp_path_factory.mktemp("streaming")
  if shutil.disk_usage(directory).free < 8e9:
    pytest.skip(f"less than 8 GB free at {directory}")
  block = np.random.default_rng(0).standard_normal(WIDTH * VOCAB, np.float32)
  block *= np.float32(0.02)
  part = lambda *shape: block[: np.prod(shape)].reshape(shape)
  norm = np.ones(WIDTH, np.float32)
  shards = [{"model.embed_tokens.weight": part(VOCAB, WIDTH), "model.norm.weight": norm}]
  for i in range(LAYERS):
    layer = {f"{name}.weight": part(*shape) for name, shape in _MATRICES.items()}
    layer |= {f"{n}_layernorm.weight": norm for n in ("input", "post_attention")}
    shards.append({f"model.layers.{i}.{name}": array for name, array in layer.items()})
  where = {}
  for i, shard in enumerate(shards):
    where |= dict.fromkeys(shard, f"model-{i:05}.safetensors")
    save_file(shard, directory / f"model-{i:05}.safetensors")
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
  (directory / "config.json").write_text(json.dumps(CONFIG))
  yield directory
  shutil.rmtree(directory)


def _measured(directory, *how):
  """Bytes of a load in a process of its own: of the model, and the most there were at once."""
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  done = subprocess.run(
    [sys.executable, "-m", "tests.io.streaming_test", directory, *how],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_a_quantised_load_holds_the_model_and_two_tensors(checkpoint, layers):
  """Anonymous memory above that after the imports, sampled every two milliseconds."""
  got = _measured(checkpoint, "nf4", layers)
  assert got["weights"] == 721_487_872 and got["model"] < 0.45e9
  assert got["peak"] <= got["model"] + 2 * LARGEST, got


def test_a_dense_load_breaks_that_bound(checkpoint):
  """The control: the measurement sees what is there."""
  assert _measured(checkpoint, "dense", "unrolled")["peak"] > 4 * (0.45e9 + 2 * LARGEST)


def _anonymous():
  """Bytes of memory of this process that no file backs."""
  status = Path("/proc/self/status").read_text()
  return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def main(directory, quant, layers):
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
  fmt = pj.nf4() if quant == "nf4" else None
  _, params = pj.load_pretrained(directory, quant=fmt, scan_layers=layers == "scanned")
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
