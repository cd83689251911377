"""PEFT directories that do not say one thing: every one is refused, naming the file and the remedy.

Config and tensors are held against each other and against the model before anything is read.
"""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax import hf_peft
from peftjax.hf_peft import virtual
from peftjax.hf_peft.plan import Plan
from peftjax.io.safetensors_dir import TensorDir
from peftjax.models import bert as family

_GOLDEN = Path(__file__).parents[1] / "golden"
_ROOT = "base_model.model."
_QUERY = f"{_ROOT}bert.encoder.layer.1.attention.self.query"


@pytest.fixture(scope="module")
def bert():
  return pj.load_pretrained(_GOLDEN / "bert_tiny")


def _write(directory, tensors, **config):
  directory.mkdir()
  rng = np.random.default_rng(0)
  head = {f"{_ROOT}classifier.weight": (3, 64), f"{_ROOT}classifier.bias": (3,)}
  if "num_virtual_tokens" in config:
    head = {name.replace(_ROOT, "base_model."): shape for name, shape in head.items()}
  drawn = {k: rng.normal(size=v).astype(np.float32) for k, v in {**tensors, **head}.items()}
  save_file(drawn, directory / "adapter_model.safetensors")
  config = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"], **config}
  (directory / "adapter_config.json").write_text(json.dumps(config))


