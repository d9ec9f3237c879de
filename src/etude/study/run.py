"""Walk a plan: load what the store has, compute what it has not."""

from __future__ import annotations

import dataclasses
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from etude.engine.cost import metered
from etude.engine.resume import keeping
from etude.method import interface
from etude.study.environment import environment
from etude.study.plan import Node, Plan
from etude.study.search import search
from etude.study.store import Store
from etude.values.errors import EtudeError, InputError, nearest
from etude.values.measurement import Measurement, save_all
from etude.values.model import Model

COMPUTED, CACHED, FAILED, SKIPPED, LEFT = "computed", "cached", "failed", "skipped", "left out"
TRIED = "tried"
"""State of an event about a trial of a search, which is no node of the plan."""


@dataclass
class Event:
    """Something happened to a node: it starts, waits for another process, or has one of the final states."""

    node: Node
    state: str
    seconds: float = 0.0
    error: str = ""


@dataclass
class Run:
    """What became of every node."""

    plan: Plan
    store: Store
    states: dict[str, str] = field(default_factory=dict)
    """By key."""
    errors: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Node]:
        return [node for node in self.plan.nodes if self.states.get(node.key) == FAILED]

    def measurements(self, node: Node) -> list[Measurement] | None:
        """What a measure's node gave, if it is there."""
        return self.store.load(node.key) if node.kind == "measure" and self.store.has(node.key) else None


def run(plan: Plan, store: Store, only: Collection[str] = (), listen: Callable[[Event], None] = lambda event: None) -> Run:
    """Compute every node of a plan that the store has not, each once, in order.

    only: steps and measures to compute, with what they need; all by default.
    A step that fails stops its descendants; the rest goes on.  Raises InputError if an input turns out to be broken, or the store full.
    """
    result, start = Run(plan, store), time.perf_counter()
    nodes = [node for node in plan.nodes if node.kind != "given"]
    wanted = _wanted(nodes, only)
    store.remember_run(plan.study.name, [node.key for node in nodes])
    values = _Values(store, [node for node in nodes if node.key in wanted and not store.has(node.key)])
    for node in nodes:
        if node.key in result.states:
            continue
        if node.key not in wanted:
            result.states[node.key] = LEFT
        elif store.has(node.key):
            result.states[node.key] = CACHED
            listen(Event(node, CACHED))
        elif any(result.states.get(parent.key) in (FAILED, SKIPPED) for parents in node.inputs.values() for parent in parents):
            result.states[node.key] = SKIPPED
            listen(Event(node, SKIPPED))
        else:
            _compute(node, result, values, listen)
    result.seconds = time.perf_counter() - start
    return result


def _compute(node: Node, result: Run, values: _Values, listen: Callable[[Event], None]) -> None:
    store = result.store
    with store.locked(node.key, lambda: listen(Event(node, "waiting for another process"))):
        if store.has(node.key):  # another process was faster
            result.states[node.key] = CACHED
            values.used(node)
            return listen(Event(node, CACHED))
        listen(Event(node, "started"))
        start = time.perf_counter()
        try:
            if node.search:
                made, record = search(node, store, lambda trial: _try(trial, result, values, listen))
            else:
                with keeping(store.partial(node.key)):
                    made, record = execute(node, values.inputs(node))
            kind = node.output.__name__.lower()
            dtype = str(made.network.dtype).removeprefix("torch.") if isinstance(made, Model) else None
            store.put(node.key, lambda folder: save_all(_several(made), folder) if kind == "measurement" else made.save(folder), {**record, "kind": kind, "dtype": dtype})
            shutil.rmtree(store.partial(node.key), ignore_errors=True)
            result.states[node.key] = COMPUTED
        except InputError as error:
            raise error.at(node.where) from error
        except Exception as error:  # a method may fail in any way; its siblings must not
            result.states[node.key] = FAILED
            known = isinstance(error, EtudeError)
            result.errors[node.key] = str(error) if known else "".join(traceback.format_exception(error)).rstrip()
            return listen(Event(node, FAILED, time.perf_counter() - start, str(error) if known else f"{type(error).__name__}: {error}"))
        finally:
            values.used(node)
    listen(Event(node, COMPUTED, time.perf_counter() - start))


def _try(trial: Node, result: Run, values: _Values, listen: Callable[[Event], None]) -> str:
    """Compute a step or a measurement of a search's trial, unless the store has it; returns what went wrong."""
    if result.store.has(trial.key):
        return ""
    values.expect([trial])

    def told(event: Event) -> None:
        listen(Event(event.node, TRIED if event.state in (COMPUTED, CACHED, FAILED) else event.state, event.seconds, event.error))

    _compute(trial, result, values, told)
    return result.errors.get(trial.key, "")


def execute(node: Node, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Apply a node's method and say what it cost."""
    assert node.method is not None
    more: dict[str, Any] = {}
    if interface(type(node.method)).seeded:
        more["seed"] = node.seed if node.seed is not None else 0
    if node.budget is not None:
        more["budget"] = node.budget
    with metered() as cost:
        made = node.method(**inputs, **more)
    return made, {**node.recipe(), "cost": dataclasses.asdict(cost), "environment": environment(), "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def _several(made: Any) -> list[Measurement]:
    return list(made) if isinstance(made, tuple) else [made]


def _wanted(nodes: list[Node], only: Collection[str]) -> set[str]:
    """Keys of the nodes that `only` names, and of all they need."""
    if not only:
        return {node.key for node in nodes}
    chosen = [node for node in nodes if node.owner in only or node.name in only]
    missing = set(only) - {node.owner for node in chosen} - {node.name for node in chosen}
    if missing:
        name = sorted(missing)[0]
        raise InputError(f"--only {name!r}: the study has no such step or measure", remedy=nearest(name, {node.owner for node in nodes}))
    found: set[str] = set()
    while chosen:
        node = chosen.pop()
        if node.key not in found:
            found.add(node.key)
            chosen += [parent for parents in node.inputs.values() for parent in parents if parent.kind != "given"]
    return found


class _Values:
    """Inputs of nodes, loaded once and let go when the last node that needs them is done."""

    def __init__(self, store: Store, nodes: list[Node]):
        self.store = store
        self.left: Counter[str] = Counter()
        self.loaded: dict[str, Any] = {}
        self.expect(nodes)

    def expect(self, nodes: list[Node]) -> None:
        """These will be computed, too."""
        self.left.update(parent.key for node in nodes for parents in node.inputs.values() for parent in parents)

    def inputs(self, node: Node) -> dict[str, Any]:
        slots = {slot: [self._value(parent) for parent in parents] for slot, parents in node.inputs.items()}
        many = {slot.name for slot in interface(type(node.method)).inputs if slot.many}  # type: ignore[arg-type]
        return {slot: found if slot in many else found[0] for slot, found in slots.items()}

    def _value(self, node: Node) -> Any:
        if node.key not in self.loaded:
            self.loaded[node.key] = node.value if node.kind == "given" else self.store.load(node.key)
        return self.loaded[node.key]

    def used(self, node: Node) -> None:
        for parents in node.inputs.values():
            for parent in parents:
                self.left[parent.key] -= 1
                if self.left[parent.key] <= 0 and parent.kind != "given":
                    self.loaded.pop(parent.key, None)
