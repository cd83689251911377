"""`Params` and `Mask`: names in signatures for a model's parameters and a choice among them."""

from typing import Any, TypeAlias

# A pytree, most often of nested dicts, whose leaves are arrays, `Weight`s or shapes, and None where
# a half of `partition` has a hole.
Params: TypeAlias = Any

# Booleans in the structure of parameters, one per array: True on the chosen ones.
Mask: TypeAlias = Any
