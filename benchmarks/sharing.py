"""What a study saves by computing once what its variants and seeds share, against a study for every variant and seed alone.

    etude run examples/smaller-by-a-third.yaml && python benchmarks/sharing.py out/smaller-by-a-third/results.json

Prints and writes benchmarks/results/sharing.json.  Nothing is run: the seconds are those that each step of the study took.  Alone, a variant under a seed needs its own steps and
measures, and those of what was given; in the study every step counts once.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any


def seconds(node: dict[str, Any]) -> float:
    return float((node.get("cost") or {}).get("seconds") or 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    data = json.loads(parser.parse_args().results.read_text())
    given = [node["name"] for node in data["nodes"] if node["kind"] == "given"]
    variants = sorted({label for node in data["nodes"] if node["kind"] == "step" for label in (node.get("axes") or {}).values()})
    together = sum({node["digest"]: seconds(node) for node in data["nodes"]}.values())
    alone = 0.0
    for variant in variants:
        needed = {node["digest"]: node for node in data["nodes"] if variant in re.split(r"[\[\], ]+", node["name"]) or node["name"].rpartition(" of ")[2] in given}
        alike = Counter(node["name"] for node in needed.values())  # one a seed where seeds matter, else one for all of them
        alone += sum(seconds(node) * len(data["seeds"]) / alike[node["name"]] for node in needed.values())
    found = {"study": data["study"], "variants": len(variants), "seeds": len(data["seeds"]), "seconds together": together, "seconds alone": alone, "together / alone": together / alone}
    print(json.dumps(found, indent=1))
    path = Path(__file__).parent / "results" / "sharing.json"
    path.write_text(json.dumps({"found": found, "environment": data["environment"]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
