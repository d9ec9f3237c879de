"""What a study adds to the bare calls: the same steps through the runner, and called by hand, in turn.

    python benchmarks/overhead.py [--rounds 5]

Prints and writes benchmarks/results/overhead.json.  A step through the runner also saves its value, reads it back to compare logits, hashes its
files and flushes them; all that counts as overhead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from etude.engine.budget import Budget
from etude.methods.compress.drop_blocks import DropBlocks
from etude.methods.pretrain.causal_lm import CausalLM
from etude.study.environment import environment
from etude.study.plan import build
from etude.study.recipe import Study
from etude.study.run import run
from etude.study.store import Store
from etude.worlds.stdlib import Stdlib
from etude.worlds.testbed import Testbed


def study(steps: int) -> Study:
    return Study.of(
        study="overhead",
        given={"base": {"model": "etude:testbed"}, "text": {"corpus": "etude:stdlib", "take": 40}},
        steps={
            "pruned": {"inputs": {"model": "base"}, "use": DropBlocks(blocks=0.33, choose="last")},
            "trained": {"inputs": {"model": "pruned", "corpus": "text"}, "use": CausalLM(), "budget": f"{steps} steps"},
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=22, help="optimizer steps of the long step, about a minute of them")
    arguments = parser.parse_args()
    plan = build(study(arguments.steps))
    model, text = Testbed()(), Stdlib()()[:40]
    model.network  # noqa: B018  (loaded before the clock starts, as the runner's given values are hashed before)
    rows = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            seconds: dict[str, float] = {}
            run(plan, Store.open(folder), listen=lambda event, into=seconds: into.update({event.node.owner: event.seconds}))
        start = time.perf_counter()
        pruned = DropBlocks(blocks=0.33, choose="last")(model, seed=0)
        middle = time.perf_counter()
        CausalLM()(pruned, text, Budget(arguments.steps, "steps"), seed=0)
        end = time.perf_counter()
        rows.append({"short": {"study": seconds["pruned"], "bare": middle - start}, "long": {"study": seconds["trained"], "bare": end - middle}})
        print(rows[-1], flush=True)
    found = {
        "short step, seconds added": spread([row["short"]["study"] - row["short"]["bare"] for row in rows]),
        "long step, seconds": spread([row["long"]["bare"] for row in rows]),
        "long step, share added": spread([row["long"]["study"] / row["long"]["bare"] - 1 for row in rows]),
    }
    print(json.dumps(found, indent=1))
    target = Path(__file__).parent / "results" / "overhead.json"
    target.write_text(json.dumps({"found": found, "rounds": rows, "environment": environment()}, indent=1) + "\n")


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


if __name__ == "__main__":
    main()
