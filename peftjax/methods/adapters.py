"""Bottleneck adapters: Houlsby et al. 2019, Pfeiffer et al. 2020, He et al. 2021."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peftjax.core import given, paths, ranges
from peftjax.core.attachment import is_attachment
from peftjax.core.layout import Layout, Site
from peftjax.core.params import Mask, Params
from peftjax.core.ranges import DType, Length, Positive
from peftjax.methods.base import Method
from peftjax.methods.bottleneck import Bottleneck
from peftjax.nn.ffn import ACTIVATIONS

# Scales and biases of normalisations, in our models and by linen's own names.
_NORMS = r".*(norm|Norm|ln)\w*/(scale|bias)"
# Names of the residual additions of a block in our encoders and decoders.
_RESIDUALS = r".*/(attention/output/residual|output/residual|\w+_residual)"
_FFN_IN_BERT, _FFN_IN_DECODERS = r".*/layers(_\d+)?/output", r".*/mlp"


class Place(NamedTuple):
  """The place of an adapter, and its input; see `Bottleneck`."""

  modules: str
  reads: int | None = None
  again: bool = False


class Placement(NamedTuple):
  """A kind of adapter as its paper defines it.

  Attributes:
    places: places in our models; those that a model has are used.
    module: the adapter's input at a module that is named by hand.
    activation, init, scale, norms: the paper's choices.
  """

  places: tuple[Place, ...]
  module: Place
  activation: str
  init: str
  scale: float = 1.0
  norms: bool = False


_PARALLEL = (Place(f"{_FFN_IN_BERT}/residual", 1), Place(_FFN_IN_DECODERS, 0))
PLACEMENTS: Mapping[str, Placement] = {
  "houlsby": Placement((Place(_RESIDUALS, 0),), Place("", None), "gelu", "near_zero", norms=True),
  "pfeiffer": Placement(
    (Place(f"{_FFN_IN_BERT}/LayerNorm", None, True), Place(r".*/mlp_residual")),
    Place("", None),
    "relu",
    "bert",
  ),
  "parallel": Placement(_PARALLEL, Place("", 0), "relu", "bert"),
  "scaled_parallel": Placement(_PARALLEL, Place("", 0), "relu", "lora", 4.0),
  "after_residual": Placement((Place(_RESIDUALS),), Place("", None), "gelu", "near_zero"),
}

# Initialisations of W_down and W_up; biases begin at zero.
_initializers = jax.nn.initializers
_NEAR_ZERO = _initializers.truncated_normal(1e-2, lower=-2.0, upper=2.0)
_BERT = _initializers.normal(0.02)
INITS: Mapping[str, tuple[Any, Any]] = {
  "near_zero": (_NEAR_ZERO, _NEAR_ZERO),
  "bert": (_BERT, _BERT),
  # U(±1/√in), as torch.nn.Linear begins.
  "lora": (_initializers.variance_scaling(1 / 3, "fan_in", "uniform"), _initializers.zeros),
}


@dataclasses.dataclass(frozen=True)
class AdaptersMethod(Method):
  """Bottleneck adapters f(u) = s · (W_up φ(W_down u + b_down) + b_up).

  With x the input of a sub-layer (attention or feed-forward), h its result and r the stream of
  the residuals, the placements are

  * `"houlsby"`: r + h + f(h), after both sub-layers; φ = GELU; all LayerNorms are trained too
    (Houlsby et al. 2019, arXiv 1902.00751, section 2.1 and figure 2).
  * `"pfeiffer"`: LN(r + h + f(LN(r + h))), after the feed-forward, with the one frozen LayerNorm
    twice; in a pre-norm decoder r + h + f(r + h); φ = ReLU (Pfeiffer et al. 2020, arXiv 2005.00247,
    appendix A.1).
  * `"parallel"`: r + h + f(x), beside the feed-forward; φ = ReLU (He et al. 2021, arXiv 2110.04366,
    table 1); `"scaled_parallel"`: with s = 4 and f = 0 at first (there, section 4.6).
  * `"after_residual"`: r + h + f(r + h), after both sub-layers, before the next normalisation.

  Args:
    size: M, the width of the bottleneck.
    placement: one of these.
    targets: modules instead, by name or regex, of any linen model: a parallel adapter then adds
      f(first argument), any other f(result), to what the module returns.
    activation: φ, one of `nn.ffn.ACTIVATIONS`.
    init: initialisation of W_down and W_up: `"near_zero"`, N(0, 0.01²) cut at 2σ (Houlsby, section
      3.6), `"bert"`, N(0, 0.02²), or `"lora"`, U(±1/√in) and 0.
    scale: s.
    norms: also train the scales and biases of all normalisations.
    dtype: dtype of the adapter.
    activation, init, scale, norms: None follows the placement's paper.

  Raises:
    ValueError: on an unknown name, or a number out of range.
  """

  size: Length = 64
  placement: str = "houlsby"
  targets: str | Sequence[str] = ()
  _: dataclasses.KW_ONLY
  activation: str | None = None
  init: str | None = None
  scale: Positive | None = None
  norms: bool | None = None
  dtype: DType = jnp.float32

  def __post_init__(self) -> None:
    super().__post_init__()
    ranges.one_of("placement", self.placement, PLACEMENTS)
    for name, allowed in (("activation", ACTIVATIONS), ("init", INITS)):
      if (given := getattr(self, name)) is not None:
        ranges.one_of(name, given, allowed)

  def claims(self, params: Params, layout: Layout | None = None) -> list[str]:
    own = _bottlenecks(params)
    norms = self._paper.norms if self.norms is None else self.norms
    claimed = lambda p: _module(p) in own or (norms and re.fullmatch(_NORMS, p))
    return [p for p in paths.leaves(params) if claimed(p)]

  def attach(self, key: jax.Array, params: Params, layout: Layout | None = None) -> Params:
    """`params` with a `Bottleneck` as the parameter `adapter` of every module it is placed at.

    Args:
      key: folded with the path of each layer's module.
      params: plain, quantised or abstract (`jax.ShapeDtypeStruct`).
      layout: the layout of the modules, `peftjax.linen.layout(model, *example_inputs)`.

    Raises:
      ValueError: without a layout; if no module is where the placement or a target says; if one
        does not read or return what the adapter needs; if it has an adapter already, or something
        else of that name.
    """
    given.check_params(params)
    sites = {path: s for path, s in (layout or {}).items() if isinstance(s, Site)}
    if not sites:
      raise ValueError(
        "adapters lie beside modules, which the parameters do not show. Write "
        "method.attach(key, params, peftjax.linen.layout(model, *example_inputs))."
      )
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    for path, place in self._places(sites).items():
      site = sites[path]
      make = lambda key, path=path, site=site, place=place: self._make(key, path, site, place)
      node = jax.eval_shape(make, key) if abstract else make(key)
      _check_free(params, path)
      params = put(params, [*path.split("/"), "adapter"], node)
    return params

  def trainable(self, params: Params) -> Mask:
    """True on the bottlenecks but not their scale, and on normalisations where they train."""
    claimed, own = set(self.claims(params)), _bottlenecks(params)
    on = lambda p: p in claimed and not (_module(p) in own and p.endswith("/scale"))
    return paths.map_leaves(lambda p, leaf: jax.tree.map(lambda _: on(p), leaf), params)

  @property
  def _paper(self) -> Placement:
    """The paper's choices, for fields that are None."""
    return PLACEMENTS[self.placement]

  def _places(self, sites: Mapping[str, Site]) -> dict[str, Place]:
    """The place of every module that gets an adapter, by path."""
    kind = self._paper
    if not self.targets:
      found = {p: place for p in sites for place in kind.places if re.fullmatch(place.modules, p)}
      if not found:
        raise ValueError(
          f"no module of this model is where {self.placement!r} adapters go. Name modules "
          f"yourself, targets=[...]; there are:\n  {_some(sites)}"
        )
      return found
    patterns = [self.targets] if isinstance(self.targets, str) else list(self.targets)
    places: dict[str, Place] = {}
    for pattern in patterns:
      found = {p: kind.module for p in sites if _names(pattern, p)}
      if not found:
        raise ValueError(f"target {pattern!r} matches no module; there are:\n  {_some(sites)}")
      places.update(found)
    return places

  def _make(self, key: jax.Array, path: str, site: Site, place: Place) -> Bottleneck:
    wide = site.returns
    reads = wide if place.reads is None else dict(enumerate(site.reads)).get(place.reads)
    if reads is None or wide is None:
      raise ValueError(
        f"{path} reads {site.reads} and returns {site.returns} (widths of float arrays), which a "
        f"{self.placement!r} adapter cannot be put around"
      )
    paper = self._paper
    down_init, up_init = INITS[self.init or paper.init]
    scale = paper.scale if self.scale is None else self.scale
    downs, ups = [], []
    for layer in paths.layer_paths(path, site.stack):
      down_key, up_key = jax.random.split(paths.fold_in_path(key, layer))
      downs.append(down_init(down_key, (reads, self.size), self.dtype))
      ups.append(up_init(up_key, (self.size, wide), self.dtype))
    stacked = lambda xs: jnp.stack(xs).reshape(*site.stack, *xs[0].shape)
    return Bottleneck(
      down=stacked(downs),
      down_bias=jnp.zeros((*site.stack, self.size), self.dtype),
      up=stacked(ups),
      up_bias=jnp.zeros((*site.stack, wide), self.dtype),
      scale=jnp.full(site.stack, scale, jnp.float32),
      activation=self.activation or paper.activation,
      reads=place.reads,
      again=place.again,
    )