def _of(*modules, **tensors):
  layers = [f"{_ROOT}bert.encoder.layer.{i}." for i in (0, 1)]
  names = [f"{x}{m}." for x in layers for m in modules]
  return {name + x.replace("__", "."): shape for name in names for x, shape in tensors.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A directory of each kind, as small as peft's reader takes it."""
  folder = tmp_path_factory.mktemp("made")
  query, value, key = (f"attention.self.{x}" for x in ("query", "value", "key"))
  factors = {"lora_A__weight": (4, 64), "lora_B__weight": (64, 4)}
  of = lambda *names: {"target_modules": [*names]}
  lora = {"peft_type": "LORA", "r": 4}
  _write(folder / "lora", _of(query, value, **factors), **lora, **of("query", "value"))
  dora = _of(query, **factors, lora_magnitude_vector=(64,))
  _write(folder / "dora", dora, **lora, use_dora=True, **of("query"))
  left = {f"bert.encoder.layer.0.{query}.lora_E": [True] * 4}
  triplets = _of(query, lora_A=(4, 64), lora_B=(64, 4), lora_E=(4, 1))
  _write(
    folder / "adalora", triplets, peft_type="ADALORA", init_r=4, rank_pattern=left, **of("query")
  )
  scales = {**_of(key, value, ia3_l=(64, 1)), **_of("intermediate.dense", ia3_l=(1, 64))}
  inner = {"feedforward_modules": ["intermediate.dense"]}
  _write(
    folder / "ia3", scales, peft_type="IA3", **inner, **of("key", "value", "intermediate.dense")
  )
  vectors = _of(query, vera_lambda_d=(6,), vera_lambda_b=(64,))
  pair = {"base_model.vera_A": (6, 64), "base_model.vera_B": (64, 6)}
  _write(folder / "vera", {**vectors, **pair}, peft_type="VERA", r=6, **of("query"))
  for name, width in (("prefix", 256), ("prompt", 64)):
    kind = {"peft_type": f"{name.upper()}_TUNING", "num_virtual_tokens": 3}
    _write(folder / name, {"prompt_embeddings": (3, width)}, **kind)
  return folder


def _copy(source, directory, change=None, **fields):
  shutil.copytree(source, directory, dirs_exist_ok=True)
  path = directory / "adapter_config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
  if change:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")
  return directory


def test_the_directories_are_sound(bert, made):
  model, params = bert
  shape = lambda config, where: virtual.shape_of(config, model.config, where)
  for directory in made.iterdir():
    tensors = TensorDir(directory, "adapter_model")
    plan = Plan(directory, tensors, params, family, shape)
    assert len(plan.targets) == {"lora": 4, "ia3": 6}.get(
      directory.name, 0 if directory.name[0] == "p" else 2
    )


_NO_VALUE = [
  ("use_rslora", "false"),
  ("use_rslora", 0),
  ("use_dora", "true"),
  ("ensure_weight_tying", []),
  ("fan_in_fan_out", "false"),
  ("inference_mode", 1),
  ("lora_bias", "false"),
  ("lora_bias", True),
  ("use_bdlora", True),
  ("kasa_config", {}),  # peft's KaSA with its defaults
  ("arrow_config", {"top_k": 2}),
  ("layer_replication", [[0, 2], [1, 2]]),
  ("target_parameters", ["weight"]),
  ("trainable_token_indices", [1]),
  ("alora_invocation_tokens", [1]),
  ("init_lora_weights", "pissa"),
  ("init_lora_weights", "pissa_niter_4"),
  ("init_lora_weights", "loftq"),
  ("use_qalora", 1),
  ("bias", None),
  ("bias", "all"),
  ("r", True),
  ("r", 4.0),
  ("r", 0),
  ("r", 2**40),
  ("lora_alpha", 10**400),
  ("lora_alpha", "8"),
  ("lora_alpha", float("nan")),
  ("lora_alpha", float("inf")),
  ("lora_dropout", -0.1),
  ("lora_dropout", True),
  ("rank_pattern", {"query": True}),
  ("rank_pattern", {"query": "4"}),
  ("rank_pattern", {"(": 4}),
  ("rank_pattern", {"query{e}": 4}),
  ("alpha_pattern", {"query": None}),
  ("alpha_pattern", [["query", 4]]),
  ("modules_to_save", 7),
  ("modules_to_save", "classifier"),
  ("modules_to_save", [7]),
  ("modules_to_save", [""]),
  ("modules_to_save", ["("]),
  ("target_modules", None),
  ("target_modules", []),
  ("target_modules", [1]),
  ("target_modules", {"query": 1}),
  ("target_modules", "("),
  ("target_modules", "((.+)+)+\\d"),
  ("target_modules", ["LayerNorm", "query", "value"]),
  ("target_modules", ["attention", "query", "value"]),
  ("target_modules", ["q_proj"]),
  ("exclude_modules", 3),
  ("exclude_modules", [None]),
  ("exclude_modules", "bert.*"),
  ("layers_to_transform", -1),
  ("layers_to_transform", "0"),
  ("layers_to_transform", [0.5]),
  ("layers_to_transform", [7]),
  ("layers_pattern", "layer"),
  ("task_type", 5),
  ("task_type", "SEQ"),
  ("peft_type", ["LORA"]),
  ("peft_type", "lora"),
  *(("peft_type", kind) for kind in ("OFT", "BOFT", "FOURIERFT", "P_TUNING")),
  ("init_lora_weights", "lora_ga"),
  ("enable_lora", [True, False]),
  ("megatron_config", {"a": 1}),
  ("use_new_lora", True),
]


@pytest.mark.parametrize("field, value", _NO_VALUE, ids=[f"{k}={v!r:.20}" for k, v in _NO_VALUE])
def test_a_config_whose_field_is_not_what_it_must_be_is_refused(bert, made, field, value, tmp_path):
  model, params = bert
  directory = _copy(made / "lora", tmp_path, **{field: value})
  with pytest.raises(ValueError, match=rf"adapter_config.json(:| has) .*\b{field}\b"):
    hf_peft.load(directory, params, model)


def test_an_unknown_field_is_refused_with_the_version_it_came_from(bert, made, tmp_path):
  model, params = bert
  fields = {"use_rsloras": True, "peft_version": "0.99.0"}
  with pytest.raises(ValueError, match=r"use_rsloras.*near: use_rslora.*of PEFT 0.99.0.*\n.*merge"):
    hf_peft.load(_copy(made / "lora", tmp_path, **fields), params, model)


@pytest.mark.parametrize("value", [True, {}, 0, 1, "", "on", [1], {"a": 1}])
def test_an_unknown_field_that_is_set_is_refused_with_its_value(bert, made, value, tmp_path):
  model, params = bert
  with pytest.raises(ValueError, match=rf"the field 'kind_of_later' = {re.escape(repr(value))}"):
    hf_peft.load(_copy(made / "lora", tmp_path, kind_of_later=value), params, model)


def test_fields_of_other_versions_that_change_nothing_are_read(bert, made, tmp_path):
  """Of 0.2, of 0.21, and null where peft takes it for its default."""
  model, params = bert
  more = {"enable_lora": None, "merge_weights": False, "revision": None, "auto_mapping": None}
  more |= {"megatron_core": "megatron.core", "loftq_config": {}, "corda_config": None}
  more |= {"qalora_group_size": 16, "runtime_config": {"ephemeral_gpu_offload": False}}
  more |= {"target_parameters": [], "use_rslora": None, "rank_pattern": None, "lora_bias": False}
  more |= {"of_a_later_peft": None, "use_what_is_later": False, "later_parts": []}
  more |= {"trainable_token_indices": None, "ensure_weight_tying": False, "lora_alpha": 8.0}
  loaded = hf_peft.load(_copy(made / "lora", tmp_path, **more), params, model)
  want = hf_peft.load(made / "lora", params, model)
  jax.tree.map(np.testing.assert_array_equal, loaded, want)


def _set(name, value):
  return lambda t: t.update({name: value(t[name]) if callable(value) else value})


def _pop(*names):
  return lambda t: [t.pop(name) for name in names]


_A, _B = f"{_QUERY}.lora_A.weight", f"{_QUERY}.lora_B.weight"
_L = f"{_ROOT}bert.encoder.layer.0.attention.self.key.ia3_l"
_F = f"{_ROOT}bert.encoder.layer.0.intermediate.dense.ia3_l"
_E = f"{_ROOT}bert.encoder.layer.0.attention.self.query.lora_E"
_NOT_ONE = [
  ("lora", _pop(_A, _B), {}, r"lacks the tensor .*1.attention.self.query.lora_A.* and 1 more"),
  ("lora", _pop(_B), {}, "lacks the tensor .*query.lora_B"),
  ("lora", None, {"target_modules": ["query"]}, "4 tensors have no place"),
  ("lora", None, {"target_modules": "all-linear"}, "lacks the tensor .*lora_A"),
  ("lora", None, {"layers_to_transform": [0]}, "4 tensors have no place"),
  ("lora", None, {"exclude_modules": ["1.attention.self.query"]}, "2 tensors have no place"),
  ("lora", None, {"modules_to_save": ["key"]}, "lacks the tensor .*key.bias"),
  ("lora", None, {"modules_to_save": ["encoder"]}, "less modules_to_save.* names no module"),
  ("lora", None, {"r": 8}, r"\(4, 64\); the model means floats of \(8, 64\) with rank 8"),
  ("lora", None, {"r": 2**31 - 1}, "with rank 2147483647"),
  ("lora", _set(_A, lambda x: np.ascontiguousarray(x.T)), {}, r"\(64, 4\).*\(4, 64\)"),
  ("lora", _set(_A, lambda x: x.astype(np.int32)), {}, "lora_A.weight is int32"),
  ("lora", _set(_A, lambda x: x.astype(bool)), {}, "lora_A.weight is bool"),
  ("lora", _set(_A, lambda x: x[:0]), {}, r"\(0, 64\)"),
  ("lora", _set(_A, lambda x: x.ravel()), {}, r"\(256,\)"),
  ("lora", _set(_A, lambda x: x * np.nan), {}, "256 entries of tensor .*lora_A.* NaN"),
  ("lora", _set(_B, lambda x: x.astype(np.float64) + 1e300), {}, "infinite as float32"),
  ("lora", _set(f"{_QUERY}.lora_A.default.weight", np.ones((4, 64))), {}, "which is meant"),
  ("lora", _set(f"{_QUERY}.lora_A.other.weight", np.ones((4, 64))), {}, "1 tensors have no place"),
  ("lora", _set("x", np.ones(1)), {}, "1 tensors have no place"),
  ("lora", _set(f"{_QUERY}.base_layer.weight", np.ones((64, 64))), {}, "1 tensors have no place"),
  (
    "lora",
    _set(f"{_ROOT}bert.embeddings.word_embeddings.weight", np.ones((121, 64))),
    {},
    "vocabulary",
  ),
  ("lora", _set(f"{_ROOT}classifier.bias", lambda x: x / 0), {}, "classifier.bias are NaN or inf"),
  ("dora", _pop(f"{_QUERY}.lora_magnitude_vector"), {}, "lacks the tensor .*magnitude"),
  ("dora", None, {"use_dora": False}, "2 tensors have no place"),
  ("adalora", _pop(_E), {}, "lacks the tensor .*lora_E"),
  ("adalora", None, {"init_r": 5}, "init_r = 5 flags"),
  ("adalora", None, {"rank_pattern": {"bert.x.lora_E": [True] * 4}}, "names no such module"),
  ("adalora", None, {"rank_pattern": {"query": 4}}, "rank_pattern"),
  ("adalora", None, {"lora_alpha": 0}, "lora_alpha is 0"),
  ("adalora", None, {"use_dora": True}, "use_dora"),
  ("ia3", _pop(_L), {}, "lacks the tensor .*key.ia3_l"),
  ("ia3", _set(_L, lambda x: x.reshape(1, 64)), {}, r"\(1, 64\).*\(64, 1\).*feedforward"),
  ("ia3", _set(_F, lambda x: x.reshape(-1, 1)), {}, r"\(64, 1\).*\(1, 64\).*feedforward"),
  ("ia3", None, {"feedforward_modules": []}, r"\(1, 64\).*\(128, 1\)"),
  ("ia3", None, {"feedforward_modules": None}, "feedforward_modules"),
  ("ia3", None, {"feedforward_modules": ["query"]}, "'query', which target_modules has not"),
  ("ia3", None, {"use_rslora": True}, "'use_rslora'"),
  ("vera", _pop(f"{_QUERY}.vera_lambda_d"), {}, "lacks the tensor .*vera_lambda_d"),
  ("vera", _pop("base_model.vera_A"), {}, "lacks the tensor base_model.vera_A"),
  ("vera", _set("base_model.vera_B", lambda x: x[:32]), {}, r"vera_B .*\(64, 6\)"),
  ("vera", None, {"r": 2**31 - 1}, "2147483647"),
  ("vera", None, {"save_projection": "false"}, "save_projection"),
  ("prefix", None, {"num_virtual_tokens": 2**31 - 1}, "prompt_embeddings"),
  ("prefix", None, {"num_layers": 3}, "num_layers=3, and this model 2"),
  ("prefix", None, {"num_attention_heads": 2}, "num_attention_heads=2"),
  ("prompt", None, {"token_dim": 32}, "token_dim=32"),
  ("prompt", None, {"num_transformer_submodules": 2}, "num_transformer_submodules=2"),
  ("prompt", _set("prompt_embeddings", lambda x: x.T.copy()), {}, "prompt_embeddings"),
  ("prompt", _pop("prompt_embeddings"), {}, "lacks the tensor prompt_embeddings"),
]


@pytest.mark.parametrize("kind, change, fields, message", _NOT_ONE)
@pytest.mark.filterwarnings("ignore:.*which no module of this model matches")
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
def test_config_and_tensors_that_do_not_fit_are_refused(
  bert, made, kind, change, fields, message, tmp_path
):
  model, params = bert
  with pytest.raises(ValueError, match=f"(?s)adapter_(config|model).*{message}"):
    hf_peft.load(_copy(made / kind, tmp_path, change, **fields), params, model)


def test_names_and_patterns_that_match_nothing_are_told(bert, made, tmp_path):
  """peft leaves them out: of rank_pattern and alpha_pattern with a warning, of names without."""
  model, params = bert
  for i, fields in enumerate(
    (
      {"target_modules": ["query", "value", "c_attn"]},
      {"alpha_pattern": {"model.query": 99}},
      {"rank_pattern": {"q": 99}},
      {"exclude_modules": ["decoder"]},
      {"modules_to_save": ["classifier", "score", "norm"]},
    )
  ):
    [field] = fields
    with pytest.warns(UserWarning, match=f"{field} has .* no module"):
      loaded = hf_peft.load(_copy(made / "lora", tmp_path / str(i), **fields), params, model)
    want = hf_peft.load(made / "lora", params, model)
    jax.tree.map(np.testing.assert_array_equal, loaded, want)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_factors_of_any_float_become_float32(bert, made, dtype, tmp_path):
  model, params = bert
  change = lambda t: t.update({k: v.astype(dtype) for k, v in t.items()})
  loaded, _ = hf_peft.load(_copy(made / "lora", tmp_path, change), params, model)
  a = loaded["bert"]["encoder"]["layers_1"]["attention"]["self"]["query"]["kernel"].a
  assert a.dtype == jnp.float32
  stored = load_file(made / "lora" / "adapter_model.safetensors")[_A]
  np.testing.assert_array_equal(a, stored.astype(dtype).astype(np.float32))


def test_the_names_of_a_state_dict_are_read_as_peft_reads_them(bert, made, tmp_path):
  """With "default", the adapter's usual name, in them; no other name, and no other prefix."""
  model, params = bert
  put = lambda k: k.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")

  def rename(of):
    def change(tensors):
      old = dict(tensors)
      tensors.clear()
      tensors.update({of(k): v for k, v in old.items()})

    return change

  loaded = hf_peft.load(_copy(made / "lora", tmp_path / "a", rename(put)), params, model)
  jax.tree.map(np.testing.assert_array_equal, loaded, hf_peft.load(made / "lora", params, model))
  for i, prefix in enumerate((f"{_ROOT}{_ROOT}", "", "base_model.", f"{_ROOT}_orig_mod.")):
    change = rename(lambda k, prefix=prefix: prefix + k.removeprefix(_ROOT))
    with pytest.raises(ValueError, match="(?s)lacks the tensor base_model.model.bert.*It has"):
      hf_peft.load(_copy(made / "lora", tmp_path / str(i), change), params, model)


def test_a_folder_that_holds_no_adapter_says_so(bert, made, tmp_path):
  model, params = bert
  bare = shutil.copytree(made / "lora", tmp_path / "bare")
  (bare / "adapter_config.json").unlink()
  with pytest.raises(ValueError, match="no adapter_config.json in"):
    hf_peft.load(bare, params, model)
  bin_only = shutil.copytree(made / "lora", tmp_path / "bin")
  (bin_only / "adapter_model.safetensors").rename(bin_only / "adapter_model.bin")
  with pytest.raises(ValueError, match="adapter_model.bin and no adapter_model.safetensors"):
    hf_peft.load(bin_only, params, model)
  with pytest.raises(ValueError, match="is a file"):
    hf_peft.load(bin_only / "adapter_config.json", params, model)
  with pytest.raises(ValueError, match="no directory"):
    hf_peft.load(tmp_path / "nowhere", params, model)
  for text in ("[]", "{", '{"peft_type": "LORA", "peft_type": "IA3"}', "{}", "null", "7" * 9000):
    (bare / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="adapter_config.json"):
      hf_peft.load(bare, params, model)
