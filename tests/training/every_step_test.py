"""Every method and family, on a base of every kind, takes on many devices the steps of one."""

import functools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

from peftjax.training import defaults
from tests import tiny, tiny_lm
from tests.training import several_processes

pytestmark = pytest.mark.slow(reason="compiles a step for each of fifty cases, twice")

BASES = ("float32", "bfloat16", "nf4")
METHODS = (*defaults.names(), "full")
FAMILIES = ("mistral_tiny", "qwen2_tiny", "gpt2_tiny", "bert")
CASES = [
  (family, method, base)
  for family, method in [*(("llama3_tiny", m) for m in METHODS), *((f, "lora") for f in FAMILIES)]
  for base in BASES
  if (method, base) != ("full", "nf4")
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """The config of a case: two steps."""
  folder = tmp_path_factory.mktemp("every")
  texts, rows = tiny.corpus(folder / "texts.csv", 80), tiny_lm.corpus(folder / "rows.jsonl")

  @functools.cache
  def directory(family, base):
    made = folder / f"{family}-{base}"
    tiny.model_dir(made) if family == "bert" else tiny_lm.model_dir(made, family)
    said = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(said | {"eos_token_id": 2, "bos_token_id": 1}))
    if base == "bfloat16":
      tensors = load_file(made / "model.safetensors")
      tensors = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
      save_file(tensors, made / "model.safetensors")
    return made

  def of(family, method, base):
    quant = "nf4" if base == "nf4" else "none"
    common = dict(train__steps=2, train__batch_size=8, train__eval_batch_size=8, quant__name=quant)
    where = directory(family, "bfloat16" if base == "bfloat16" else "float32")
    if family == "bert":
      return tiny.config(where, texts, method, quant__block_size=32, **common)
    own = {"adalora": {"method__target_rank": 2.0}, "oft": {"method__block_size": 8}}
    own |= dict.fromkeys(("prefix", "prompt"), {"method__length": 3})
    return tiny_lm.config(where, rows, f"method={method}", **common, **own.get(method, {}))

  yield of
  shutil.rmtree(folder)


def check(got, want, told):
  # Where what is trained has 16 bits, so have its gradients, summed in another order.
  rtol = 2e-3 if told[1:] == ("full", "bfloat16") else 1e-5
  assert len(got) == len(want) == 2
  for row, wanted in zip(got, want, strict=True):
    assert row.keys() == wanted.keys()
    for name, value in wanted.items():
      np.testing.assert_allclose(row[name], value, rtol=rtol, err_msg=f"{told} {name}")


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_on_eight_devices(case, config):
  steps = functools.partial(several_processes.steps, config(*case))
  check(steps("data:2,fsdp:4"), steps(None), case)


def test_in_two_processes_of_two_devices(config):
  """Each method and family once, on each kind of base in turn."""
  once = {}
  for i, (family, method, _) in enumerate(CASES):
    kinds = [case for case in CASES[i : i + 3] if case[:2] == (family, method)]
    once.setdefault((family, method), kinds[len(once) % len(kinds)])
  cases = list(once.values())
  found = several_processes.together(
    [(config(*case), "fsdp:2,tensor:2") for case in cases], what="steps"
  )
  for case, got in zip(cases, found, strict=True):
    check(got, several_processes.steps(config(*case), None), case)
