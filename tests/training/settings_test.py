"""From a config into frozen dataclasses: every key known, every value sensible."""

import dataclasses
import re

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

import peftjax as pj
from configs.causal_lm import get_config as lm_config
from configs.classify import get_config
from peftjax.methods.base import Chain
from peftjax.methods.registry import METHODS
from peftjax.training import settings
from peftjax.training.settings import from_config


def changed(**changes):
  config = get_config("method=lora,data=bbc")
  with config.unlocked():
    for key, value in changes.items():
      section, _, field = key.rpartition("__")
      (config[section] if section else config)[field] = value
  return config


@pytest.mark.parametrize(
  ("key", "near"),
  [
    ("optimizer__learning_rte", "learning_rate"),
    ("train__bach_size", "batch_size"),
    ("model__scan_layer", "scan_layers"),
    ("data__text_colum", "text_column"),
    ("compilation_cach", "compilation_cache"),
  ],
)
def test_unknown_key_is_named_with_a_near_miss(key, near):
  """A key that no section has raises, naming section, key, the near one and all there are."""
  *section, field = key.split("__")
  with pytest.raises(ValueError, match=f"{field}.*did you mean '{near}'") as error:
    from_config(changed(**{key: 1}))
  assert all(part in str(error.value) for part in section)


def test_unknown_method_field_is_named():
  """The fields of a method are those of its function."""
  with pytest.raises(ValueError, match=r"method \(lora\) has no key 'rnak'.*'rank'"):
    from_config(changed(method__rnak=4)).build_method()


def test_unknown_method_is_named():
  """A method that is not there raises with the list of those that are."""
  with pytest.raises(ValueError, match=f"'loar' is not one of {', '.join(METHODS)}"):
    from_config(changed(method__name="loar")).build_method()


def test_patterns_are_given_as_pattern_equals_number():
  """rank_pattern and alpha_pattern become dicts, split at the last "="."""
  config = changed(
    method__rank_pattern=("query=4", r".*layers_(?=0).*=2"), method__alpha_pattern=("value=8.5",)
  )
  lora = from_config(config).build_method().methods[0]
  assert lora.rank_pattern == {"query": 4, r".*layers_(?=0).*": 2}
  assert lora.alpha_pattern == {"value": 8.5}


@pytest.mark.parametrize("rule", ["query", "query=", "query=four"])
def test_bad_pattern_is_quoted(rule):
  """A rule without a number raises and is quoted."""
  with pytest.raises(ValueError, match=f"rank_pattern: '{rule}' is not"):
    from_config(changed(method__rank_pattern=(rule,))).build_method()


def test_head_is_trained_beside_the_method_unless_told():
  """method.head chains the task head's training."""
  assert isinstance(from_config(changed()).build_method(), Chain)
  assert not isinstance(from_config(changed(method__head=False)).build_method(), Chain)


def test_settings_are_frozen_and_complete():
  """Every field of the config arrives, and cannot be changed afterwards."""
  config = get_config()
  made = from_config(config)
  for name in ("model", "data", "optimizer", "train"):
    section = dataclasses.asdict(getattr(made, name))
    assert {key: section[key] for key in config[name]} == config[name].to_dict()
  with pytest.raises(dataclasses.FrozenInstanceError):
    made.train.epochs = 1.0


def test_compute_dtype_is_one_of_two():
  """float32 and bfloat16 are dtypes, anything else an error that quotes it."""
  assert settings.Model(dtype="bfloat16").options()["dtype"] == jnp.bfloat16
  with pytest.raises(ValueError, match="float16"):
    settings.Model(dtype="float16").options()


def test_remat_is_named_or_as_it_was_before_there_were_names():
  given = lambda remat: settings.Model(remat=remat).options().get("remat")
  assert [given(x) for x in ("none", False, "false")] == [None] * 3
  assert [given(x) for x in ("layer", True, "true", "products")] == ["layer"] * 3 + ["products"]
  with pytest.raises(ValueError, match=r"model\.remat 'all' is not one of none, layer, products"):
    given("all")


def test_the_dtype_of_what_is_trained_is_one_of_two():
  config = lm_config("method=lora")
  with config.unlocked():
    config.method.dtype = "bfloat16"
  assert from_config(config).build_method().dtype == jnp.bfloat16
  config.method.dtype = "float16"
  with pytest.raises(ValueError, match=r"method\.dtype 'float16' is not one of float32, bfloat16"):
    from_config(config).build_method()


def test_steps_go_before_epochs_and_none_is_an_error():
  """The number of batches: `steps`, else `epochs` of them, and at least one."""
  assert settings.Train(steps=7, epochs=2.0).total_steps(10) == 7
  assert settings.Train(epochs=2.5).total_steps(10) == 25
  with pytest.raises(ValueError, match=r"--config\.train\.epochs=0\.01 of 10 batches is no step"):
    settings.Train(epochs=0.01).total_steps(10)
  with pytest.raises(ValueError, match=r"epochs=1e\+20 of 10 batches is more than 2147483647"):
    settings.Train(epochs=1e20).total_steps(10)


