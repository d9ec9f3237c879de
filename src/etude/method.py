"""What every method is: a frozen dataclass whose `apply` takes values and returns a value.

The annotations of `apply` are the whole interface.  Nothing is registered: a folder is the registry, and other packages add
methods by the entry-point group ``etude.methods``.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import re
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from etude.engine.budget import Budget
from etude.values.corpus import Corpus
from etude.values.errors import InputError, nearest
from etude.values.generator import Generator
from etude.values.measurement import Measurement
from etude.values.model import Model

VALUES: dict[str, type] = {"model": Model, "corpus": Corpus, "generator": Generator, "measurement": Measurement}
"""The kinds of value by the names that users write."""

MEASUREMENTS = tuple[Measurement, ...]


@dataclass(frozen=True)
class Method:
    """Base of every method, measure and world.

    A subclass is a frozen dataclass: its fields are the hyperparameters, each with a default and a line beneath that documents it.
    It defines ``apply``; calling it checks the inputs, applies, and freezes what comes out.
    """

    paper: ClassVar[str | None] = None
    """The paper's slug in the catalogue, for a method that a paper proposes."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "apply" in vars(cls):
            cls.__call__ = _checked(vars(cls)["apply"])  # type: ignore[method-assign]

    def draws_random(self) -> bool:
        """Whether these hyperparameters make `apply` use its seed; if not, it is computed once for all seeds."""
        return True

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        raise TypeError(f"{type(self).__name__} defines no apply")


def _checked(apply: Any) -> Any:
    @functools.wraps(apply)
    def call(self: Method, *inputs: Any, **named: Any) -> Any:
        face = interface(type(self))
        bound = inspect.signature(apply).bind(self, *inputs, **named)
        for slot in face.inputs:
            value: Any = bound.arguments.get(slot.name)
            for item in value if slot.many else [value]:
                if not (isinstance(item, slot.kind) or (item is None and not slot.required)):
                    raise TypeError(f"{face.name} takes a {slot.kind.__name__} as {slot.name}, got {type(item).__name__}")
        result = apply(self, *inputs, **named)
        for item in result if isinstance(result, tuple) else (result,):
            if isinstance(item, Model):
                item.frozen_now()
        return result

    return call


@dataclass(frozen=True)
class Slot:
    """One input of a method."""

    name: str
    kind: type
    many: bool = False
    """Whether it takes a list."""
    required: bool = True


@dataclass(frozen=True)
class Parameter:
    """One hyperparameter of a method."""

    name: str
    annotation: Any
    default: Any
    documentation: str

    @property
    def type(self) -> str:
        return str(getattr(self.annotation, "__name__", self.annotation)).replace("typing.", "") if not typing.get_args(self.annotation) else str(self.annotation).replace("typing.", "")


@dataclass(frozen=True)
class Interface:
    """What is known of a method from its annotations and docstring."""

    cls: type[Method]
    name: str
    """Dotted, as users write it: ``compress.sleb``."""
    summary: str
    documentation: str
    inputs: tuple[Slot, ...]
    output: type
    parameters: tuple[Parameter, ...]
    seeded: bool
    budgeted: bool

    def told(self, label: str) -> str | None:
        """What the documentation says after such a label, as in ``Cost: one forward pass.``, to the end of the paragraph or the next label; None if it says nothing."""
        found = re.search(rf"(?<!\w){label}: (.+?)(?=\n\n|\n[A-Z][a-z]+: |\Z)", self.documentation, re.DOTALL)
        return " ".join(found.group(1).split()) if found else None

    def as_data(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "name": self.name,
            "paper": self.cls.paper,
            "stage": self.name.partition(".")[0] if "." in self.name else "measure",
            "summary": self.summary,
            "inputs": {slot.name: kind_name(slot.kind) + (" list" if slot.many else "") for slot in self.inputs},
            "output": kind_name(self.output),
            "takes_seed": self.seeded,
            "takes_budget": self.budgeted,
            "parameters": [{"name": p.name, "type": p.type, "default": list(p.default) if isinstance(p.default, tuple) else p.default, "documentation": p.documentation} for p in self.parameters],
        }


def kind_name(kind: type) -> str:
    """The name that users write for a kind of value."""
    return next((name for name, known in VALUES.items() if known is kind), kind.__name__.lower())


def interface(cls: type[Method]) -> Interface:
    """A method's interface, read once.  Raises TypeError if its annotations are not those of a method."""
    known: Any = cls
    return _read_interface(known)


@functools.cache
def _read_interface(cls: Any) -> Interface:
    hints = typing.get_type_hints(cls.apply)  # type: ignore[attr-defined]
    output = hints.pop("return", None)
    if typing.get_origin(output) is tuple:
        output = typing.get_args(output)[0]
    if output not in VALUES.values():
        raise TypeError(f"{cls.__name__}.apply returns {output!r}, which is no value")
    slots = []
    signature = inspect.signature(cls.apply)  # type: ignore[attr-defined]
    for name, hint in hints.items():
        if name in ("seed", "budget"):
            continue
        inner = typing.get_args(hint)
        many = typing.get_origin(hint) is list
        optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kind = inner[0] if many or optional else hint
        if kind not in VALUES.values():
            raise TypeError(f"{cls.__name__}.apply takes {name}: {hint!r}, which is no value")
        slots.append(Slot(name, kind, many, signature.parameters[name].default is inspect.Parameter.empty))
    lines = inspect.cleandoc(cls.__doc__ or "")
    return Interface(
        cls, dotted_name(cls), lines.split("\n")[0], lines, tuple(slots), output, _parameters(cls), "seed" in hints, hints.get("budget") in (Budget, Budget | None)
    )  # fmt: skip


