"""YAML as plain data, with the line and column of everything in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from etude.values.errors import InputError

MOST_BYTES, MOST_NODES, MOST_DEPTH = 1 << 20, 50_000, 30

CORE = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null"))
"""The tags of plain data."""


class Places:
    """Where each part of a document stands."""

    def __init__(self, origin: str):
        self.origin = origin
        self.found: dict[tuple[Any, ...], tuple[int, int]] = {(): (0, 0)}

    def of(self, path: tuple[Any, ...]) -> str:
        """``file:line:column`` of a part, else of the nearest part that holds it."""
        while path not in self.found:
            path = path[:-1]
        line, column = self.found[path]
        return f"{self.origin}:{line + 1}:{column + 1}"


def parse(text: str, origin: str) -> tuple[Any, Places]:
    """Read YAML 1.2.  Raises InputError for anything but plain data of a reasonable size."""
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(text) > MOST_BYTES:
        raise InputError(f"the study has {len(text):,} characters; a study has at most {MOST_BYTES:,}", where=origin)
    try:
        document = YAML(typ="rt").load(text)
    except DuplicateKeyError as error:
        mark = error.problem_mark
        key = str(error.problem).split('"')[1] if '"' in str(error.problem) else "?"
        raise InputError(f"the key {key!r} stands here twice", where=f"{origin}:{mark.line + 1}:{mark.column + 1}", remedy="Keep one of them.") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        raise InputError(f"this is no YAML: {error.problem or error.context}", where=place, remedy="Look for a missing colon, quote, bracket or space of indentation.") from error
    except (YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"this is no YAML: {str(error).splitlines()[0] if str(error) else 'nested too deeply'}", where=origin) from error
    places = Places(origin)
    return _plain(document, (), places, iter(range(MOST_NODES))), places


def scalar(text: str) -> Any:
    """One value as YAML reads it: ``3``, ``0.5``, ``true``, ``[1, 2]``, words."""
    return parse(f"- {text}" if text else "- ''", "--set")[0][0]


def _plain(node: Any, path: tuple[Any, ...], places: Places, left: Iterator[int]) -> Any:
    from ruamel.yaml.comments import CommentedMap, CommentedSeq
    from ruamel.yaml.scalarbool import ScalarBoolean
    from ruamel.yaml.scalarfloat import ScalarFloat
    from ruamel.yaml.scalarint import ScalarInt

    if next(left, None) is None or len(path) > MOST_DEPTH:
        raise InputError(f"the study unfolds into more than {MOST_NODES:,} parts, or nests deeper than {MOST_DEPTH}", where=places.of(path), remedy="Are there aliases (*name) of aliases?")
    tag = getattr(getattr(node, "tag", None), "value", None)
    if tag is not None and tag not in CORE:
        raise InputError(f"the tag {tag} makes this no plain value", where=places.of(path), remedy="Use strings, numbers, true, false, lists and mappings; no tags.")
    if isinstance(node, CommentedMap):
        plain = {}
        for key in node:
            if not isinstance(key, (str, int, float)):
                raise InputError(f"{key!r} is no key", where=places.of(path))
            mark = node.lc.data.get(key) if node.lc.data else None
            if mark:
                places.found[(*path, key)] = (mark[0], mark[1])
            plain[str(key)] = _plain(node[key], (*path, key), places, left)
        return plain
    if isinstance(node, CommentedSeq):
        for index in range(len(node)):
            places.found[(*path, index)] = node.lc.item(index) if node.lc.data and index in node.lc.data else places.found.get(path, (0, 0))
        return [_plain(item, (*path, index), places, left) for index, item in enumerate(node)]
    if isinstance(node, ScalarBoolean):
        return bool(node)
    if isinstance(node, ScalarInt):
        return int(node)
    if isinstance(node, ScalarFloat):
        return float(node)
    if node is None or type(node) in (bool, int, float, str):
        return node
    if isinstance(node, str):
        return str(node)
    raise InputError(f"{type(node).__name__} is no plain value", where=places.of(path), remedy="Use strings, numbers, true, false, lists and mappings; no tags.")