def test_warmup_is_a_fraction_or_a_number():
  """Below 1 a share of all updates, from 1 on a number of them."""
  assert settings.Optimizer(warmup=0.1).warmup_steps(200) == 20
  assert settings.Optimizer(warmup=30).warmup_steps(200) == 30
  for warmup, updates in ((30, 30), (30, 7), (1.5, 200), (1, 1)):
    with pytest.raises(ValueError, match=rf"--config\.optimizer\.warmup={warmup} of {updates} "):
      settings.Optimizer(warmup=warmup).warmup_steps(updates)


def test_the_last_update_may_be_of_fewer_batches():
  count = lambda accumulate, *batches: [
    settings.Optimizer(accumulate=accumulate).updates(n) for n in batches
  ]
  assert count(4, 1, 3, 4, 7, 8) == [1, 1, 1, 2, 2] and count(1, 5) == [5]


NAN, INF = float("nan"), float("inf")
WHOLE = (0, -1, True, 2.0, "64", 2**31, 10**400)
OUT_OF_RANGE = {
  "optimizer.learning_rate": (0.0, -1e-3, NAN, INF, True, "1e-3", 1e-40, None, 10**400),
  "optimizer.clip_norm": (-1.0, 0.0, NAN, INF, "1"),
  "optimizer.b1": (1e9, 1.0, -0.1, NAN),
  "optimizer.b2": (1.0, NAN, "0.999"),
  "optimizer.eps": (INF, 0.0, -1e-8, NAN, 1e-50, 2.0),
  "optimizer.weight_decay": (INF, -0.1, NAN),
  "optimizer.warmup": (-1, INF, NAN, "0.1"),
  "optimizer.accumulate": WHOLE,
  "optimizer.device_memory_bytes": (0, 1.5, True),
  "optimizer.name": (3, None),
  "train.epochs": (INF, NAN, 0.0, -1.0, True),
  "train.batch_size": (*WHOLE, None),
  "train.eval_batch_size": WHOLE,
  "train.steps": WHOLE,
  "train.log_every": WHOLE,
  "train.save_every": WHOLE,
  "data.max_length": WHOLE,
  "data.train_examples": (0, 1.0),
  "data.split_seed": (-1, 0.5),
  "data.regression": ("false", 1),
  "model.scan_layers": ("no", 0),
  "quant.block_size": (64.0, True, 0),
  "quant.double_quant": ("no",),
  "seed": (-1, 1.0, 2**31),
  "method.rank": WHOLE,
  "method.alpha": (NAN, INF, 0.0, -8.0, "16"),
  "method.dropout": (1.0, NAN, -0.1),
  "method.b_rate": (NAN, 0.0, INF),
  "method.rslora": ("false", 1),
  "method.head": ("false", 0),
}


@pytest.mark.parametrize("field", OUT_OF_RANGE)
def test_what_is_out_of_range_is_named_with_what_is_allowed(field):
  """The flag, what came and what to write; other types are no numbers."""
  flag = re.escape(f"--config.{field}=")
  for value in OUT_OF_RANGE[field]:
    fields = get_config("method=lora,data=bbc").to_dict()
    *section, name = field.split(".")
    (fields[section[0]] if section else fields)[name] = value
    with pytest.raises(ValueError, match=flag + ".*: write (a|true)") as error:
      from_config(ConfigDict(fields)).build_method()
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
  "field, value, told",
  [
    ("seed", "\ud800", "half a character"),
    ("quant.name", "x" * 10**6, r"quant.name 'x+\.\.\. is not one of none, nf4"),
    ("quant.name", ["nf4"], "quant.name"),
    ("task", {}, "task {} is not one of classify"),
    ("task", "y" * 10**6, "is not one of classify, causal_lm"),
    ("method.name", [None], r"method.name \[None\] is not one of lora"),
    ("method.rank_pattern", 0.5, "rank_pattern=0.5: write a list"),
    ("method.rank_pattern", [7], "rank_pattern=.*write"),
    ("method.rank_pattern", ["q" * 10**6], "is not .PATTERN=NUMBER"),
    ("optimizer.paged", ["auto"], "optimizer.paged"),
    ("optimizer", 7, "optimizer is 7; it has the keys name"),
  ],
)
def test_what_is_no_name_is_refused_in_a_sentence(field, value, told):
  """Whatever its type and length."""
  fields = get_config("method=lora,data=bbc").to_dict()
  *section, name = field.split(".")
  (fields[section[0]] if section else fields)[name] = value
  with pytest.raises(ValueError, match=told) as error:
    made = from_config(ConfigDict(fields))
    made.quant.format()
    made.build_method()
  assert type(error.value) is ValueError and len(str(error.value)) < 500


def test_eight_bits_are_not_quantised_twice():
  """Given as a flag too, which knows nothing of the config's own choice."""
  with pytest.raises(ValueError, match="--config.quant.double_quant=false"):
    settings.Quant(name="int8").format()
  assert settings.Quant(name="int8", double_quant=False).format() == pj.quant.int8()


def test_what_is_in_range_is_taken():
  """Whole numbers are numbers; placeholders may be empty; a text or several."""
  config = changed(
    optimizer__clip_norm=None, optimizer__weight_decay=0, train__epochs=3, train__steps=None
  )
  assert from_config(config).optimizer.clip_norm is None
  assert settings.Text(eval_rows=None, max_length=2).max_length == 2
  for targets in ("query", ("query",), ["query", "value"]):
    fields = get_config("method=lora,data=bbc").to_dict()
    fields["method"]["targets"] = targets
    from_config(ConfigDict(fields)).build_method()
