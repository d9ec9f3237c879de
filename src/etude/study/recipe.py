"""A study as its author writes it: YAML to a `Study`, every mistake with its line and its remedy."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etude.engine.budget import Budget
from etude.method import Method, find, interface
from etude.study import expect
from etude.study.overrides import SOURCES, override
from etude.study.tune import MOST_TRIALS, Range, Tune
from etude.study.yaml import Places, parse
from etude.values.errors import InputError, nearest

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
WORLD = "etude:"
REFERENCE = re.compile(r"^([A-Za-z0-9][A-Za-z0-9_-]*)(?:\[([^\]]+)\])?$")


@dataclass(frozen=True)
class Source:
    """Something that is given: a model, corpus or generator by its reference."""

    kind: str
    reference: str
    options: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class Reference:
    """The name of a given value or a step, and perhaps which of its variants."""

    name: str
    labels: tuple[str, ...] = ()
    where: str = ""

    @classmethod
    def parse(cls, text: Any, where: str) -> Reference:
        match = REFERENCE.match(text) if isinstance(text, str) else None
        if not match:
            raise InputError(f"{text!r} names no value", where=where, remedy="Write the name of a given value or a step, as in `pruned` or `pruned[sleb]`.")
        return cls(match[1], tuple(label.strip() for label in match[2].split(",")) if match[2] else (), where)

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(self.labels)}]" if self.labels else self.name


@dataclass(frozen=True)
class Step:
    """A method, or several to be tried, over some inputs."""

    inputs: Mapping[str, tuple[Reference, ...]]
    variants: Mapping[str, Method]
    """By label; a step that tries nothing has the one label ''."""
    budget: Budget | None = None
    tune: Tune | None = None
    where: str = ""


@dataclass(frozen=True)
class Measure:
    """A measure of some values."""

    method: Method
    of: tuple[Reference, ...]
    on: tuple[Reference, ...] = ()
    where: str = ""
    inputs: Mapping[str, tuple[Reference, ...]] = field(default_factory=dict)
    """What it takes beside these, by slot."""

    @property
    def everything(self) -> tuple[Reference, ...]:
        """All that it takes beside what it measures."""
        return (*self.on, *itertools.chain.from_iterable(self.inputs.values()))


@dataclass(frozen=True)
class Study:
    """A graph of methods over values, with what is measured and what is expected."""

    name: str
    given: Mapping[str, Source]
    steps: Mapping[str, Step]
    measures: Mapping[str, Measure]
    question: str = ""
    seeds: tuple[int, ...] = (0,)
    expectations: tuple[expect.Expectation, ...] = ()
    text: str = ""
    """The recipe as it was written."""
    origin: str = ""

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Study:
        """Read a recipe from a file.  Raises InputError, naming file, line and column, for anything that is wrong with it."""
        path = Path(path)
        if not path.is_file():
            beside = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            raise InputError(f"there is no study {path}", remedy=nearest(path.name, beside))
        try:
            text = path.read_text(encoding="utf8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}", remedy="A study is a YAML file in UTF-8.") from error
        return cls.parse(text, str(path), overrides)

    @classmethod
    def parse(cls, text: str, origin: str = "study", overrides: Sequence[str] = ()) -> Study:
        """Read a recipe from a string."""
        data, places = parse(text, origin)
        for text_of_one in overrides:
            override(data, text_of_one)
        return _Reader(places, origin).study(data, text)

    @classmethod
    def of(cls, **parts: Any) -> Study:
        """The same study in Python: the recipe's keys as arguments, with methods and measures as themselves where the recipe names them.

        >>> from etude.methods.compress.sleb import SLEB
        >>> steps = {"pruned": {"inputs": {"model": "base", "calibration": "text"}, "use": SLEB(blocks=0.33)}}

        Read by the reader that reads YAML, so that both build the same graph with the same digests.
        """
        return _Reader(Places("study"), "study").study(_named(parts), "")


def _named(part: Any) -> Any:
    """Plain data for what may hold methods: each by its name and fields."""
    if isinstance(part, Method):
        face = interface(type(part))
        return {face.name: {parameter.name: getattr(part, parameter.name) for parameter in face.parameters}}
    if isinstance(part, Budget):
        return str(part)
    if isinstance(part, Mapping):
        return {str(key): _named(value) for key, value in part.items()}
    return [_named(item) for item in part] if isinstance(part, (list, tuple)) else part


class _Reader:
    """Turns plain data into a study, and remembers where it is reading."""

    def __init__(self, places: Places, origin: str):
        self.places, self.origin = places, origin

    def where(self, *path: Any) -> str:
        return self.places.of(path)

    def study(self, data: Any, text: str) -> Study:
        top = self.mapping(data, (), {"study", "question", "given", "steps", "measure", "seeds", "expect"}, required=("study",))
        name = self.name(top["study"], ("study",))
        given = {self.name(key, ("given", key)): self.source(value, ("given", key)) for key, value in self.table(top, "given").items()}
        steps = {self.name(key, ("steps", key)): self.step(value, ("steps", key)) for key, value in self.table(top, "steps").items()}
        for twice in given.keys() & steps.keys():
            raise InputError(f"{twice!r} is both given and a step", where=self.where("steps", twice), remedy="Give one of them another name.")
        measures = {self.name(key, ("measure", key)): self.measure(key, value, ("measure", key)) for key, value in self.table(top, "measure").items()}
        if not steps and not measures:
            raise InputError("the study is empty: it has neither steps nor anything to measure", where=self.where(), remedy="Add `steps:` or `measure:`; see `etude plan --help`.")
        lines = top.get("expect") or []
        if not isinstance(lines, list):
            raise InputError("expect is a list of comparisons", where=self.where("expect"), remedy="Write each on a line of its own behind a dash.")
        expectations = tuple(expect.Expectation.parse(line, self.where("expect", index)) for index, line in enumerate(lines))
        return Study(name, given, steps, measures, str(top.get("question") or ""), self.seeds(top.get("seeds", 1)), expectations, text, self.origin)

    # Small things.

    def mapping(self, data: Any, path: tuple[Any, ...], known: set[str], required: Sequence[str] = ()) -> dict[str, Any]:
        if not isinstance(data, dict):
            raise InputError(f"expected a mapping with {', '.join(sorted(known))}, got {type(data).__name__}", where=self.where(*path))
        for key in data:
            if key not in known:
                raise InputError(f"there is no key {key!r} here", where=self.where(*path, key), remedy=nearest(str(key), known))
        for key in required:
            if key not in data:
                raise InputError(f"the key {key!r} is missing", where=self.where(*path), remedy=f"Add `{key}:`.")
        return data

    def table(self, top: dict[str, Any], key: str, path: tuple[Any, ...] = ()) -> dict[str, Any]:
        value = top.get(key) or {}
        if not isinstance(value, dict):
            raise InputError(f"{key} is a mapping of names, got {type(value).__name__}", where=self.where(*path, key))
        return value

    def name(self, value: Any, path: tuple[Any, ...]) -> str:
        if not isinstance(value, str) or not NAME.match(value):
            raise InputError(f"{value!r} is no name", where=self.where(*path), remedy="A name has letters, digits, - and _, begins with a letter or digit, and has at most 64 of them.")
        return value

    def seeds(self, value: Any) -> tuple[int, ...]:
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1000:
            return tuple(range(value))
        if isinstance(value, list) and value and all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value) and len(set(value)) == len(value):
            return tuple(value)
        raise InputError(f"seeds is a number of seeds from 1 to 1000, or a list of distinct ones, got {value!r}", where=self.where("seeds"))

    def references(self, value: Any, path: tuple[Any, ...]) -> tuple[Reference, ...]:
        items = value if isinstance(value, list) else [value]
        if not items:
            raise InputError("nothing is named here", where=self.where(*path))
        return tuple(Reference.parse(item, self.where(*path, index) if isinstance(value, list) else self.where(*path)) for index, item in enumerate(items))

    # The parts.

    def source(self, value: Any, path: tuple[Any, ...]) -> Source:
        if not isinstance(value, dict):
            raise InputError("what is given is written as {model: …}, {corpus: …} or {generator: …}", where=self.where(*path))
        kinds = [kind for kind in SOURCES if kind in value]
        if len(kinds) != 1:
            stranger = next((key for key in value if key not in SOURCES), "")
            raise InputError(
                f"exactly one of {', '.join(SOURCES)} says what is given, got {', '.join(value) or 'none'}", where=self.where(*path), remedy=nearest(stranger, SOURCES) if not kinds else "Keep one."
            )
        kind = kinds[0]
        options = {key: option for key, option in value.items() if key != kind}
        if not isinstance(value[kind], str) or not value[kind]:
            raise InputError(f"{kind} is a name, a folder or a file, got {value[kind]!r}", where=self.where(*path, kind))
        if value[kind].startswith(WORLD):
            common = {"model": set(), "corpus": {"take", "columns"}, "generator": set()}[kind]
            world = self.located(lambda: find("worlds", value[kind].removeprefix(WORLD)), *path, kind)
            face = interface(world)
            if face.output.__name__.lower() != kind:
                raise InputError(f"{value[kind]} is a {face.output.__name__.lower()}, not a {kind}", where=self.where(*path, kind))
            self.fields(world, {key: option for key, option in options.items() if key not in common}, path, also=common)
        else:
            known = {"model": {"dtype"}, "corpus": {"take", "columns"}, "generator": set()}[kind]
            self.mapping(options, path, known)
        if "take" in options and (not isinstance(options["take"], int) or options["take"] < 1):
            raise InputError(f"take is a number of records, at least 1, got {options['take']!r}", where=self.where(*path, "take"))
        return Source(kind, value[kind], options, self.where(*path, kind))

    def step(self, value: Any, path: tuple[Any, ...]) -> Step:
        step = self.mapping(value, path, {"inputs", "use", "try", "budget", "tune"})
        if ("use" in step) == ("try" in step):
            raise InputError("a step has either `use`, one method, or `try`, several", where=self.where(*path))
        if "use" in step:
            variants = {"": self.method("methods", step["use"], (*path, "use"))}
        else:
            variants = self.variants(step["try"], (*path, "try"))
        budget = None
        if step.get("budget") is not None:
            budget = self.located(lambda: Budget.parse(str(step["budget"])), *path, "budget")
        inputs = {key: self.references(item, (*path, "inputs", key)) for key, item in self.mapping(step.get("inputs") or {}, (*path, "inputs"), set(step.get("inputs") or {})).items()}
        for label, method in variants.items():
            self.fits(method, inputs, budget, path, label)
        tune = self.tune(step["tune"], variants, (*path, "tune")) if step.get("tune") is not None else None
        return Step(inputs, variants, budget, tune, self.where(*path))

    def tune(self, value: Any, variants: Mapping[str, Method], path: tuple[Any, ...]) -> Tune:
        """A search.  Every variant must have its parameters, and take their ends."""
        tune = self.mapping(value, path, {"trials", "over", "by"}, required=("trials", "over", "by"))
        trials, over, by = tune["trials"], self.table(tune, "over", path), self.table(tune, "by", path)
        if not isinstance(trials, int) or isinstance(trials, bool) or not 1 <= trials <= MOST_TRIALS:
            raise InputError(f"trials is a number from 1 to {MOST_TRIALS}, got {trials!r}", where=self.where(*path, "trials"))
        if not over:
            raise InputError("there is nothing to search over", where=self.where(*path, "over"), remedy="As in `over: {learning_rate: [1e-5, 1e-2]}`.")
        ranges: dict[str, Range] = {}
        for label, method in variants.items():
            parameters = {parameter.name: parameter for parameter in interface(type(method)).parameters}
            for name, values in over.items():
                spot = (*path, "over", name)
                if name not in parameters:
                    who = f"{interface(type(method)).name}{f' ({label})' if label else ''}"
                    raise InputError(f"{who} has no parameter {name!r} to search over", where=self.where(*spot), remedy=nearest(str(name), parameters))
                ranges[name] = self.located(functools.partial(Range.parse, values, parameters[name]), *spot)
                for end in ranges[name].ends:
                    self.fields(type(method), {**{key: getattr(method, key) for key in parameters}, name: end}, (*path, "over"))
        if len(by) != 1 or not isinstance(body := next(iter(by.values())), dict) or {"of", "inputs"} & body.keys() or "on" not in body:
            raise InputError("by is one measure on a corpus", where=self.where(*path, "by"), remedy="As in `by: {perplexity: {on: validation}}`.")
        (name,) = by
        measure = self.measure(name, {**{key: one for key, one in body.items() if key != "part"}, "of": "tuned"}, (*path, "by", name))
        return Tune(trials, ranges, measure, name, body.get("part"))

    def variants(self, value: Any, path: tuple[Any, ...]) -> dict[str, Method]:
        if not isinstance(value, dict) or not value:
            raise InputError("try is a mapping of labels to methods, and not empty", where=self.where(*path))
        found: dict[str, Method] = {}
        for label, use in value.items():
            if label in ("grid", "zip"):
                found.update(self.fan(use, (*path, label), product=label == "grid"))
            else:
                found[self.name(label, (*path, label))] = self.method("methods", use, (*path, label))
        return found

    def fan(self, use: Any, path: tuple[Any, ...], product: bool) -> dict[str, Method]:
        """One variant for each combination (grid) or for each place (zip) of the parameters that are lists."""
        name, fields = self.named(use, path)
        cls = self.located(lambda: find("methods", name), *path, name)
        lists = {key: item for key, item in fields.items() if isinstance(item, list)}
        if not lists:
            raise InputError(f"{path[-1]} needs a parameter with a list of values", where=self.where(*path), remedy=f"As in `{path[-1]}: {{{name}: {{sparsity: [0.3, 0.5]}}}}`.")
        if not product and len({len(item) for item in lists.values()}) > 1:
            raise InputError("the lists of a zip are of one length", where=self.where(*path), remedy="For every combination, write grid.")
        found = {}
        for combination in itertools.product(*lists.values()) if product else zip(*lists.values(), strict=True):
            chosen = dict(zip(lists, combination, strict=True))
            label = ",".join(f"{key}={item}" for key, item in chosen.items())
            found[label] = self.fields(cls, {**fields, **chosen}, (*path, name))
        return found

    def named(self, use: Any, path: tuple[Any, ...]) -> tuple[str, dict[str, Any]]:
        if isinstance(use, str):
            return use, {}
        if isinstance(use, dict) and len(use) == 1:
            ((name, fields),) = use.items()
            if isinstance(name, str) and (fields is None or isinstance(fields, dict)):
                return name, dict(fields or {})
        raise InputError("a method is written as its name, or as {name: {parameter: value}}", where=self.where(*path), remedy="As in `{compress.sleb: {blocks: 0.33}}`.")

    def method(self, room: str, use: Any, path: tuple[Any, ...]) -> Method:
        name, fields = self.named(use, path)
        spot = (*path, name) if isinstance(use, dict) else path
        return self.fields(self.located(lambda: find(room, name), *spot), fields, spot)

    def fields(self, cls: type[Method], given: dict[str, Any], path: tuple[Any, ...], also: set[str] = frozenset()) -> Method:  # type: ignore[assignment]
        """The method with these parameters.  Types are checked by pydantic, ranges by the method itself."""
        import pydantic

        face = interface(cls)
        known = {parameter.name: parameter for parameter in face.parameters}
        checked = {}
        for key, value in given.items():
            if key not in known:
                raise InputError(f"{face.name} has no parameter {key!r}", where=self.where(*path, key), remedy=nearest(str(key), [*known, *also]))
            try:
                checked[key] = pydantic.TypeAdapter(known[key].annotation).validate_python(value, strict=not isinstance(value, (list, tuple)))
            except pydantic.ValidationError as error:
                problem = error.errors()[0]["msg"]
                raise InputError(f"{face.name}: {key} is a {known[key].type}, got {value!r} ({problem})", where=self.where(*path, key)) from error
        return self.located(lambda: cls(**checked), *path)

    def fits(self, method: Method, inputs: Mapping[str, tuple[Reference, ...]], budget: Budget | None, path: tuple[Any, ...], label: str) -> None:
        """Refuse missing and surplus inputs."""
        face = interface(type(method))
        spot = (*path, "try", label) if label else (*path, "use")
        slots = {slot.name: slot for slot in face.inputs}
        for name, references in inputs.items():
            if name not in slots:
                raise InputError(f"{face.name} takes no input {name!r}", where=self.where(*path, "inputs", name), remedy=nearest(name, slots))
            if len(references) > 1 and not slots[name].many:
                raise InputError(f"{face.name} takes one {name}, got {len(references)}", where=self.where(*path, "inputs", name))
        for name, slot in slots.items():
            if slot.required and name not in inputs:
                raise InputError(f"{face.name} needs the input {name!r}, a {slot.kind.__name__.lower()}", where=self.where(*spot), remedy=f"Add `{name}:` to the step's inputs.")
        if face.budgeted and budget is None:
            raise InputError(f"{face.name} needs a budget", where=self.where(*path), remedy="Add `budget: 200k tokens` (or steps, seconds, FLOPs) to the step.")

    def measure(self, key: str, value: Any, path: tuple[Any, ...]) -> Measure:
        if not isinstance(value, dict):
            raise InputError("a measure is written as {of: […], on: …}", where=self.where(*path))
        name = value.get("use", key)
        if not isinstance(name, str):
            raise InputError(f"`use:` is a measure's name, got {name!r}", where=self.where(*path, "use"), remedy="Its settings stand beside it: {use: NAME, of: […], setting: value}.")
        cls = self.located(lambda: find("measures", name), *(path if name == key else (*path, "use")))
        own = {"of", "on", "use", "inputs"}
        method = self.fields(cls, {k: v for k, v in value.items() if k not in own}, path, also=own)
        if "of" not in value:
            raise InputError("a measure says of what", where=self.where(*path), remedy="Add `of: [base, …]`.")
        face, beside = interface(cls), self.beside(cls, value.get("inputs") or {}, (*path, "inputs"))
        left = [slot for slot in face.inputs[1:] if slot.name not in beside]
        if ("on" in value) != bool(left):
            what = f"{face.name} needs `on:`, a {left[0].kind.__name__.lower()}" if left else f"{face.name} takes no `on:`"
            raise InputError(what, where=self.where(*path))
        for slot in left[1:]:
            if slot.required:
                raise InputError(f"{face.name} needs the input {slot.name!r}, a {slot.kind.__name__.lower()}", where=self.where(*path), remedy=f"Add `inputs: {{{slot.name}: …}}` to the measure.")
        on = self.references(value["on"], (*path, "on")) if "on" in value else ()
        return Measure(method, self.references(value["of"], (*path, "of")), on, self.where(*path), beside)

    def beside(self, cls: type[Method], value: Any, path: tuple[Any, ...]) -> dict[str, tuple[Reference, ...]]:
        """What a measure takes beside that which it measures, by slot."""
        slots = {slot.name: slot for slot in interface(cls).inputs[1:]}
        found = {name: self.references(item, (*path, name)) for name, item in self.mapping(value, path, set(slots)).items()}
        for name, references in found.items():
            if len(references) > 1 and not slots[name].many:
                raise InputError(f"{interface(cls).name} takes one {name}, got {len(references)}", where=self.where(*path, name))
        return found

    def located(self, make: Any, *path: Any) -> Any:
        """Call, and give any complaint the place that is being read."""
        try:
            return make()
        except InputError as error:
            raise error.at(self.where(*path)) from error
        except ValueError as error:
            raise InputError(str(error), where=self.where(*path)) from error
