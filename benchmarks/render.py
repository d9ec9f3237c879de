"""Write docs/benchmarks.md from benchmarks/results/*.json, so that no figure there is typed by hand.

python benchmarks/render.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def rows(data: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every number in nested results, by its path; a spread as one cell."""
    found = []
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and {"median", "lowest", "highest"} <= value.keys():
            found.append((name, f"{value['median']:.4g} [{value['lowest']:.4g}, {value['highest']:.4g}]"))
        elif isinstance(value, dict):
            found += rows(value, f"{name}: ")
        elif isinstance(value, (int, float)):
            found.append((name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"))
        elif isinstance(value, str):
            found.append((name, f"`{value}`"))
    return found


def main() -> None:
    parts = ["# Benchmarks\n\nWritten by `python benchmarks/render.py` from `benchmarks/results/`; medians with [lowest, highest].\n"]
    for path in sorted((HERE / "results").glob("*.json")):
        data = json.loads(path.read_text())
        environment = ", ".join(f"{name} {value}" for name, value in data.pop("environment").items())
        what = ((HERE / f"{path.stem}.py").read_text().split('"""')[1]).split("\n")[0]
        data.pop("rounds", None)
        table = "\n".join(f"| {name} | {value} |" for name, value in rows(data.get("found", data)))
        parts.append(f"## {path.stem}\n\n{what}\n\n`python benchmarks/{path.stem}.py`\n\n| | |\n|---|---|\n{table}\n\n{environment}\n")
    (HERE.parent / "docs" / "benchmarks.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
