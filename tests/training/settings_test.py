"""From a config into frozen dataclasses: every key known, every value sensible."""

import dataclasses

import jax.numpy as jnp
import pytest

from configs.classify import get_config
from peftjax.methods.base import Chain
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
  with pytest.raises(ValueError, match="'loar' is not one of lora, dora, adalora, ia3, adapters"):
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


def test_steps_go_before_epochs_and_none_is_an_error():
  """The number of batches: `steps`, else `epochs` of them, and at least one."""
  assert settings.Train(steps=7, epochs=2.0).total_steps(10) == 7
  assert settings.Train(epochs=2.5).total_steps(10) == 25
  for train in (settings.Train(steps=0), settings.Train(epochs=0.01)):
    with pytest.raises(ValueError, match="no step at all"):
      train.total_steps(10)


def test_warmup_is_a_fraction_or_a_number():
  """Below 1 a share of all updates, from 1 on a number of them."""
  assert settings.Optimizer(warmup=0.1).warmup_steps(200) == 20
  assert settings.Optimizer(warmup=30).warmup_steps(200) == 30


@pytest.mark.parametrize(
  "key",
  ["optimizer__accumulate", "train__batch_size", "train__eval_batch_size", "train__log_every"],
)
def test_counts_start_at_one(key):
  """A count of 0 is refused by name."""
  with pytest.raises(ValueError, match=key.replace("__", r"\.") + "=0"):
    from_config(changed(**{key: 0}))
