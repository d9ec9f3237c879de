"""What sets a variant apart from those that it is compared with, besides its method: what it spent, what it read, its precision.

Measures ask all values the same questions with the same prompts, so a prompt cannot differ within a column.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from etude.engine.budget import Budget

TOLERANCE = 0.1
"""Share by which what was spent may depart from the variants' median: a budget ends with a whole step, and rows differ in length."""
SPENT = ("tokens", "flops", "seconds")
"""Units of budgets that the record of costs counts; steps are the same for all."""


def marks(nodes: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Notes by value, for variants of one step that were not treated alike; `nodes` are those of results.json.

    What most variants have is the rule, and the first of those that are as frequent.
    """
    found: dict[str, list[str]] = {}
    steps: dict[str, dict[str, list[dict[str, Any]]]] = {}
    kinds = {node["digest"]: node for node in nodes}
    for node in nodes:
        if node["kind"] == "step":
            steps.setdefault(node["of"], {}).setdefault(node["name"], []).append(node)
    for variants in steps.values():
        if len(variants) > 1:
            for name, note in (*_spent(variants), *_data(variants, kinds), *_precision(variants)):
                found.setdefault(name, []).append(note)
    return found


Variants = dict[str, list[dict[str, Any]]]
"""Nodes by name, one a seed."""


def _spent(variants: Variants) -> Iterator[tuple[str, str]]:
    """Who spent more or less of the common budget, in its own unit."""
    budget = next((nodes[0]["budget"] for nodes in variants.values() if nodes[0].get("budget")), None)
    unit = Budget.parse(budget).unit if budget else ""
    known = {name: [node["cost"][unit] for node in nodes if node.get("cost")] for name, nodes in variants.items()} if unit in SPENT else {}
    spent = {name: statistics.mean(values) for name, values in known.items() if values}
    common = statistics.median_low(spent.values()) if spent else 0
    for name, value in spent.items():
        if abs(value - common) > TOLERANCE * common:
            yield name, f"spent {_number(value)} {unit}, others {_number(common)}"


def _data(variants: Variants, nodes: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Who read other corpora."""
    read = {
        name: tuple(sorted((slot, nodes[key]["name"]) for slot, keys in several[0].get("inputs", {}).items() for key in keys if key in nodes and nodes[key]["output"] == "corpus"))
        for name, several in variants.items()
    }
    for name, own in _exceptions(read):
        yield name, f"read {', '.join(f'{corpus} as {slot}' for slot, corpus in own) or 'no text'}"


def _precision(variants: Variants) -> Iterator[tuple[str, str]]:
    for name, dtype in _exceptions({name: nodes[0].get("dtype") for name, nodes in variants.items() if nodes[0].get("dtype")}):
        yield name, f"in {dtype}"


def _exceptions(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names whose value is not the most frequent one."""
    rule = statistics.mode(values.values()) if values else None
    return ((name, value) for name, value in values.items() if value != rule)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value < 1e7 else f"{value:.2e}"
