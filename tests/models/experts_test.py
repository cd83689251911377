"""Decoders with experts: how they are read, named, quantised, adapted and written.

Their logits are held against transformers' in `decoder_test`, the laws of methods on them in
`method_contract_test`.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import peftjax as pj
from peftjax import hf_peft, sharding
from peftjax.core import paths
from peftjax.core.einsum import ragged_dot
from peftjax.io.safetensors_dir import TensorDir
from peftjax.models import bnb
from peftjax.nn.experts import Experts
from peftjax.training import flops
from tests.core.programs import jit
from tests.models.decoder_test import GOLDEN, RARE

QWEN, MIXTRAL = GOLDEN / "qwen3_moe_tiny", GOLDEN / "mixtral_tiny"
UP = "model/layers/mlp/experts/up_proj/kernel"
_rng = np.random.default_rng(0)


_BOTH = [pytest.param(QWEN, marks=RARE), MIXTRAL]


@pytest.fixture(scope="module", params=_BOTH, ids=lambda path: path.name)
def loaded(request):
  return request.param, *pj.load_pretrained(request.param, scan_layers=True)


def _live(params, method):
  """Attached, with every trained array drawn."""
  attached = method.attach(jax.random.key(0), params)
  draw = lambda m, x: jnp.asarray(0.1 * _rng.standard_normal(x.shape), x.dtype) if m else x
  return jax.tree.map(draw, method.trainable(attached), attached)


@pytest.mark.parametrize("normalise", [pytest.param(False, marks=RARE), True])
def test_the_block_is_the_weighted_sum_of_the_chosen_experts(normalise):
  """Computed expert by expert; one of them is chosen by no token."""
  block = Experts(experts=4, routed=2, ffn=6, gate="swish", normalise=normalise)
  x = jnp.asarray(_rng.standard_normal((2, 5, 3)), jnp.float32).at[..., 0].set(1.0)
  params = jax.tree.map(lambda x: 20 * x, block.init(jax.random.key(0), x))
  params["params"]["router"]["kernel"] = params["params"]["router"]["kernel"].at[0, 2].set(-50.0)
  p = jax.nn.softmax(x @ params["params"]["router"]["kernel"])
  p = jnp.where(p >= jnp.sort(p)[..., -2:-1], p, 0.0)
  assert not p[..., 2].any()
  p = p / p.sum(-1, keepdims=True) if normalise else p
  gate, up, down = (
    params["params"]["experts"][f"{name}_proj"]["kernel"] for name in ("gate", "up", "down")
  )
  each = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
  want = jnp.einsum("bte,btef,efd->btd", p, each, down)
  np.testing.assert_allclose(block.apply(params, x), want, atol=1e-5)


def test_slices_of_a_stack_of_experts_have_names_and_all_linear_takes_no_router(loaded):
  _, model, params = loaded
  count = model.config.experts
  names = paths.layer_paths(UP, (2, count))
  assert names[1] == "model/layers_0/mlp/experts_1/up_proj/kernel"
  assert names[count] == "model/layers_1/mlp/experts_0/up_proj/kernel"
  found = {path.split("/")[-2] for path in pj.select(params, "all-linear")}
  assert found == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
  assert pj.select(params, "router") == ["model/layers/mlp/router/kernel"]


@pytest.mark.parametrize("scan", [pytest.param(False, marks=RARE), True])
def test_experts_are_quantised_as_they_are_read(scan):
  """As they are after it, each with its own blocks."""
  _, params = pj.load_pretrained(MIXTRAL, scan_layers=scan)
  _, got = pj.load_pretrained(MIXTRAL, scan_layers=scan, quant=pj.quant.nf4(32))
  chex.assert_trees_all_equal(got, pj.quantize(params, pj.quant.nf4(32)))


def test_parts_of_experts_are_read_where_they_lie(loaded):
  folder, _, params = loaded
  mesh = pj.sharding.make_mesh("data:2,fsdp:2,tensor:2")
  _, got = pj.load_pretrained(folder, scan_layers=True, mesh=mesh)
  chex.assert_trees_all_equal(got, params)


def test_experts_go_over_the_tensor_axis():
  mesh, kernel = pj.sharding.make_mesh("data:2,fsdp:2,tensor:2"), jnp.ones((2, 4, 8, 8))
  tree = {"layers": {"experts": {f"{n}_proj": {"kernel": kernel} for n in ("up", "down")}}}
  up, down = (sharding.specs(tree, mesh)["layers"]["experts"][f"{n}_proj"] for n in ("up", "down"))
  assert tuple(up["kernel"]) == (None, "tensor", "fsdp", None)
  assert tuple(down["kernel"]) == (None, "tensor", None, "fsdp")


def test_a_merged_model_is_written_expert_by_expert(loaded, tmp_path):
  folder, _, params = loaded
  pj.save_pretrained(tmp_path / "same", params, of=folder)
  chex.assert_trees_all_equal(pj.load_pretrained(tmp_path / "same", scan_layers=True)[1], params)
  live = _live(params, pj.lora(2, 4, "all-linear"))
  pj.save_pretrained(tmp_path / "made", live, of=folder)
  want = pj.merge(live)["model"]["layers"]["mlp"]["experts"]["up_proj"]["kernel"][1, 2].T
  names = {QWEN: "mlp.experts.2.up_proj", MIXTRAL: "block_sparse_moe.experts.2.w3"}
  got = TensorDir(tmp_path / "made").read(f"model.layers.1.{names[folder]}.weight")
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_rank_that_is_divided_among_experts(loaded):
  """At the scale of what each has; 1 at least; other matrices keep it."""
  _, model, params = loaded
  for rank, want in ((7, max(1, 7 // model.config.experts)), (2, 1)):
    flat = paths.leaves(
      pj.lora(rank, 4, "all-linear", divide_rank=True).attach(jax.random.key(0), params)
    )
    weight = flat[UP]
    assert weight.rank.shape == (2, model.config.experts) and (weight.rank == want).all()
    np.testing.assert_allclose(weight.scale, 4 / want)
    assert (flat["model/layers/self_attn/q_proj/kernel"].rank == rank).all()
  one = pj.lora(7, 4, "all-linear", divide_rank=True, rank_pattern={".*/experts_1/.*": 5})
  assert paths.leaves(one.attach(jax.random.key(0), params))[UP].a.shape[2] <= 2
  with pytest.raises(ValueError, match="divide_rank=True divides the rank among stacked experts"):
    pj.lora(4, 8, "q_proj", divide_rank=True).attach(jax.random.key(0), params)


def test_dropout_acts_on_what_each_expert_reads(loaded):
  """The mean over many keys is the product without dropout."""
  _, _, params = loaded
  live = paths.leaves(_live(params, pj.lora(2, 4, ".*/up_proj/kernel", dropout=0.5)))[UP]
  weight = jax.tree.map(lambda x: x[0], live)
  x = jnp.asarray(_rng.standard_normal((7, 48)), jnp.float32)
  sizes = jnp.zeros(weight.stack[0], jnp.int32).at[jnp.array([0, 2])].set(jnp.array([3, 4]))
  dropped = jit(
    jax.vmap(lambda key: ragged_dot(x, weight.with_key(key, "experts/up_proj/kernel"), sizes))
  )(jax.random.split(jax.random.key(1), 2000))
  plain = ragged_dot(x, weight, sizes)
  assert np.abs(dropped[0] - dropped[1]).max() > 0.01
  np.testing.assert_allclose(dropped.mean(0), plain, atol=0.05)


def test_adapters_of_experts_in_pefts_directories(loaded, tmp_path):
  """As peft had them with transformers 4, a module each; what it has not is refused."""
  folder, model, params = loaded
  live = _live(params, pj.lora(6, 4, "all-linear", divide_rank=True))
  hf_peft.save(tmp_path / "lora", live, model, task_type="CAUSAL_LM")
  chex.assert_trees_all_equal(hf_peft.load(tmp_path / "lora", params, model)[0], live)
  names = {QWEN: "mlp.experts.2.up_proj", MIXTRAL: "block_sparse_moe.experts.2.w3"}
  found = load_file(tmp_path / "lora" / "adapter_model.safetensors")
  assert f"base_model.model.model.layers.1.{names[folder]}.lora_A.weight" in found
  refused = {
    "to which peft gives LoRA and no DoRA": pj.dora(2, 4, "all-linear"),
    "experts.1.* gives experts and router the commonest one": pj.lora(
      2, 4, "all-linear", rank_pattern={".*_0/.*/experts_1/.*": 1}
    ),
    "gate has r 3, most others 1": pj.lora(3, 4, [".*/experts/.*", "router"], divide_rank=True),
  }
  for told, method in refused.items():
    with pytest.raises(ValueError, match=told):
      hf_peft.save(tmp_path / "other", _live(params, method), model, task_type="CAUSAL_LM")
  assert not (tmp_path / "other").exists()


def test_four_bit_experts_are_no_files_of_bitsandbytes(loaded, tmp_path):
  _, model, params = loaded
  params = pj.quantize(params, pj.quant.nf4(32))
  with pytest.raises(ValueError, match="is of experts, which transformers does not keep in four"):
    bnb.save(tmp_path / "made", params, model, {})


def test_work_counts_the_experts_that_a_token_takes(loaded):
  _, model, params = loaded
  c = model.config
  work = flops.step_work(c, jax.tree.map(lambda _: None, params), params, 1, 1)
  taken = 3 * c.layers * c.width * c.ffn * c.routed
  attention = 2 * c.layers * c.width * c.head_size * (c.heads + c.kv_heads)
  router, head = c.layers * c.width * c.experts, c.vocab * c.width
  seen = 2 * c.heads * c.head_size * c.layers  # as step_work has it of the only token
  assert work.model == 2 * (taken + attention + router + head) + seen