def dotted_name(cls: type) -> str:
    """``etude.methods.compress.sleb`` gives ``compress.sleb``; a measure has its file's name alone, a world too, with - for _ (``testbed-masked``)."""
    parts = cls.__module__.split(".")
    if "methods" in parts:
        return ".".join(parts[parts.index("methods") + 1 :])
    return parts[-1].replace("_", "-") if "worlds" in parts else parts[-1]


def _parameters(cls: type[Method]) -> tuple[Parameter, ...]:
    hints = typing.get_type_hints(cls)
    documentation = _field_documentation(cls)
    found = []
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc, operator]
        found.append(Parameter(field.name, hints[field.name], default, documentation.get(field.name, "")))
    return tuple(found)


def _field_documentation(cls: type) -> dict[str, str]:
    """The string beneath each field, its base classes' included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base) or base is Method:
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[field.target.id] = inspect.cleandoc(str(below.value.value))
    return found


# Discovery.


@functools.cache
def discover(room: str) -> Mapping[str, type[Method]]:
    """Every method of a room (``methods``, ``measures`` or ``worlds``) by its dotted name.

    One public class a file; files and folders that begin with an underscore are no methods.
    """
    package = importlib.import_module(f"etude.{room}")
    packages = [package]
    if room == "methods":
        packages += [entry.load() for entry in importlib.metadata.entry_points(group="etude.methods")]
    found: dict[str, type[Method]] = {}
    for root in packages:
        for info in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
            if info.ispkg or info.name.rpartition(".")[2].startswith("_"):
                continue
            cls = public_class(info.name)
            found[dotted_name(cls)] = cls
    return types.MappingProxyType(dict(sorted(found.items())))


def public_class(module_name: str) -> type[Method]:
    """The one method that a module defines.  Raises TypeError if it defines none or several."""
    module = importlib.import_module(module_name)
    own = [item for item in vars(module).values() if isinstance(item, type) and issubclass(item, Method) and item.__module__ == module_name and not item.__name__.startswith("_")]
    if len(own) != 1:
        raise TypeError(f"{module_name} defines {len(own)} public methods; a method file defines one")
    return own[0]


@functools.cache
def names(room: str) -> tuple[str, ...]:
    """Names in a room without importing any of it."""
    spec = importlib.util.find_spec(f"etude.{room}")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    found = [
        info.name.removeprefix("etude.").removeprefix("methods.").removeprefix(f"{room}.")
        for info in pkgutil.walk_packages(spec.submodule_search_locations, f"etude.{room}.")
        if not info.ispkg and not info.name.rpartition(".")[2].startswith("_")
    ]
    return tuple(sorted(name.replace("_", "-") if room == "worlds" else name for name in found))


def find(room: str, name: str) -> type[Method]:
    """The method of this name; only its own file is imported.  Raises InputError with the nearest name."""
    if name in names(room):
        return public_class(f"etude.{room}.{name.replace('-', '_')}")
    outside = discover(room) if room == "methods" and importlib.metadata.entry_points(group="etude.methods") else {}
    if name in outside:
        return outside[name]
    what = {"methods": "method", "measures": "measure", "worlds": "world"}[room]
    raise InputError(f"there is no {what} {name!r}", remedy=nearest(name, [*names(room), *outside]))


@functools.cache
def by_paper() -> Mapping[str, tuple[str, ...]]:
    """Which methods carry a paper's slug, read from the sources: none of them is imported.  Measures and worlds count as methods do.

    A method of another package is asked after it is loaded.
    """
    found: dict[str, list[str]] = {}
    for room in ("methods", "measures", "worlds"):
        spec = importlib.util.find_spec(f"etude.{room}")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        for name in names(room):
            path = Path(next(iter(spec.submodule_search_locations)), *name.replace("-", "_").split(".")).with_suffix(".py")
            slug = _paper_of(path.read_text(encoding="utf8"))
            if slug:
                found.setdefault(slug, []).append(name)
    if importlib.metadata.entry_points(group="etude.methods"):
        for name, cls in discover("methods").items():
            if cls.paper and name not in found.get(cls.paper, ()):
                found.setdefault(cls.paper, []).append(name)
    return types.MappingProxyType({slug: tuple(names) for slug, names in found.items()})


def _paper_of(source: str) -> str | None:
    """The string that a class of this source assigns to ``paper``."""
    for node in ast.parse(source).body:
        for line in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(line, ast.Assign) and [ast.unparse(target) for target in line.targets] == ["paper"] and isinstance(line.value, ast.Constant):
                return str(line.value.value)
    return None
