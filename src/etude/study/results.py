"""What a run found, as data: `results.json`.

The schema (`etude-results/2`) is described field by field in docs/results.md.  Everything but clocks (`cost`, `finished`, measures of speed) is the same
however often a run was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etude.method import interface
from etude.study import compare
from etude.study.environment import environment
from etude.study.expect import Term
from etude.study.marks import marks
from etude.study.plan import Node, Plan
from etude.study.recipe import Measure, Reference, Study
from etude.study.run import Run
from etude.study.store import write_atomically, writing
from etude.values.digest import digest
from etude.values.errors import InputError
from etude.values.measurement import Measurement

SCHEMA = "etude-results/2"


def results(run: Run) -> dict[str, Any]:
    """Everything that a run found, as plain data."""
    plan = run.plan
    found = _Measured(run)
    rows = list(_measurements(plan, found))
    outcomes = list(_judged(plan, found))
    nodes = [_node(run, node) for node in plan.nodes]
    return {
        "schema": SCHEMA,
        "study": plan.study.name,
        "question": plan.study.question,
        "digest": digest(sorted(node.key for node in plan.nodes)),
        "seeds": list(plan.study.seeds),
        "resolved": resolved(plan.study),
        "differs_from_defaults": departures(plan.study),
        "recipe": plan.study.text,
        "nodes": nodes,
        "marks": marks(nodes),
        "measurements": rows,
        "expectations": outcomes,
        "verdict": verdict(plan.study, rows, outcomes),
        "environment": environment(),
        "complete": all(run.store.has(node.key) for node in plan.nodes if node.kind != "given"),
    }


class _Measured:
    """Measurements by measure, value and part: one a seed, loaded once."""

    def __init__(self, run: Run):
        self.run = run
        self.loaded: dict[str, list[Measurement]] = {}

    def of(self, measure: str, value: str, seed: int) -> list[Measurement]:
        """What one measure gave for one value under one seed; nothing if it is not there."""
        node = self.run.plan.measured[measure, value, seed]
        if node.key not in self.loaded:
            self.loaded[node.key] = self.run.measurements(node) or []
        place, count = self.run.plan.places[measure, value, seed], len(node.inputs[next(iter(node.inputs))])
        several = self.loaded[node.key]
        each = len(several) // count
        return several[place * each : (place + 1) * each]

    def by_seed(self, measure: str, value: str, part: str | None) -> list[Measurement]:
        """One measurement a seed, the very same object where seeds do not matter; nothing unless all are there."""
        found = []
        for seed in self.run.plan.study.seeds:
            several = self.of(measure, value, seed)
            chosen = next((one for one in several if one.name == part), None) if part else next(iter(several), None)
            if chosen is None:
                return []
            found.append(chosen)
        return found


def _judged(plan: Plan, found: _Measured) -> Iterator[dict[str, Any]]:
    """What became of every expectation, with both sides and where each term was measured."""
    for expectation in plan.study.expectations:
        measured: dict[Term, Sequence[Measurement]] = {}
        terms = []
        for term in expectation.terms:
            node, _ = plan.term(term, expectation.where)[0]
            name = next(value for (measure, value, seed), known in plan.measured.items() if known is node and measure == term.measure and _names(plan, term, value))
            rows = found.by_seed(term.measure, name, term.part)
            if not rows and found.of(term.measure, name, plan.study.seeds[0]):
                parts = ", ".join(one.name for one in found.of(term.measure, name, plan.study.seeds[0]))
                raise InputError(f"{term.measure} gives no {term.part!r}", where=expectation.where, remedy=f"It gives {parts}.")
            measured[term] = rows
            terms.append({"term": str(term), "measure": term.measure, "part": rows[0].name if rows else term.part, "of": name})
        if all(measured.values()):
            sides = expectation.sides({term: compare.mean(rows).value for term, rows in measured.items()})
            yield {**compare.judge(expectation, measured).as_data(), "left": sides[0], "right": sides[1], "terms": terms}
        else:
            missing = next(str(term) for term, rows in measured.items() if not rows)
            nothing = compare.Outcome(expectation.text, compare.UNDECIDED, compare.Estimate(float("nan")), f"{missing} was not measured")
            yield {**nothing.as_data(), "left": None, "right": None, "terms": terms}


def _names(plan: Plan, term: Term, value: str) -> bool:
    """Whether a term speaks of this value."""
    return any(node.name == value for node in plan.variants(Reference(term.value, term.labels), plan.study.seeds[0]))


def _measurements(plan: Plan, found: _Measured) -> Iterator[dict[str, Any]]:
    """A row for every measure, part and value, with the paired difference from the first value that the measure names."""
    first: dict[tuple[str, str], tuple[str, list[Measurement]]] = {}
    for measure, value in dict.fromkeys((measure, value) for measure, value, _ in plan.measured):
        for part in [one.name for one in found.of(measure, value, plan.study.seeds[0])]:
            rows = found.by_seed(measure, value, part)
            if not rows:
                continue
            reference, compared = first.setdefault((measure, part), (value, rows))
            difference = None if reference == value else compare.difference(rows, compared)
            one = rows[0]
            varies = any(row is not one for row in rows)
            shown = rows if varies else rows[:1]
            yield {
                "measure": measure, "part": part, "of": value, "unit": one.unit, "better": one.better, "scale": one.scale, "exact": one.exact,
                "estimate": compare.mean(rows).as_data(),
                "difference": {"from": reference, **difference.as_data()} if difference else None,
                "seeds_matter": varies,
                "by_seed": [{"seed": seed, "value": row.value} for seed, row in zip(plan.study.seeds, rows, strict=True)] if varies else [{"seed": None, "value": one.value}],
                "items": {
                    "names": _shared([list(row.item_names) for row in shown]),
                    "weights": _shared([None if row.weights is None else row.weights.tolist() for row in shown]),
                    "values": [row.items.tolist() for row in shown],
                },
            }  # fmt: skip


def _shared(by_seed: list[Any]) -> list[Any]:
    """Only the first if all seeds have the same."""
    return by_seed[:1] if all(one == by_seed[0] for one in by_seed) else by_seed


def _node(run: Run, node: Node) -> dict[str, Any]:
    row: dict[str, Any] = {"name": node.name, "kind": node.kind, "of": node.owner, "output": node.output.__name__.lower(), "digest": node.key, "axes": dict(node.axes)}
    if node.method is None:
        return row
    recipe = node.recipe()
    row |= {"method": recipe["method"], "parameters": recipe["parameters"], "inputs": recipe["inputs"], "seed": node.seed, "budget": recipe["budget"], "code": recipe["code"]}
    if run.store.has(node.key):
        record = run.store.record(node.key)
        row |= {"cost": record["cost"], "finished": record["finished"], **{key: record[key] for key in ("dtype", "tune", "trials", "chosen") if record.get(key) is not None}}
    elif node.key in run.errors:
        row["error"] = run.errors[node.key].splitlines()[-1]
    return row


def resolved(study: Study) -> dict[str, Any]:
    """The study with every parameter written out."""

    def method(one: Any) -> dict[str, Any]:
        face = interface(type(one))
        return {face.name: {parameter.name: getattr(one, parameter.name) for parameter in face.parameters}}

    return {
        "study": study.name,
        "given": {name: {source.kind: source.reference, **source.options} for name, source in study.given.items()},
        "steps": {
            name: {
                "inputs": {slot: [str(reference) for reference in references] for slot, references in step.inputs.items()},
                **({"use": method(step.variants[""])} if "" in step.variants else {"try": {label: method(one) for label, one in step.variants.items()}}),
                **({"budget": str(step.budget)} if step.budget else {}),
                **({"tune": step.tune.as_data()} if step.tune else {}),
            }
            for name, step in study.steps.items()
        },
        "measure": {name: {"use": method(one.method), "of": [str(item) for item in one.of], "on": [str(item) for item in one.on], **_beside(one)} for name, one in study.measures.items()},
        "seeds": list(study.seeds),
        "expect": [expectation.text for expectation in study.expectations],
    }


def _beside(measure: Measure) -> dict[str, Any]:
    """What a measure takes beside `of` and `on`, if anything."""
    return {"inputs": {slot: [str(item) for item in items] for slot, items in measure.inputs.items()}} if measure.inputs else {}


def departures(study: Study) -> list[str]:
    """Every parameter that is not at its default, a line each."""
    searched = {(name, parameter) for name, step in study.steps.items() if step.tune for parameter in step.tune.over}
    lines = [f"{name}: {parameter} searched over {values.as_data()}" for name, step in study.steps.items() if step.tune for parameter, values in step.tune.over.items()]
    methods = [(f"{name}[{label}]" if label else name, one) for name, step in study.steps.items() for label, one in step.variants.items()]
    for name, one in [*methods, *((name, measure.method) for name, measure in study.measures.items())]:
        for parameter in interface(type(one)).parameters:
            value = getattr(one, parameter.name)
            if value != parameter.default and (name.partition("[")[0], parameter.name) not in searched:
                lines.append(f"{name}: {parameter.name} = {value} (default {parameter.default})")
    return lines


def verdict(study: Study, rows: list[dict[str, Any]], outcomes: list[dict[str, Any]]) -> str:
    """What came out, in a sentence."""
    if outcomes:
        counts = {kind: sum(outcome["verdict"] == kind for outcome in outcomes) for kind in (compare.HOLDS, compare.CONTRADICTED, compare.UNDECIDED)}
        if len(outcomes) == 1:
            return f"{outcomes[0]['text']}: {outcomes[0]['sentence']}."
        return f"Of {len(outcomes)} expectations " + ", ".join(f"{count} {'hold' if kind == 'holds' and count != 1 else kind}" for kind, count in counts.items() if count) + "."
    if not rows:
        return "Nothing was measured."
    same = [row for row in rows if (row["measure"], row["part"]) == (rows[0]["measure"], rows[0]["part"])]
    best = (min if rows[0]["better"] == "lower" else max)(same, key=lambda row: row["estimate"]["value"])
    return f"The {'lowest' if best['better'] == 'lower' else 'highest'} {best['part'].replace('_', ' ')} is {best['estimate']['value']:.4g}, that of {best['of']}."


def write(run: Run, folder: Path) -> dict[str, Any]:
    """Write results.json, report.html, the resolved study and links to the resulting checkpoints into a folder; returns the results."""
    found = results(run)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1, allow_nan=False) + "\n"
        if not _unchanged(folder, text):
            from etude.study.report import render

            write_atomically(folder / "report.html", render(found))
            write_atomically(folder / "results.json", text)
        _link(run, folder / "models")
    return found


def _unchanged(folder: Path, text: str) -> bool:
    """Whether these very results lie in the folder already, with their report."""
    path = folder / "results.json"
    return (folder / "report.html").exists() and path.exists() and path.read_text(encoding="utf8") == text


def _link(run: Run, folder: Path) -> None:
    """A link for every model that the study made, to its folder in the store: ordinary Hugging Face checkpoints."""
    for node in run.plan.nodes:
        if node.kind == "step" and node.output.__name__ == "Model" and run.store.has(node.key):
            folder.mkdir(exist_ok=True)
            name = node.label.replace("[", "-").replace("]", "").replace(", ", "-").replace(" ", "-").replace("=", "-").replace(",", "-").replace("/", "-")
            link = folder / name
            if link.is_symlink() or not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(run.store.path(node.key), target_is_directory=True)
