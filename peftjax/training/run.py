"""`Run`: the compiled functions of a run and the state they pass on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peftjax import data, optim, sharding
from peftjax.core import paths, tree
from peftjax.core.params import Params
from peftjax.models import families, limits
from peftjax.nn import virtual
from peftjax.training import build, factory, flops, state
from peftjax.training.checkpoint import Checkpoints, digest
from peftjax.training.logs import Bar
from peftjax.training.program import Program
from peftjax.training.settings import Settings
from peftjax.training.task import Task

_DIVERGED = (
  "{} not finite. Try a lower --config.optimizer.learning_rate or a longer warm-up, in another "
  "--workdir."
)
_FROZEN = (
  "{} not finite, and neither is the pretrained model's {}, which is not trained: no learning rate "
  "mends it. Download or mend the checkpoint."
)


class Run:
  """The compiled functions of a run and the state they pass on.

  With `rate_in_state` the learning rate is an array in the optimizer's state, so that the step is
  the same program whatever it is. Without a mesh text (None, not "") it uses one device. The data,
  model and method of the settings are not read where a `task` or a `model` is given.
  """

  def __init__(
    self,
    settings: Settings,
    mesh_text: str | None,
    *,
    rate_in_state: bool = False,
    task: Task | None = None,
    model: build.Attached | None = None,
  ):
    self.settings = settings
    self.rate_in_state = rate_in_state
    self.mesh = None if mesh_text is None else build.mesh_of(mesh_text)
    self._check_batch("train.batch_size", settings.train.batch_size)
    self._check_batch("train.eval_batch_size", settings.train.eval_batch_size)
    self.task = build.task(settings) if task is None else task
    self._check_lengths()
    model = model or build.attached(settings, self.task.outputs, self.mesh)
    if families.ours(model.module):
      self._check_texts(model)
    elif settings.model.factory:
      factory.check(settings.model.factory, model.module, model.params, self.task)
    self.module, self.mask, self.new = model.module, model.mask, model.new
    self.method, self._base = model.method, model.base
    self.parameters = tree.count(model.params)
    self.trainable = tree.count(model.params, model.mask)
    train, self.frozen = tree.partition(model.params, model.mask)
    self.stream = self.task.stream(settings.train.batch_size, settings.seed)
    self.total = settings.train.total_steps(self.stream.steps_per_epoch)
    every = settings.optimizer.accumulate
    updates = settings.optimizer.updates(self.total)
    self.settled = min(model.method.settled(updates) * every, self.total)
    self.dropout_key = build.dropout_key(settings)
    wanted = settings.optimizer.paged
    self._use(model, train, paged=wanted == "always")
    self.paging = ""
    if wanted == "auto":
      batch = self.place(next(iter(self.stream.iterate(0, 1))))
      compiled = self._step.lower(self.state, self.frozen, batch, self.dropout_key).compile()
      paged, self.paging = optim.decide_paging(
        compiled, jax.devices()[0], settings.optimizer.device_memory_bytes
      )
      if paged:
        self._use(model, train, paged=True)
    self.steps_done = 0
    # Work of this process: the batches' rows, their tokens, and the operations with them.
    self.done = {"examples": 0.0, "tokens": 0.0, "flops": 0.0}
    self._shapes: dict[tuple[int, ...], flops.Work] = {}
    self._pending: list[tuple[int, tuple[int, ...], dict[str, jax.Array]]] = []

  def _use(self, model: build.Attached, train: Any, *, paged: bool) -> None:
    """The functions of the run, and its initial state."""
    program = Program(
      self.settings,
      self.task.kind,
      self.module,
      model.method,
      train,
      self.total,
      self.mesh,
      paged=paged,
      rate_in_state=self.rate_in_state,
    )
    self.schedule, self.tx = program.schedule, program.tx
    self._step, self.predict = program.step, program.predict
    self.state: Any = program.start(train)

  def announce(self, bar: Bar) -> None:
    bar.print(self.task.describe())
    share = 100 * self.trainable / self.parameters
    if self.settings.model.factory:
      _, others = factory.example(self.module, self.task.kind.inputs, 1)
      bar.print(f"{self.settings.model.factory} is given {', '.join(('tokens', *others))}")
    bar.print(f"training {self.trainable:,} of {self.parameters:,} parameters ({share:.2f} %)")
    if self.paging:
      bar.print(f"optimizer state {self.paging}")
    if self.new:
      bar.print(f"new in this model: {', '.join(self.new)}")
    if self.steps_done:
      bar.print(f"going on after step {self.steps_done} of {self.total}")

  def steps(self) -> Iterator[int]:
    """Dispatches the steps that are left, one per iteration, and yields how many are done."""
    for batch in self.stream.iterate(self.steps_done, self.total):
      self.state, out = self._step(self.state, self.frozen, self.place(batch), self.dropout_key)
      self.steps_done += 1
      self._pending.append((self.steps_done, flops.shape_of(batch), out))
      yield self.steps_done

  def fetch(self, *, all_of_them: bool) -> list[dict[str, Any]]:
    """Numbers of the dispatched steps, checked to be finite.

    Unless all are asked for, the newest is left running: the device has work while the host reads
    the one before. The state may be evaluated or saved only after all have been fetched.
    """
    rows = []
    while len(self._pending) > (0 if all_of_them else 1):
      number, shape, out = self._pending.pop(0)
      rows.append(self.row(number, jax.device_get(out)))
      self._count(*shape)
    return rows

  def row(self, number: int, out: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of a step as they are logged; FloatingPointError unless all are finite."""
    values = {name: float(value) for name, value in out.items()}
    if not all(map(math.isfinite, values.values())):
      shown = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
      raise FloatingPointError(self._diverged(f"step {number}: {shown}"))
    return {"step": number, **values}

  def _count(self, rows: int, *lengths: int) -> None:
    """Adds a batch to `done`: all of its tokens, padding included, as devices compute them."""
    self.done["examples"] += rows
    if not families.ours(self.module):
      return
    shape = (rows, *lengths)
    if shape not in self._shapes:
      config, train = self.module.config, self.state.train
      self._shapes[shape] = flops.step_work(config, train, self.frozen, *shape)
    self.done["tokens"] += rows * sum(lengths)
    self.done["flops"] += self._shapes[shape].model

  @property
  def peak(self) -> float | None:
    """FLOP/s in bfloat16 of all devices, if they are known."""
    devices = jax.devices()[:1] if self.mesh is None else self.mesh.devices.flatten()
    one = flops.peak(devices[0].device_kind)
    return one and one * len(devices)

  def learning_rate(self, number: int) -> float:
    """The learning rate of a step, counted from 1."""
    return float(self.schedule((number - 1) // self.settings.optimizer.accumulate))

  def place(self, batch: Any) -> Any:
    """A batch on the devices: its rows along the data axes."""
    if self.mesh is None:
      return batch
    batch = dict(batch)
    return sharding.put(batch, sharding.batch_shardings(batch, self.mesh))

  def evaluate(self, part: str, params: Params = None) -> dict[str, float]:
    """Metrics of a split, with the current parameters or others."""
    train, frozen = self.state.train, self.frozen
    if params is not None:
      train, frozen = tree.partition(params, self.mask)
    predict = lambda batch: self.predict(train, frozen, self.place(batch))
    scores = self.task.evaluate(predict, part, self.settings.train.eval_batch_size)
    if scores is None:
      raise FloatingPointError(self._diverged(f"step {self.steps_done}: {part} logits"))
    return scores

  def identity(self) -> dict[str, Any]:
    """The data a continuation or a prediction has to agree with: the base, the data, the labels."""
    return {
      "base": self._base or digest(self.settings.model.path()),
      "tokenizer": data.tokenizer_digest(self.settings.model.path()),
      "data": self.task.digest(),
      "labels": self.task.summary().get("labels", []),
    }

  def adapter(self) -> dict[str, Any]:
    """Every array that differs from the pretrained files."""
    params = tree.combine(self.state.train, self.frozen)
    keep = tree.adapter_mask(params, self.mask)
    return {"adapter": tree.partition(params, keep)[0]}

  def everything(self) -> dict[str, Any]:
    """All that a continuation needs; see `check_finite`."""
    self.check_finite()
    return {**self.adapter(), "opt_state": self.state.opt_state, "step": self.state.step}

  def check_finite(self) -> None:
    """Raises FloatingPointError if a trained array is not finite, though loss and gradient were."""
    if not _all_finite(self.state.train):
      raise FloatingPointError(self._diverged(f"step {self.steps_done}: parameters"))

  def best(self, checkpoints: Checkpoints) -> Any:
    """The parameters of the best checkpoint."""
    return tree.combine(checkpoints.arrays("best", self.adapter())["adapter"], self.frozen)

  def on_host(self, params: Params) -> Any:
    """`params` with every array that is not from the pretrained files as NumPy's, whole."""
    adapter, base = tree.partition(params, tree.adapter_mask(params, self.mask))
    return tree.combine(jax.tree.map(sharding.gathered, adapter), base)

  def restore(self, checkpoints: Checkpoints) -> None:
    saved = checkpoints.arrays("latest", self.everything())
    params = tree.combine(saved["adapter"], self.frozen)
    train, self.frozen = tree.partition(params, self.mask)
    self.state = state.TrainState(step=saved["step"], train=train, opt_state=saved["opt_state"])
    self.steps_done = int(saved["step"])

  def _diverged(self, what: str) -> str:
    """The reason of a divergence, as far as it is known, and what is left."""
    for path, leaf in paths.leaves(self.frozen).items():
      floats = [x for x in jax.tree.leaves(leaf) if jnp.issubdtype(x.dtype, jnp.floating)]
      if not all(bool(jnp.isfinite(x).all()) for x in floats):
        return _FROZEN.format(what, path)
    return _DIVERGED.format(what)

  def _check_lengths(self) -> None:
    ways = 1 if self.mesh is None else self.mesh.shape["sequence"]
    lengths = (self.task.lengths, *self.task.widths.values())
    if odd := [length for of in lengths for length in of if length % ways]:
      raise ValueError(
        f"rows of {odd[0]} tokens cannot be split {ways} ways (sequence of the mesh); choose a "
        "divisor of it there, or another --config.data.max_length"
      )

  def _check_texts(self, model: build.Attached) -> None:
    """Raises ValueError unless the model has places and rows in its tables for all texts."""
    positions, extra = model.module.config.max_length, virtual.length(model.params)
    if self.task.lengths[-1] + extra > positions:
      room = f"{positions} positions" + (f", {extra} of them for virtual tokens" if extra else "")
      length = self.settings.data.max_length
      raise ValueError(f"data.max_length={length}, but this model has {room}")
    for part, ids in self.task.ids().items():
      limits.check(model.module.config, *ids, what=f"the {part} texts")

  def _check_batch(self, name: str, size: int) -> None:
    ways = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    if size % ways:
      raise ValueError(f"{name}={size} cannot be split {ways} ways (data x fsdp of the mesh)")


@jax.jit
def _all_finite(arrays: Any) -> jax.Array:
  return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(arrays)]).all()
