"""`Params` and `Mask`: what signatures call a model's parameters, and a choice among them."""

from typing import Any, TypeAlias

# A pytree, most often of nested dicts, whose leaves are arrays, `Weight`s or shapes, and None where
# a half of `partition` has a hole.
Params: TypeAlias = Any

# Booleans in the structure of parameters, one an array: true on those that are meant.
Mask: TypeAlias = Any
