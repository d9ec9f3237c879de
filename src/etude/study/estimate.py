"""What a plan may cost, before it runs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from etude.study.plan import Node, Plan
from etude.study.store import Store
from etude.values.model import Model


def estimate(plan: Plan, store: Store) -> list[dict[str, Any]]:
    """A row a node: its state, the seconds that its like took before, the tokens of its budget, the bytes of its models' weights.

    Seconds are the median of the records of the same method in this store, those with the same parameters and budget first; None if there are none.
    """
    past: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    for key in store.digests():
        record = store.record(key)
        past[record["method"], record["budget"]].append(record["cost"]["seconds"])
        past[record["method"], None].append(record["cost"]["seconds"])
    return [_row(node, store, past) for node in plan.nodes]


def _row(node: Node, store: Store, past: dict[tuple[str, str | None], list[float]]) -> dict[str, Any]:
    recipe: dict[str, Any] = node.recipe() if node.method else {"method": "", "budget": None}
    state = "given" if node.kind == "given" else "in the store" if store.has(node.key) else "to compute"
    seconds = store.record(node.key)["cost"]["seconds"] if state == "in the store" else None
    known = past.get((recipe["method"], recipe["budget"])) or past.get((recipe["method"], None))
    if state == "to compute" and known:
        seconds = statistics.median(known)
    tokens = node.budget.amount if node.budget and node.budget.unit == "tokens" else None
    return {
        "name": node.name,
        "kind": node.kind,
        "method": recipe["method"] or None,
        "seed": node.seed,
        "state": state,
        "seconds": seconds,
        "tokens": tokens,
        "bytes": _bytes(node),
        "digest": node.key,
    }


def _bytes(node: Node) -> int:
    """Bytes of the weights that the largest given model on the way has, as they lie on the disk."""
    if isinstance(node.value, Model) and node.value._folder is not None:
        return sum(path.stat().st_size for path in node.value._folder.glob("*.safetensors"))
    return max((_bytes(parent) for parents in node.inputs.values() for parent in parents), default=0)
