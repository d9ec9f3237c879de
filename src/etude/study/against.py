"""Two results side by side: ours, or the samples that lm-eval logs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from etude.measures.harness import by_metric, of_metric
from etude.study import compare
from etude.study.results import SCHEMA
from etude.values.errors import InputError
from etude.values.measurement import Measurement

Measured = dict[str, dict[int, Measurement]]
"""Measurements by name and seed; where seeds do not matter there is one, under -1."""
ANY_SEED = -1


class Compared(NamedTuple):
    """One quantity in both."""

    name: str
    better: str
    one: compare.Estimate
    other: compare.Estimate
    difference: compare.Estimate | None
    """one - other, paired by item and seed; None if the items are not the same."""
    p: float | None
    """Two-sided, by Holm's correction for the number of comparisons."""
    verdict: str
    """``first``, ``second`` (which is better, with certainty after the correction), ``undecided``, or ``not the same items``."""

    def as_data(self) -> dict[str, Any]:
        return {
            "name": self.name, "better": self.better, "one": self.one.as_data(), "other": self.other.as_data(),
            "difference": self.difference.as_data() if self.difference else None, "p_holm": self.p, "verdict": self.verdict,
        }  # fmt: skip


def read(path: Path) -> Measured:
    """What a ``results.json`` (or the folder that holds one) measured, or lm-eval's ``samples_*.jsonl`` (or a folder of them).

    Raises InputError if it is neither.
    """
    if path.is_dir():
        inside = [path / "results.json"] if (path / "results.json").exists() else sorted(path.rglob("samples_*.jsonl"))
        if not inside:
            raise InputError(f"{path} holds neither a results.json nor lm-eval's samples_*.jsonl")
        found: Measured = {}
        for one in inside:
            found |= read(one)
        return found
    try:
        text = path.read_text(encoding="utf8")
        if path.suffix == ".jsonl":
            return _of_samples(path, [json.loads(line) for line in text.splitlines() if line.strip()])
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise InputError(f"{path} holds no results of the schema {SCHEMA}", remedy="Give the results.json that `etude run` wrote, or lm-eval's samples_*.jsonl.")
        return _of_results(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}", remedy="Give the results.json that `etude run` wrote, or lm-eval's samples_*.jsonl.") from error


def _of_results(data: Mapping[str, Any]) -> Measured:
    found: Measured = {}
    for row in data["measurements"]:
        items = row["items"]
        seeds = data["seeds"] if row["seeds_matter"] else [ANY_SEED]
        parts = zip(items["values"], _each(items["names"], seeds), _each(items["weights"], seeds), strict=True)
        several = [
            Measurement(row["part"], np.array(values, float), row["unit"], row["better"], None if weights is None else np.array(weights, float), row["scale"], row["exact"], tuple(names))
            for values, names, weights in parts
        ]
        found[f"{row['of']}.{row['measure']}" + ("" if row["part"] == row["measure"] else f".{row['part']}")] = dict(zip(seeds, several, strict=True))
    return found


def _each(shared: list[Any], seeds: Sequence[int]) -> list[Any]:
    """One a seed."""
    return shared * len(seeds) if len(shared) == 1 else shared


def _of_samples(path: Path, samples: list[dict[str, Any]]) -> Measured:
    task = path.stem.removeprefix("samples_").rpartition("_")[0] or path.stem
    found: Measured = {}
    for (metric, kind), rows in by_metric(samples).items():
        name = f"{task}.{metric}" if kind == "none" else f"{task}.{metric}.{kind}"
        measurement = of_metric(metric, metric, rows, higher=True)
        if measurement is not None:
            found[name] = {ANY_SEED: measurement}
    if not found:
        raise InputError(f"{path} has no metric with a number for each document")
    return found


def against(one: Measured, other: Measured) -> list[Compared]:
    """Every quantity that both have, or, where no name is in both, the one quantity of each kind that each has.

    Raises InputError if nothing is in both.
    """
    pairs = [(name, one[name], other[name]) for name in one if name in other] or _by_kind(one, other)
    if not pairs:
        raise InputError(f"nothing is measured in both: the first has {', '.join(one)}; the second {', '.join(other)}")
    aligned = [(name, *_same_seeds(name, first, second)) for name, first, second in pairs]
    rows = [(name, first, second, compare.difference(first, second)) for name, first, second in aligned]
    tested = [place for place, (*_, difference) in enumerate(rows) if difference is not None and difference.p is not None]
    corrected = dict(zip(tested, compare.holm([rows[place][3].p for place in tested]), strict=True))  # type: ignore[union-attr, misc]
    return [
        Compared(name, first[0].better, compare.mean(first), compare.mean(second), difference, corrected.get(place), _verdict(first[0].better, difference, corrected.get(place)))
        for place, (name, first, second, difference) in enumerate(rows)
    ]


def _by_kind(one: Measured, other: Measured) -> list[tuple[str, dict[int, Measurement], dict[int, Measurement]]]:
    """Pairs of the only measurement of a kind on either side: of values that are called differently."""

    def alone(found: Measured) -> dict[str, str]:
        kinds = [name.partition(".")[2] for name in found]
        return {kind: name for kind, name in zip(kinds, found, strict=True) if kinds.count(kind) == 1}

    first, second = alone(one), alone(other)
    return [(f"{first[kind]} / {second[kind]}", one[first[kind]], other[second[kind]]) for kind in first if kind in second]


def _same_seeds(name: str, one: dict[int, Measurement], other: dict[int, Measurement]) -> tuple[list[Measurement], list[Measurement]]:
    """As many measurements of each, seed by seed; one that no seed matters to stands beside every seed of the other."""
    seeds = [seed for seed in (one if ANY_SEED in other else other) if ANY_SEED in one or ANY_SEED in other or (seed in one and seed in other)]
    if not seeds:
        raise InputError(f"{name} was measured under the seeds {sorted(one)} here and {sorted(other)} there, and none is in both")
    return [one.get(seed, one.get(ANY_SEED)) for seed in seeds], [other.get(seed, other.get(ANY_SEED)) for seed in seeds]  # type: ignore[misc]


def _verdict(better: str, difference: compare.Estimate | None, p: float | None) -> str:
    if difference is None:
        return "not the same items"
    certain = p < 1 - compare.LEVEL if p is not None else difference.value != 0
    if not certain:
        return "undecided"
    return "first" if (difference.value > 0) == (better == "higher") else "second"