adapters = AdaptersMethod


def _bottlenecks(params: Any) -> set[str]:
  """The paths of bottlenecks; a third party may have modules that are called "adapter" too."""
  whole = lambda node: paths.is_leaf(node) or is_attachment(node)
  flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=whole)
  return {paths.name(path) for path, node in flat if isinstance(node, Bottleneck)}


def _module(path: str) -> str:
  return path.rpartition("/")[0]


def _check_free(params: Any, path: str) -> None:
  """Raises ValueError if the module at `path` has something called "adapter"."""
  if f"{path}/adapter" in _bottlenecks(params):
    raise ValueError(f"{path} has an adapter already; attach to the parameters without it")
  if any(f"{p}/".startswith(f"{path}/adapter/") for p in paths.leaves(params)):
    raise ValueError(
      f"{path} has a module or parameter of its own that is called 'adapter', where the adapter "
      "would lie; name a module around it or inside it"
    )


def _names(pattern: str, path: str) -> bool:
  """Tells whether a pattern names a module: a plain word its last name, a regex its whole path."""
  return path.split("/")[-1] == pattern or re.fullmatch(pattern, path) is not None


def _some(sites: Mapping[str, Site]) -> str:
  shown = [p for p in sites if p][:20]
  return "\n  ".join([*shown, *(["..."] if len(sites) > 20 else [])])


def put(tree: Any, path: list[str], node: Any) -> Any:
  """`tree` with `node` at that path, made where it is not there."""
  head, *rest = path
  return {**tree, head: put(tree.get(head, {}), rest, node) if rest else node}
