"""The report: one self-contained HTML file, the same bytes for the same results."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from etude.study.compare import holm
from etude.study.report import plots
from etude.study.report.plots import Point, Scale, finite, plain

ALPHA = 0.05
VERDICTS = {"holds": "✓", "contradicted": "✕", "undecided": "?"}
SIZES, SPEEDS = ("size", "flops_per_token", "bytes"), ("throughput", "prefill")


def render(results: dict[str, Any]) -> str:
    """The report of some results as HTML."""
    return _template().render(_Report(results).view())


@functools.cache
def _template() -> Template:
    environment = Environment(loader=PackageLoader("etude.study.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.jinja")


class _Report:
    """Results by column and value, and what the page says of them."""

    def __init__(self, results: dict[str, Any]):
        self.results = results
        self.nodes: list[dict[str, Any]] = results.get("nodes") or []
        self.resolved: dict[str, Any] = results.get("resolved") or {}
        self.named: dict[str, list[dict[str, Any]]] = {}
        for node in self.nodes:
            self.named.setdefault(node["name"], []).append(node)
        self.columns = _columns(results.get("measurements") or [])
        self.asked = {measure: self._asked(of) for measure, of in ((name, one.get("of") or []) for name, one in (self.resolved.get("measure") or {}).items())}
        self.values = self._values()
        self.compared = [(column, row) for column in self.columns for row in column["rows"].values() if row.get("difference") and finite(row["difference"].get("p")) is not None]
        adjusted = holm([row["difference"]["p"] for _, row in self.compared])
        self.adjusted = {(row["measure"], row["part"], row["of"]): p for (_, row), p in zip(self.compared, adjusted, strict=True)}

    def view(self) -> dict[str, Any]:
        """Everything that the template shows."""
        main, further = [column for column in self.columns if column["main"]], [column for column in self.columns if not column["main"]]
        steps = [step for step in self.resolved.get("steps") or {} if any(node.get("of") == step for name in self.values for node in self.named.get(name, []))]
        return {
            "results": self.results,
            "expectations": [{**one, "mark": VERDICTS.get(one["verdict"], "?")} for one in self.results.get("expectations") or []],
            "missing": list(self._missing()),
            "tables": [table for table in (self._table(main), self._table(further)) if table],
            "facts": [self._facts(column) for column in self.columns],
            "holm": {"count": len(self.compared), "survive": sum(self._survives(row) for _, row in self.compared)},
            "charts": self._charts(main[0], steps) if main else [],
            "dots": self._dots(main[0], steps) if main else None,
            "by_seed": list(self._by_seed()),
            "costs": self._costs(),
            "searches": list(self._searches()),
            "graph": plots.graph(self.resolved, {step: len({node["name"] for node in self.nodes if node.get("of") == step}) for step in self.resolved.get("steps") or {}}),
            "key": self._numbers(),
            "named": plots.broken,
        }

    def _asked(self, references: list[str]) -> list[str]:
        """Names of the values that a measure's references mean."""
        found = []
        for reference in references:
            name, _, labels = reference.rstrip("]").partition("[")
            wanted = {label.strip() for label in labels.split(",")} if labels else set()
            found += [node["name"] for node in self.nodes if node["kind"] != "measure" and node.get("of") == name and wanted <= set((node.get("axes") or {}).values())]
        return list(dict.fromkeys(found))

    def _values(self) -> list[str]:
        """Every value that is measured, or should have been, in the study's order."""
        wanted = {name for column in self.columns for name in column["rows"]} | {name for names in self.asked.values() for name in names}
        return [name for name in dict.fromkeys([*self.named, *sorted(wanted)]) if name in wanted]

    def _state(self, name: str) -> str:
        """What is wrong with a value; nothing if it is there."""
        nodes = [node for node in self.named.get(name, []) if node["kind"] == "step"]
        failed, absent = [node for node in nodes if node.get("error")], [node for node in nodes if not node.get("cost") and not node.get("error")]
        if failed:
            return "failed" if len(failed) == len(nodes) else f"failed under {len(failed)} of {len(nodes)} seeds"
        if absent:
            return "not computed" if len(absent) == len(nodes) else f"not computed under {len(absent)} of {len(nodes)} seeds"
        return ""

    def _missing(self) -> Iterator[dict[str, Any]]:
        """A row for everything that should be there and is not."""
        for name, nodes in self.named.items():
            absent = [node for node in nodes if node["kind"] != "given" and not node.get("cost")]
            errors = list(dict.fromkeys(node["error"] for node in absent if node.get("error")))
            if absent:
                seeds = [str(node["seed"]) for node in absent if node.get("seed") is not None]
                yield {"name": name, "seeds": ", ".join(seeds), "errors": errors}

    def _table(self, columns: list[dict[str, Any]]) -> dict[str, Any] | None:
        if not columns:
            return None
        measures = {column["measure"] for column in columns}
        values = [name for name in self.values if any(name in column["rows"] or name in self.asked.get(column["measure"], []) for column in columns)]
        marks = self.results.get("marks") or {}
        rows = [{"name": name, "state": self._state(name), "marks": marks.get(name, []), "cells": [self._cell(column, name) for column in columns]} for name in values]
        return {"columns": columns, "rows": rows, "measures": len(measures), "main": columns[0]["main"]}

    def _cell(self, column: dict[str, Any], name: str) -> dict[str, Any]:
        row = column["rows"].get(name)
        if row is None:
            return {"empty": "missing" if name in self.asked.get(column["measure"], []) else "not asked"}
        estimate, difference = row["estimate"], row.get("difference")
        cell = {
            "best": finite(estimate["value"]) == column["best"] is not None,
            "reference": name == column["reference"],
            **_written(estimate, row["unit"], row["exact"]),
            "difference": None,
            "note": "",
        }
        if difference:
            mark = judged(difference, row["better"], row["exact"])
            return {**cell, "difference": {**_written(difference, row["unit"], row["exact"], sign=True), "mark": mark, "kind": mark.split()[0], "survives": self._survives(row)}}
        return cell if cell["reference"] else {**cell, "note": "measured on other items, not compared"}

    def _survives(self, row: dict[str, Any]) -> bool:
        p = self.adjusted.get((row["measure"], row["part"], row["of"]))
        return p is not None and p < ALPHA and judged(row["difference"], row["better"], row["exact"]) in ("better", "worse")

    def _facts(self, column: dict[str, Any]) -> dict[str, Any]:
        """What stands behind a column: reference, items, seeds, and what it could have seen."""
        rows = list(column["rows"].values())
        compared = [row for row in rows if row.get("difference")]
        visible = [value for row in compared if (value := finite(row["difference"].get("visible"))) is not None]
        scale = Scale.of(visible, column["unit"], digits=3)
        counts = sorted({len(values) for row in rows for values in row["items"]["values"]})
        low, high = (scale.write(min(visible)), scale.write(max(visible))) if visible else ("", "")
        return {
            **column,
            "items": "counted" if column["exact"] else " or ".join(f"{count:,}" for count in counts),
            "seeds": max(len(row["by_seed"]) for row in rows) if any(row["seeds_matter"] for row in rows) else 0,
            "visible": low if low == high else f"{low} to {high}",
            "compared": len(compared),
            "told": sum(judged(row["difference"], row["better"], row["exact"]) in ("better", "worse") for row in compared),
            "tested": sum(one is column for one, _ in self.compared),
            "survive": [row["of"] for one, row in self.compared if one is column and self._survives(row)],
        }

    def _numbers(self) -> dict[str, str]:
        """A number for every value, where their labels are too long or too many to stand beside points; else nothing."""
        labels = [", ".join((self.named.get(name) or [{}])[0].get("axes", {}).values()) for name in self.values]
        return {name: str(place) for place, name in enumerate(self.values, 1)} if len(labels) > 12 or any(len(label) > 16 for label in labels) else {}

    def _point(self, column: dict[str, Any], name: str, x: float = 0.0) -> Point | None:
        row, node = column["rows"].get(name), (self.named.get(name) or [{}])[0]
        y = finite(row["estimate"]["value"]) if row else None
        if row is None or y is None:
            return None
        seeds = tuple(value for one in row["by_seed"] if row["seeds_matter"] and (value := finite(one["value"])) is not None)
        step = "given" if node.get("kind") == "given" else node.get("of") or name
        return Point(name, self._numbers().get(name) or ", ".join((node.get("axes") or {}).values()) or name, step, x, y, finite(row["estimate"]["low"]), finite(row["estimate"]["high"]), seeds)

    def _charts(self, column: dict[str, Any], steps: list[str]) -> list[dict[str, Any]]:
        """The first measure against size, against speed, and against what was spent on the way, with the values that no other beats on both."""
        parts = {one["part"]: one for one in self.columns if one["measure"] != column["measure"]}
        known = {part: ({name: row["estimate"]["value"] for name, row in one["rows"].items()}, one["label"], one["better"]) for part, one in parts.items()}
        chosen = []
        for group in ([known[part] for part in SIZES if part in known], [known[part] for part in SPEEDS if part in known], [(self._spent(), "seconds on the way", "lower")]):
            for xs, title, better in group:
                points = [point for name in self.values if (x := finite(xs.get(name))) is not None and (point := self._point(column, name, x))]
                if len(points) > 1 and len({point.x for point in points}) > 1:
                    best = frontier(points, better or "lower", column["better"]) if column["better"] else []
                    chosen.append({"svg": Markup(plots.scatter(points, title, column["label"], steps, best)), "title": f"{column['title']} against {title}"})
                    break
        return chosen

    def _dots(self, column: dict[str, Any], steps: list[str]) -> Markup | None:
        points = [point for name in self.values if (point := self._point(column, name))]
        return Markup(plots.dots(points, column["label"], steps, column["reference"])) if points else None

    def _spent(self) -> dict[str, float]:
        """Seconds of everything on the way to each value, a mean over seeds."""
        by_digest = {node["digest"]: node for node in self.nodes}

        def way(digest: str, seen: set[str]) -> float:
            node = by_digest.get(digest)
            if node is None or digest in seen:
                return 0.0
            seen.add(digest)
            return float((node.get("cost") or {}).get("seconds") or 0.0) + sum(way(key, seen) for keys in (node.get("inputs") or {}).values() for key in keys)

        return {name: sum(way(node["digest"], set()) for node in nodes) / len(nodes) for name, nodes in self.named.items() if nodes[0]["kind"] != "measure"}

    def _by_seed(self) -> Iterator[dict[str, Any]]:
        for column in self.columns:
            for name in self.values:
                row = column["rows"].get(name)
                if row and row["seeds_matter"]:
                    scale = Scale.of([finite(one["value"]) for one in row["by_seed"]], row["unit"], row["exact"])
                    yield {"title": column["title"], "of": name, "values": {one["seed"]: scale.write(finite(one["value"])) for one in row["by_seed"]}}

    def _searches(self) -> Iterator[dict[str, Any]]:
        """A row for every search: what was chosen, by what, and how the trials went."""
        for node in self.nodes:
            trials = node.get("trials")
            if not trials:
                continue
            tune = node["tune"]
            ((measure, body),) = tune["by"].items()
            values = [value for trial in trials if (value := finite(trial["value"])) is not None]
            scale = Scale.of(values, "")
            best = next(float(trial["value"]) for trial in trials if trial["parameters"] == node["chosen"] and not trial["error"])
            yield {
                "name": node["name"], "seed": node.get("seed"), "by": f"{body.get('part', measure)} on {', '.join(body['on'])}",
                "chosen": ", ".join(f"{name} = {value:.3g}" if isinstance(value, float) else f"{name} = {value}" for name, value in node["chosen"].items()),
                "best": scale.write(best), "worst": scale.write(max(values, key=lambda value: abs(value - best))),
                "trials": len(trials), "failed": len(trials) - len(values),
            }  # fmt: skip

    def _costs(self) -> dict[str, Any]:
        """A row for every variant of a step and for every measure, summed over seeds; what two share is counted once in the total."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for node in self.nodes:
            if node["kind"] != "given" and node.get("cost"):
                groups.setdefault(node["name"] if node["kind"] == "step" else f"measuring {node['of']}", []).append(node)
        every = {node["digest"]: node for nodes in groups.values() for node in nodes}
        return {"rows": [_cost(name, nodes) for name, nodes in groups.items()], "total": _cost("all", list(every.values())) if groups else None}


def frontier(points: Sequence[Point], better_x: str, better_y: str) -> list[Point]:
    """The points that no other beats on one axis without losing on the other, from left to right."""
    signs = [1 if better == "lower" else -1 for better in (better_x, better_y)]
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (signs[0] * point.x, signs[1] * point.y)):
        if not found or signs[1] * point.y < signs[1] * found[-1].y:
            found.append(point)
    return sorted(found, key=lambda point: point.x)


def _columns(measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every measure and part, the first part of each measure marked as its main one."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in measurements:
        measure, part = row["measure"], row["part"]
        main = not any(key[0] == measure for key in found) or ((measure, part) in found and found[measure, part]["main"])
        title = measure if main else part
        words = title.replace("_", " ")
        column = {"measure": measure, "part": part, "main": main, "title": words, "unit": row["unit"], "better": row["better"], "exact": row["exact"], "rows": {}}
        unit = row["unit"] if row["unit"] not in ("", words) else ""
        found.setdefault((measure, part), {**column, "shown": unit, "label": f"{words} ({unit})" if unit else words, "note": measure if not main else part if part != measure else ""})["rows"][
            row["of"]
        ] = row
    for column in found.values():
        known = [value for row in column["rows"].values() if (value := finite(row["estimate"]["value"])) is not None]
        column["best"] = (min if column["better"] == "lower" else max)(known) if len(known) > 1 else None
        column["reference"] = next((row["difference"]["from"] for row in column["rows"].values() if row.get("difference")), next(iter(column["rows"])))
    return list(found.values())


def judged(difference: dict[str, Any], better: str, exact: bool) -> str:
    """``better``, ``worse``, ``the same``, ``not distinguishable``, or why that cannot be said."""
    value, low, high = (finite(difference.get(key)) for key in ("value", "low", "high"))
    if value is None:
        return "unknown"
    if low is None or high is None:
        if not exact:
            return "unknown: no interval"
        low = high = value
    if low == high == 0:
        return "the same"
    if low <= 0 <= high:
        return "not distinguishable"
    return "better" if (value < 0) == (better == "lower") else "worse"


def _written(estimate: dict[str, Any], unit: str, exact: bool, sign: bool = False) -> dict[str, str]:
    """An estimate and its interval on one scale."""
    value, low, high = (finite(estimate.get(key)) for key in ("value", "low", "high"))
    scale = Scale.of([value, low, high], unit, exact)
    return {"value": scale.write(value, sign), "interval": scale.interval(low, high)}


def _cost(name: str, nodes: list[dict[str, Any]]) -> dict[str, Any]:
    costs = [node["cost"] for node in nodes]
    total = {key: sum(finite(cost.get(key)) or 0.0 for cost in costs) for key in ("seconds", "processor_seconds", "tokens", "flops")}
    return {
        "name": name,
        "runs": len(nodes),
        "seconds": plots.duration(total["seconds"]),
        "processor": plots.duration(total["processor_seconds"]),
        "tokens": plain(total["tokens"]),
        "flops": plain(total["flops"]),
        "peak": plain(max(finite(cost.get("peak_bytes")) or 0.0 for cost in costs), "bytes"),
    }
