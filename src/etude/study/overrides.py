"""Changes to a study from the command line: ``--set key=value``."""

from __future__ import annotations

from typing import Any

from etude.study.yaml import scalar
from etude.values.errors import InputError, nearest

SOURCES = ("model", "corpus", "generator")


def override(data: Any, text: str) -> None:
    """Apply ``path=value``: the path is dotted, and may begin at a given value or a step as well as at the top."""
    key, equals, value = text.partition("=")
    if not equals or not isinstance(data, dict):
        raise InputError(f"--set {text!r} is not of the form key=value", remedy="As in `--set base=./my-model` or `--set pruned.sleb.blocks=0.5`.")
    parts = key.split(".")
    given, steps = data.get("given") or {}, data.get("steps") or {}
    if parts[0] in given:
        parts = ["given", *parts]
    elif parts[0] in steps:
        parts = ["steps", *parts]
    new = scalar(value)
    if parts[0] == "given" and len(parts) == 2 and not isinstance(new, dict) and isinstance(given.get(parts[1]), dict):
        parts.append(next((kind for kind in SOURCES if kind in given[parts[1]]), "model"))
    spot: Any = data
    for index, part in enumerate(parts[:-1]):
        step = isinstance(spot, dict) and part not in spot
        if step and isinstance(spot.get("try"), dict) and part in spot["try"]:
            spot = spot["try"]
        if step and isinstance(spot.get("use"), str):
            spot["use"] = {spot["use"]: {}}
        if not isinstance(spot, dict) or part not in spot:
            raise InputError(f"--set {text!r}: there is no {'.'.join(parts[: index + 1])!r} in the study", remedy=nearest(part, _choices(spot)))
        spot = spot[part]
    last = parts[-1]
    if isinstance(spot, dict) and parts[0] == "steps" and last not in ("budget", "use", "try", "inputs"):
        spot = _fields_of(spot, last)
    if not isinstance(spot, dict):
        raise InputError(f"--set {text!r}: {'.'.join(parts[:-1])!r} has no fields")
    spot[last] = new


def _fields_of(spot: dict[str, Any], last: str) -> dict[str, Any]:
    """Go through `use:` and the method's name to its parameters."""
    if last in spot:
        return spot
    use = spot.get("use", spot)
    if isinstance(use, str):
        use = spot["use"] = {use: {}}
    if isinstance(use, dict) and len(use) == 1:
        ((name, fields),) = use.items()
        if fields is None:
            fields = use[name] = {}
        if isinstance(fields, dict):
            return fields
    return spot


def _choices(spot: Any) -> list[str]:
    """What could have been named here: keys, and the labels under `try:`."""
    return [str(key) for key in (*spot, *(spot.get("try") or ()))] if isinstance(spot, dict) else []
