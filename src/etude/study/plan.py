"""A study unrolled: one node for every variant and seed, named by the digest of what makes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from etude.engine.budget import Budget
from etude.method import Method, find, interface
from etude.study.expect import Term
from etude.study.recipe import WORLD, Reference, Source, Study
from etude.study.source import code_digest
from etude.study.tune import Tune
from etude.values.corpus import Corpus
from etude.values.digest import digest
from etude.values.errors import InputError, nearest
from etude.values.generator import Generator
from etude.values.model import Model


@dataclass(frozen=True)
class Search:
    """How a node's parameters are found: `study/search.py` walks it."""

    tune: Tune
    slot: str
    """Of the measure, for what is judged."""
    on: Mapping[str, list[Node]]
    """The measure's further inputs."""


@dataclass
class Node:
    """One thing to compute, or to load."""

    name: str
    """As a reader names it: ``healed[sleb]``, ``perplexity of healed[sleb]``."""
    kind: str
    """``given``, ``step`` or ``measure``."""
    output: type
    key: str
    method: Method | None = None
    inputs: Mapping[str, list[Node]] = field(default_factory=dict)
    seed: int | None = None
    budget: Budget | None = None
    axes: Mapping[str, str] = field(default_factory=dict)
    """For every step on the way that tried several variants, which one this is."""
    where: str = ""
    value: Any = None
    """A given value; computed ones are in the store."""
    owner: str = ""
    """The step or measure that it belongs to."""
    search: Search | None = None
    """If some of the method's parameters are searched for; those of `method` are then the ones that the recipe wrote."""

    def seeds(self) -> set[int]:
        """Every seed that had a part in it."""
        own = set() if self.seed is None else {self.seed}
        return own.union(*(node.seeds() for nodes in self.inputs.values() for node in nodes))

    @property
    def label(self) -> str:
        seeds = self.seeds()
        return f"{self.name} seed {', '.join(map(str, sorted(seeds)))}" if seeds else self.name

    def recipe(self) -> dict[str, Any]:
        """What made it, as plain data, for the record."""
        assert self.method is not None
        face = interface(type(self.method))
        return {
            "name": self.label, "method": face.name, "parameters": {p.name: getattr(self.method, p.name) for p in face.parameters},
            "inputs": {slot: [node.key for node in nodes] for slot, nodes in self.inputs.items()},
            "seed": self.seed, "budget": str(self.budget) if self.budget else None, "code": code_digest(type(self.method).__module__),
            **({"tune": self.search.tune.as_data()} if self.search else {}),
        }  # fmt: skip


@dataclass
class Plan:
    """Every node of a study in an order in which they can be computed."""

    study: Study
    nodes: list[Node]
    values: dict[str, dict[int, list[Node]]]
    """Given values and steps by name: for each seed the variants."""
    measured: dict[tuple[str, str, int], Node]
    """By measure, name of the value with its variant, and seed: the node that measured it."""
    places: dict[tuple[str, str, int], int]
    """Where in that node's results this value stands, for a measure that takes several at once."""

    def variants(self, reference: Reference, seed: int) -> list[Node]:
        """The nodes that a reference names.  Raises InputError if there are none."""
        if reference.name not in self.values:
            raise InputError(f"there is no value {reference.name!r}", where=reference.where, remedy=nearest(reference.name, self.values))
        nodes = self.values[reference.name][seed]
        chosen = [node for node in nodes if set(reference.labels) <= set(node.axes.values())]
        if not chosen:
            labels = sorted({label for node in nodes for label in node.axes.values()})
            raise InputError(f"{reference.name} has no variant {', '.join(reference.labels)}", where=reference.where, remedy=nearest(reference.labels[0], labels) if labels else "It has none at all.")
        return chosen

    def term(self, term: Term, where: str) -> list[tuple[Node, int]]:
        """For each seed the node and the place in its results that an expectation's term speaks of."""
        measure = self.study.measures.get(term.measure)
        if measure is None:
            raise InputError(f"nothing measures {term.measure!r}", where=where, remedy=nearest(term.measure, self.study.measures))
        found = []
        for seed in self.study.seeds:
            variants = self.variants(Reference(term.value, term.labels, where), seed)
            if len(variants) > 1:
                raise InputError(f"{term} names {len(variants)} variants: {', '.join(node.name for node in variants)}", where=where, remedy=f"Say which, as in `{variants[0].name}.{term.measure}`.")
            key = (term.measure, variants[0].name, seed)
            if key not in self.measured:
                raise InputError(f"{term.measure} is not measured of {variants[0].name}", where=where, remedy=f"Add {term.value} to its `of:`.")
            found.append((self.measured[key], self.places[key]))
        return found


