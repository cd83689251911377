"""Programs: compiled quickly or as users get them, dropped, and read."""

import functools
from importlib import metadata

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

# Fusion as users have it, or not at all; from jaxlib 0.11 on there is one way.
OLD = metadata.version("jaxlib") < "0.11"
_FUSED = {"xla_cpu_use_fusion_emitters": True} if OLD else {}
_QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
  **({"xla_cpu_use_fusion_emitters": False} if OLD else {}),
  "xla_cpu_parallel_codegen_split_count": 1,
}
_DEFAULT = {
  "xla_backend_optimization_level": 3,
  "xla_llvm_disable_expensive_passes": False,
  **_FUSED,
  "xla_cpu_parallel_codegen_split_count": 32,
}

# Most laws are about values: compiling fast is worth more than running fast.
jit = functools.partial(jax.jit, compiler_options=_QUICK)
# For laws about memory, which is settled before machine code is made: fused as users' programs are.
fused = functools.partial(jax.jit, compiler_options=_QUICK | _FUSED)
# For laws about equality to the bit: all as users' programs are.
optimised = functools.partial(jax.jit, compiler_options=_DEFAULT)


def drop():
  """Forgets compiled programs if there are many: a process may have only so many memory maps."""
  with open("/proc/self/maps") as maps:
    many = sum(1 for _ in maps) > 10_000
  if many:
    jax.clear_caches()


def equations(jaxpr):
  """Every equation of a jaxpr and of all jaxprs inside it (jit, scan, remat, custom_vjp, cond)."""
  if isinstance(jaxpr, ClosedJaxpr):
    jaxpr = jaxpr.jaxpr
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))
    ):
      if isinstance(inner, (Jaxpr, ClosedJaxpr)):
        yield from equations(inner)


def producers(fn, shapes, *args, allow=()):
  """Names of the primitives of `fn(*args)` that yield a float array of one of `shapes`.

  Args:
    fn, args: traced, not run.
    shapes: of weights; the same with the last two axes swapped counts too.
    allow: primitives that may.
  """
  shapes = {tuple(s) for s in shapes} | {(*s[:-2], s[-1], s[-2]) for s in shapes}
  return sorted(
    {
      eqn.primitive.name
      for eqn in equations(jax.make_jaxpr(fn)(*args))
      for out in eqn.outvars
      if eqn.primitive.name not in allow
      and tuple(getattr(out.aval, "shape", ())) in shapes
      and jnp.issubdtype(out.aval.dtype, jnp.floating)
    }
  )
