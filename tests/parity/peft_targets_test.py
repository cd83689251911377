"""What a PEFT config means, against the installed peft: its fields, and the modules it names."""

import copy
import dataclasses
import functools
import json
import typing

import peft
import pytest
from peft import LoraConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key

import peftjax as pj
from peftjax.hf_peft import codecs, plan, targets
from peftjax.hf_peft import config as configs
from peftjax.methods.codec import TaskType
from peftjax.models.families import FAMILIES
from tests.parity.reference import GOLDEN, classifier, decoder

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

_READ = (
  *("target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "task_type"),
  *("layers_to_transform", "layers_pattern", "exclude_modules", "feedforward_modules"),
)
_CONFIGS = {
  "LORA": peft.LoraConfig,
  "ADALORA": peft.AdaLoraConfig,
  "IA3": peft.IA3Config,
  "VERA": peft.VeraConfig,
  "LOHA": peft.LoHaConfig,
  "LOKR": peft.LoKrConfig,
  "LN_TUNING": peft.LNTuningConfig,
  "PREFIX_TUNING": peft.PrefixTuningConfig,
  "PROMPT_TUNING": peft.PromptTuningConfig,
}


@pytest.mark.parametrize("kind", _CONFIGS)
def test_every_field_of_peft_is_known_and_no_other(kind):
  fields = {field.name for field in dataclasses.fields(_CONFIGS[kind])}
  old = {"enable_lora", "merge_weights"} if kind == "LORA" else set()
  assert codecs.known(kind) == fields | old and not old & fields
  assert {*typing.get_args(TaskType)} == {x.value for x in peft.TaskType}


@pytest.mark.parametrize("kind", _CONFIGS)
def test_the_defaults_are_pefts(kind):
  """Of the fields that are read; peft's null is our none."""
  theirs = _CONFIGS[kind](**({"total_step": 1} if kind == "ADALORA" else {}))
  needed = {k: v for k, v in (("peft_type", kind), ("num_virtual_tokens", 1)) if k in vars(theirs)}
  ours = codecs.schema_of(kind)(**needed)
  for field in dataclasses.fields(ours):
    if field.name in vars(theirs).keys() - needed.keys():
      want, got = getattr(theirs, field.name), getattr(ours, field.name)
      # None is of fields that are not read, too.
      assert got == want or (got is None and (not want or field.name not in _READ)), field.name


_NAMES = {
  "llama_tiny": ("q_proj", "o_proj", "down_proj", "embed_tokens", "lm_head", "norm", "layers"),
  "qwen2_tiny": ("k_proj", "v_proj", "up_proj", "embed_tokens", "lm_head", "norm", "layers"),
  "gpt2_tiny": ("c_attn", "c_proj", "c_fc", "wte", "lm_head", "ln_1", "h"),
  "bert_tiny": ("query", "dense", "key", "word_embeddings", "classifier", "LayerNorm", "layer"),
  "roberta_tiny": ("query", "dense", "value", "word_embeddings", "classifier", "dense", "layer"),
}


def _cases(one, two, three, table, head, norm, layers):
  every = {"target_modules": "all-linear"}
  both = {"target_modules": [one, two]}
  return [
    {"target_modules": [one]},
    {"target_modules": [one, "nothing"]},
    {"target_modules": ["nothing"]},
    {"target_modules": [one[1:]]},
    {"target_modules": [one, table, head]},
    {"target_modules": [one, norm]},
    {"target_modules": [one, layers]},
    {"target_modules": [f"{layers}.1"]},
    {"target_modules": rf".*\.{layers}\.1\..*({one}|{two})"},
    {"target_modules": rf"{one}"},
    {"target_modules": rf".*{two}"},
    {"target_modules": "ALL-linear"},
    every,
    every | {"task_type": "SEQ_CLS"},
    every | {"exclude_modules": [two]},
    every | {"exclude_modules": rf".*\.0\..*{one}"},
    every | {"exclude_modules": "nothing"},
    every | {"modules_to_save": [three]},
    every | {"modules_to_save": [head, norm]},
    every | {"modules_to_save": [three[1:]]},
    every | {"modules_to_save": [f"{layers}.0.{three}", f".*{two}"]},
    both | {"layers_to_transform": 1},
    both | {"layers_to_transform": [0, 5]},
    both | {"layers_to_transform": []},
    both | {"layers_to_transform": [7]},
    both | {"layers_to_transform": [1], "layers_pattern": layers},
    both | {"layers_to_transform": [1], "layers_pattern": [layers, "x"]},
    both | {"layers_to_transform": [1], "layers_pattern": "self_attn"},
    both | {"layers_to_transform": [0], "layers_pattern": []},
    both | {"layers_pattern": layers},
    both | {"exclude_modules": [one, two]},
    both | {"modules_to_save": [one], "task_type": "SEQ_CLS"},
    {"target_modules": rf".*{one}", "layers_to_transform": [1]},
    {"target_modules": [head], "modules_to_save": [table]},
    {"target_modules": [table], "modules_to_save": [head], "task_type": "SEQ_CLS"},
  ]


@functools.cache
def _base(name):
  theirs = classifier(GOLDEN / name) if name[0] in "br" else decoder(GOLDEN / name)
  model, params = pj.load_pretrained(GOLDEN / name)
  sites, _ = plan.sites_of(params, FAMILIES[model.config.family])
  kinds = {site.tensor: site.kind for group in sites.values() for site in group}
  return theirs, targets.modules_of(kinds, "", plan.HEAD)


def _theirs(base, config):
  try:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
  except (ValueError, TypeError):
    return None  # TypeError: a wrapper around an adapter
  inner = model.base_model
  whole = {k for k, m in inner.model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
  return set(inner.targeted_module_names), whole


def _ours(modules, config, directory):
  (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
  try:
    read = configs.read(directory)
    matcher = targets.Matcher("config")
    found = targets.targeted(read, modules, matcher, tables=True)
  except ValueError:
    return None
  return set(found), set(targets.saved(read, modules))


@pytest.mark.parametrize("name", _NAMES)
def test_the_modules_that_a_config_names_are_pefts(name, tmp_path):
  base, modules = _base(name)
  refused = 0
  for config in _cases(*_NAMES[name]):
    theirs, ours = _theirs(base, config), _ours(modules, config, tmp_path)
    assert theirs == ours, config
    refused += theirs is None
  assert 5 < refused < 20


def test_of_patterns_the_same_key_wins():
  module, matcher = "model.layers.1.self_attn.q_proj", targets.Matcher("config")
  for keys in (
    *(["q_proj"], ["q_proj", "self_attn.q_proj"], ["proj"], [".*proj"], ["layers.1.*"]),
    *([r"^model\.layers\.1\.self_attn\.q_proj"], [r"^self_attn\.q_proj"], ["(?:q|k)_proj$"]),
    *([r"^model.layers.1.self_attn.q_proj"], ["^layers"], ["layers.1", "q_proj|k_proj"], ["1.*"]),
  ):
    table = {key: i for i, key in enumerate(keys)}
    want = table.get(get_pattern_key(table, module), "default")
    assert matcher.value(table, module, "default") == want, keys