def build(study: Study) -> Plan:
    """Unroll a study.  Loads what is given, for its digest; computes nothing.  Raises InputError for what does not fit."""
    plan = Plan(study, [], {}, {}, {})
    for name, source in study.given.items():
        node = given(name, source)
        plan.nodes.append(node)
        plan.values[name] = {seed: [node] for seed in study.seeds}
    for name in ordered(study):
        plan.values[name] = {}
        for seed in study.seeds:
            plan.values[name][seed] = list(_instances(plan, name, seed))
    for name in study.measures:
        for seed in study.seeds:
            _measure(plan, name, seed)
    unique = {id(node): node for node in plan.nodes}
    plan.nodes = list(unique.values())
    for expectation in study.expectations:
        for term in expectation.terms:
            plan.term(term, expectation.where)
    return plan


def ordered(study: Study) -> list[str]:
    """Steps in an order in which each follows its inputs.  Raises InputError on a cycle or an unknown name."""
    done: list[str] = []
    path: list[str] = []

    def visit(name: str, reference: Reference | None) -> None:
        if name in study.given or name in done:
            return
        if name not in study.steps:
            where = reference.where if reference else ""
            raise InputError(f"there is no value {name!r}", where=where, remedy=nearest(name, [*study.given, *study.steps]))
        if name in path:
            circle = " → ".join([*path[path.index(name) :], name])
            raise InputError(f"the steps form a circle: {circle}", where=study.steps[name].where, remedy="One of them must take what is given instead.")
        path.append(name)
        for references in study.steps[name].inputs.values():
            for item in references:
                visit(item.name, item)
        path.pop()
        done.append(name)

    for name in study.steps:
        visit(name, None)
    return done


def given(name: str, source: Source) -> Node:
    """Load what is given, weights aside, and name it by its content."""
    try:
        value, key = _source(source)
    except InputError as error:
        raise InputError(error.message, where=source.where if not error.where else f"{source.where} ({error.where})", remedy=error.remedy) from error
    except ValueError as error:
        raise InputError(str(error), where=source.where) from error
    return Node(name, "given", type(value), digest("given", key), where=source.where, value=value, owner=name)


def _source(source: Source) -> tuple[Any, str]:
    options = dict(source.options)
    take, columns = options.pop("take", None), options.pop("columns", None)
    value: Any
    if source.reference.startswith(WORLD):
        value = find("worlds", source.reference.removeprefix(WORLD))(**options)()
    elif source.kind == "model":
        value = Model.load(source.reference, **options)
    elif source.kind == "corpus":
        value = Corpus.read(source.reference)
    else:
        value = Generator.load(source.reference)
    if columns:
        value = value.renamed(columns)
    if take:
        value = value[:take]
    return value, value.digest


def _instances(plan: Plan, name: str, seed: int) -> Iterator[Node]:
    """The nodes of a step under one seed: its variants, for every combination of its inputs' variants."""
    step = plan.study.steps[name]
    for axes, inputs in _combinations(plan, step.inputs, seed):
        for label, method in step.variants.items():
            face = interface(type(method))
            for slot in face.inputs:
                for reference, node in zip(step.inputs.get(slot.name, ()), inputs.get(slot.name, ()), strict=True):
                    if not issubclass(node.output, slot.kind):
                        raise InputError(f"{face.name} takes a {slot.kind.__name__.lower()} as {slot.name}, and {reference} is a {node.output.__name__.lower()}", where=reference.where)
            own = {**axes, name: label} if label else axes
            search = _search(plan, step.tune, face.output, seed) if step.tune else None
            yield _node(plan, f"{name}[{', '.join(own.values())}]" if own else name, name, method, inputs, seed, step.budget, own, step.where, "step", search)


def _search(plan: Plan, tune: Tune, made: type, seed: int) -> Search:
    """A search with the nodes of its corpora.  Raises InputError if it is judged on what a measure reports, or cannot be judged."""
    face = interface(type(tune.by.method))
    first, *rest = face.inputs
    if not issubclass(made, first.kind):
        raise InputError(f"{face.name} measures a {first.kind.__name__.lower()} as {first.name}, and the step makes a {made.__name__.lower()}", where=tune.by.where)
    on = [node for reference in tune.by.on for node in plan.variants(reference, seed)]
    reported = {node.key for measure in plan.study.measures.values() for reference in measure.everything for node in plan.variants(reference, seed)}
    for node in on:
        if not issubclass(node.output, rest[0].kind):
            raise InputError(f"{face.name} measures a {rest[0].kind.__name__.lower()} as {rest[0].name}, and {node.name} is a {node.output.__name__.lower()}", where=tune.by.where)
        if node.key in reported:
            raise InputError(
                f"the search is judged on {node.name}, which the study reports",
                where=tune.by.where,
                remedy="Give the search a split of its own: what was chosen on a split looks better there than it is.",
            )
    return Search(tune, first.name, {slot.name: on for slot in rest[:1]})


