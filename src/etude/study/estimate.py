"""What a plan may cost, before it runs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from etude.study.foretell import Foreteller
from etude.study.plan import Node, Plan
from etude.study.store import Store
from etude.values.model import Model

RECORD, ROOFLINE = "record", "estimate"


def estimate(plan: Plan, store: Store) -> list[dict[str, Any]]:
    """A row a node: its state, seconds and peak memory, where these come from, the tokens of its budget, the bytes of its models' weights.

    Seconds are the median of the records of the same method in this store, those with the same parameters and budget first (``source``: record); where there
    are none, those of the roofline for training and for the measures that it knows (``source``: estimate; see `etude.study.foretell`); else None.
    A step that is searched costs as much as all of its trials; what judges them is not counted.
    Cost: reading the records; the first estimate on a machine measures it, a few seconds, and keeps what it found in the store.
    """
    past: dict[tuple[str, str | None], list[tuple[float, int]]] = defaultdict(list)
    for key in store.digests():
        record = store.record(key)
        if "trials" in record:  # a whole search; its trials have records of their own
            continue
        spent = record["cost"]["seconds"], record["cost"].get("peak_bytes", 0)
        past[record["method"], record["budget"]].append(spent)
        past[record["method"], None].append(spent)
    foreteller = Foreteller(store)
    return [_row(node, store, past, foreteller) for node in plan.nodes]


def _row(node: Node, store: Store, past: dict[tuple[str, str | None], list[tuple[float, int]]], foreteller: Foreteller) -> dict[str, Any]:
    recipe: dict[str, Any] = node.recipe() if node.method else {"method": "", "budget": None}
    state = "given" if node.kind == "given" else "in the store" if store.has(node.key) else "to compute"
    seconds, peak, source = None, None, None
    known = past.get((recipe["method"], recipe["budget"])) or past.get((recipe["method"], None))
    if state == "in the store":
        cost = store.record(node.key)["cost"]
        seconds, peak, source = cost["seconds"], cost.get("peak_bytes"), RECORD
    elif state == "to compute" and known:
        seconds, peak, source = statistics.median(one for one, _ in known), statistics.median(one for _, one in known), RECORD
    elif state == "to compute" and (foretold := foreteller.of(node)):
        seconds, peak, source = *foretold, ROOFLINE
    trials = node.search.tune.trials if node.search else 1
    if seconds is not None and state == "to compute":
        seconds *= trials
    tokens = trials * node.budget.amount if node.budget and node.budget.unit == "tokens" else None
    return {
        "name": node.name,
        "kind": node.kind,
        "method": recipe["method"] or None,
        "seed": node.seed,
        "state": state,
        "seconds": seconds,
        "peak_bytes": peak,
        "source": source,
        "trials": trials,
        "tokens": tokens,
        "bytes": _bytes(node),
        "digest": node.key,
    }


def _bytes(node: Node) -> int:
    """Bytes of the weights that the largest given model on the way has, as they lie on the disk."""
    if isinstance(node.value, Model) and node.value._folder is not None:
        return sum(path.stat().st_size for path in node.value._folder.glob("*.safetensors"))
    return max((_bytes(parent) for parents in node.inputs.values() for parent in parents), default=0)
