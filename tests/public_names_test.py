"""What `peftjax` itself exports: what a user writes daily, and no more."""

import peftjax as pj
from peftjax.methods.registry import METHODS


def test_the_package_has_few_names_and_every_method():
  """The rest is in its module: `pj.quant.nf4`, `pj.sharding.make_mesh`, `pj.optim.freeze`."""
  assert len(pj.__all__) <= 40 and pj.__all__ == sorted(pj.__all__)
  assert all(getattr(pj, name) is METHODS[name] for name in METHODS)
  assert set(METHODS) <= set(pj.__all__)