def _combinations(plan: Plan, inputs: Mapping[str, tuple[Reference, ...]], seed: int) -> list[tuple[dict[str, str], dict[str, list[Node]]]]:
    """Every choice of input variants that agree wherever they come from the same step."""
    found: list[tuple[dict[str, str], dict[str, list[Node]]]] = [({}, {})]
    for slot, references in inputs.items():
        for reference in references:
            found = [
                ({**axes, **node.axes}, {**chosen, slot: [*chosen.get(slot, []), node]})
                for axes, chosen in found
                for node in plan.variants(reference, seed)
                if all(axes.get(step, label) == label for step, label in node.axes.items())
            ]
    return found


def _node(
    plan: Plan, name: str, owner: str, method: Method, inputs: Mapping[str, list[Node]], seed: int, budget: Budget | None, axes: Mapping[str, str], where: str, kind: str, search: Search | None = None
) -> Node:
    """A node, or the one that another seed already made if no seed matters."""
    node = made(name, kind, method, inputs, seed, budget, axes, where, owner)
    if search:
        tune = search.tune
        judged = (
            interface(type(tune.by.method)).name,
            tune.by.method,
            code_digest(type(tune.by.method).__module__),
            tune.part,
            {slot: [one.key for one in nodes] for slot, nodes in search.on.items()},
        )
        node.key = digest("tuned", node.key, tune.trials, dict(tune.over), *judged)
        node.inputs, node.search = {**inputs, **{f"tuned on {slot}": nodes for slot, nodes in search.on.items()}}, search
    for known in plan.nodes:
        if known.key == node.key and known.name == name:
            return known
    plan.nodes.append(node)
    return node


def made(
    name: str, kind: str, method: Method, inputs: Mapping[str, list[Node]], seed: int | None, budget: Budget | None, axes: Mapping[str, str] = MappingProxyType({}), where: str = "", owner: str = ""
) -> Node:
    """A node for a method on some inputs; it keeps the seed and the budget only if it takes them."""
    face = interface(type(method))
    own_seed = seed if face.seeded and method.draws_random() else None
    own_budget = budget if face.budgeted else None
    key = digest("made", face.name, method, code_digest(type(method).__module__), {slot: [node.key for node in nodes] for slot, nodes in inputs.items()}, own_seed, own_budget)
    return Node(name, kind, face.output, key, method, inputs, own_seed, own_budget, axes, where, owner=owner)


def _measure(plan: Plan, name: str, seed: int) -> None:
    measure = plan.study.measures[name]
    face = interface(type(measure.method))
    targets = list({node.name: node for reference in measure.of for node in plan.variants(reference, seed)}.values())
    first, *rest = face.inputs
    beside = {slot: [node for reference in references for node in plan.variants(reference, seed)] for slot, references in measure.inputs.items()}
    on = [slot.name for slot in rest if slot.name not in beside][:1]
    beside |= {slot: [node for reference in measure.on for node in plan.variants(reference, seed)] for slot in on}
    for slot, nodes in ((first, targets), *((slot, beside.get(slot.name, [])) for slot in rest)):
        if slot.name in measure.inputs and len(nodes) > 1 and not slot.many:
            raise InputError(f"{face.name} takes one {slot.name}, and {measure.inputs[slot.name][0]} has {len(nodes)} variants", where=measure.where, remedy=f"Say which, as in `{nodes[0].name}`.")
        for node in nodes:
            if not issubclass(node.output, slot.kind):
                raise InputError(f"{face.name} measures a {slot.kind.__name__.lower()} as {slot.name}, and {node.name} is a {node.output.__name__.lower()}", where=measure.where)
    groups = [targets] if first.many else [[target] for target in targets]
    for group in groups:
        label = f"{name} of {group[0].name}" if len(group) == 1 else f"{name} of {len(group)} values"
        node = _node(plan, label, name, measure.method, {first.name: group, **beside}, seed, None, {}, measure.where, "measure")
        for place, target in enumerate(group):
            plan.measured[name, target.name, seed] = node
            plan.places[name, target.name, seed] = place
