"""Search for a method's parameters: the same number of trials for every variant, judged on a split that is never reported, all of them charged.

Optuna proposes (Bergstra et al., 2011: tree-structured Parzen estimators, after some trials at random), the store remembers.  A trial is an ordinary step and an ordinary
measurement with digests of their own, and what is proposed depends on the seed and on earlier outcomes alone: a search that was killed walks the same way again, and finds
what it had finished in the store.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from etude.engine.cost import Cost
from etude.study.environment import environment
from etude.study.plan import Node, Search, made
from etude.study.store import Store
from etude.values.errors import EtudeError, InputError
from etude.values.measurement import HIGHER, Measurement

if TYPE_CHECKING:
    import optuna

AT_RANDOM = 10
"""Trials before the sampler models the outcomes, Optuna's default; half of them where there are fewer than twice as many."""


class NothingFoundError(EtudeError):
    """No trial of a search came to an end."""


def search(node: Node, store: Store, compute: Callable[[Node], str]) -> tuple[Any, dict[str, Any]]:
    """The best trial's value, and the record of all trials; the first trial is the variant as it was written, if the ranges hold it.

    compute: computes a node unless the store has it; returns "" or what went wrong.
    A trial that fails counts as one; the search goes on.  Raises NothingFoundError if all of them do, InputError if Optuna is missing.
    Cost: the runs and measurements of all trials.
    """
    assert node.search is not None
    tune, asked = node.search.tune, _sampler(node)
    rows: list[dict[str, Any]] = []
    sign: float | None = None
    for number in range(1, tune.trials + 1):
        trial = asked.ask()
        chosen = {name: values.suggest(trial, name) for name, values in tune.over.items()}
        step, judged = _nodes(node, node.search, chosen, f"trial {number} of {tune.trials}")
        row: dict[str, Any] = {"parameters": chosen, "digest": step.key, "value": None, "error": (compute(step) or compute(judged)).rpartition("\n")[2]}
        if not row["error"]:
            one = _part(store.load(judged.key), tune.part, tune.by.where)
            sign = -1.0 if one.better == HIGHER else 1.0
            row |= {"value": one.value, "error": "" if math.isfinite(one.value) else f"its {one.name} is {one.value}"}
        asked.tell(trial, None if row["error"] else sign * row["value"], state=_failed() if row["error"] else None)  # type: ignore[operator]
        row["cost"] = _sum([store.record(one.key)["cost"] for one in (step, judged) if store.has(one.key)])
        rows.append(row)
    ended = [row for row in rows if not row["error"]]
    if not ended:
        raise NothingFoundError(f"none of the {tune.trials} trials of {node.label} came to an end; the last: {rows[-1]['error']}")
    best = min(ended, key=lambda row: (sign or 1.0) * row["value"])
    record = {**node.recipe(), "cost": _sum([row["cost"] for row in rows]), "environment": environment(), "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    return store.load(best["digest"]), {**record, "trials": rows, "chosen": best["parameters"]}


def _sampler(node: Node) -> optuna.Study:
    try:
        import optuna
    except ImportError as error:
        raise InputError("tune needs Optuna, which is not installed", where=node.where, remedy="pip install 'etude[tune]'") from error
    assert node.search is not None
    tune = node.search.tune
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=node.seed or 0, n_startup_trials=min(AT_RANDOM, max(1, tune.trials // 2))))
    written = {name: getattr(node.method, name) for name in tune.over}
    if all(values.holds(written[name]) for name, values in tune.over.items()):
        found.enqueue_trial({name: values.asked(written[name]) for name, values in tune.over.items()})
    return found


def _failed() -> Any:
    import optuna

    return optuna.trial.TrialState.FAIL


def _nodes(node: Node, searched: Search, chosen: dict[str, Any], name: str) -> tuple[Node, Node]:
    """The step and the measurement of one trial."""
    assert node.method is not None
    try:
        method = dataclasses.replace(node.method, **chosen)
    except ValueError as error:  # each end was taken alone; together they may not fit
        raise InputError(f"{node.name} does not take {_shown(chosen)}: {error}", where=node.where, remedy="Narrow the ranges of its search.") from error
    inputs = {slot: nodes for slot, nodes in node.inputs.items() if not slot.startswith("tuned on ")}
    label = f"{node.name}, {name}: {_shown(chosen)}"
    step = made(label, "step", method, inputs, node.seed, node.budget, node.axes, node.where, node.owner)
    by = searched.tune.by
    return step, made(f"{searched.tune.name} of {label}", "measure", by.method, {searched.slot: [step], **searched.on}, node.seed, None, where=by.where)


def _shown(chosen: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value:.3g}" if isinstance(value, float) else f"{name} = {value}" for name, value in chosen.items())


def _part(several: list[Measurement], name: str | None, where: str) -> Measurement:
    found = next((one for one in several if name in (None, one.name)), None)
    if found is None:
        raise InputError(f"the measure gives no {name!r}", where=where, remedy=f"It gives {', '.join(one.name for one in several)}.")
    return found


def _sum(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """Costs added up; of memory the highest, of energy nothing where one meter was silent."""
    total = dataclasses.asdict(Cost())
    for name in total:
        values = [cost.get(name) for cost in costs]
        known = [value for value in values if value is not None]
        total[name] = None if len(known) < len(values) or (name == "joules" and not known) else (max(known, default=0) if name == "peak_bytes" else sum(known))
    return total
