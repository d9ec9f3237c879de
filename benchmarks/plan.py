"""What `etude plan` estimates for steps that never ran, against what they then take: seconds, and peak memory of a process of their own.

    python benchmarks/plan.py [--rounds 3]

Prints and writes benchmarks/results/plan.json; a ratio is estimated divided by measured, in one round.  Every round estimates in a new store, so that
the machine is measured anew, and then runs each step in a process of its own that has loaded its model already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etude.study.environment import environment
from etude.study.estimate import estimate
from etude.study.plan import Plan, build
from etude.study.recipe import Study
from etude.study.run import run
from etude.study.store import Store
from etude.values.model import Model

UNITS = {"seconds": ("seconds", "s", 1.0), "peak_bytes": ("peak memory", "MB", 1e6)}
STEPS = ("perplexity", "short_perplexity", "train_100k", "throughput", "memory")


def study() -> Study:
    return Study.of(
        study="plan",
        given={
            "base": {"model": "etude:testbed"},
            "text": {"corpus": "etude:stdlib", "split": "train", "take": 200},
            "heldout": {"corpus": "etude:stdlib", "split": "heldout", "take": 40},
        },
        steps={"train_100k": {"inputs": {"model": "base", "corpus": "text"}, "use": "pretrain.causal_lm", "budget": "100k tokens"}},
        measure={
            "perplexity": {"of": ["base"], "on": "heldout"},
            "short_perplexity": {"use": "perplexity", "of": ["base"], "on": "heldout", "tokens": 128},
            "throughput": {"of": ["base"], "rounds": 30},
            "memory": {"of": ["base"], "length": 1024, "batch": 16},
        },
    )


def one(plan: Plan, name: str) -> dict[str, Any]:
    """What the plan expects, or what a step cost in this process, its model loaded before."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(folder)
        if name == "estimate":
            return {row["name"].split(" of ")[0]: row for row in estimate(plan, store) if row["source"]}
        for node in plan.nodes:
            if isinstance(node.value, Model):
                node.value.network  # noqa: B018
        run(plan, store, only=[name])
        (key,) = [node.key for node in plan.nodes if node.owner == name]
        return store.record(key)["cost"]


def apart(name: str) -> dict[str, Any]:
    """The same in a process of its own; this one stays small, since a process begins with its parent's peak."""
    done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=[*STEPS, "estimate"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return print(json.dumps(one(build(study()), arguments.one)))
    rounds: list[dict[str, Any]] = []
    for turn in range(arguments.rounds):
        expected = apart("estimate")
        for name in STEPS:
            real = apart(name)
            rounds.append({"round": turn, "step": name, "expected": {what: expected[name][what] for what in UNITS}, "measured": {what: real[what] for what in UNITS}})
            print(rounds[-1], flush=True)
    found: dict[str, Any] = {}
    for name in STEPS:
        for what, (title, unit, scale) in UNITS.items():
            several = [(row["expected"][what] / scale, row["measured"][what] / scale) for row in rounds if row["step"] == name]
            guesses, reals = zip(*several, strict=True)
            found[f"{name}, {title}"] = {f"estimated, {unit}": spread(guesses), f"measured, {unit}": spread(reals), "estimated / measured": spread([guess / real for guess, real in several])}
    for what, (title, _, _) in UNITS.items():
        near = sum(0.5 <= row["expected"][what] / row["measured"][what] <= 2 for row in rounds)
        found[f"{title}, within a factor of two"] = f"{near} of {len(rounds)}"
    print(json.dumps(found, indent=1))
    target = Path(__file__).parent / "results" / "plan.json"
    target.write_text(json.dumps({"found": found, "rounds": rounds, "environment": environment()}, indent=1) + "\n")


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


if __name__ == "__main__":
    main()
