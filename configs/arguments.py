"""Arguments of a config file: "model=base,task=rte" into a dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def parse(file: str, arg: str, choices: Mapping[str, Sequence[str]], **free: str) -> dict[str, str]:
  """The choices that `arg` makes; for names it leaves out, the first choice.

  Args:
    file: the config file, for errors.
    arg: such as "model=base,task=rte".
    choices: allowed values by name.
    **free: names that take any value, with their default.

  Raises:
    ValueError: on a name or a value that is not among the choices, which are listed.
  """
  given = {**{name: values[0] for name, values in choices.items()}, **free}
  for part in filter(None, arg.split(",")):
    name, _, value = part.partition("=")
    if name not in given:
      takes = ", ".join(f"{n}=..." for n in given) or "no argument"
      raise ValueError(f"{file} takes {takes}, not {part!r}")
    if value not in choices.get(name, (value,)):
      raise ValueError(f"{name}={value!r} is not one of {', '.join(choices[name])}")
    given[name] = value
  return given
