"""The report of a study.  What it shows is checked against results that are made by hand here, through `compare`."""

from __future__ import annotations

import copy
import html
import re
from typing import Any

import numpy as np
import pytest

from etude.study import compare
from etude.study.report import judged, render
from etude.study.report.plots import Scale, Span, duration, plain
from etude.values.measurement import HIGHER, Measurement

SEEDS = (0, 1, 2)
VARIANTS = ("sleb", "random", "last")
NAMES = ("base", *(f"pruned[{label}]" for label in VARIANTS), *(f"healed[{label}]" for label in VARIANTS))
LEVELS = dict(zip(NAMES, (2.6, 3.3, 4.1, 3.7, 2.9, 3.4, 3.15), strict=True))
RECIPE = "study: depth-pruning\nseeds: 3   # <b>three</b> & no more\n"


def measured(name: str) -> dict[str, list[list[Measurement]]]:
    """What each measure gives of a value: parts, each once a seed."""
    rng = np.random.default_rng(NAMES.index(name))
    hard = np.random.default_rng(99).normal(0, 0.4, 40)
    weights = np.random.default_rng(98).integers(50, 500, 40).astype(float)
    seeds = 1 if name in ("base", "pruned[sleb]", "pruned[last]") else len(SEEDS)
    items = [LEVELS[name] + hard + rng.normal(0, 0.03) + rng.normal(0, 0.05, 40) for _ in range(seeds)]
    documents = tuple(f"d{index}" for index in range(40))
    found = {
        "perplexity": [
            [Measurement("perplexity", one, weights=weights, scale="exp", item_names=documents) for one in items],
            [Measurement("bits_per_byte", one / 2, unit="bits/byte", weights=weights, item_names=documents) for one in items],
        ]
    }
    if not name.startswith("healed"):
        shrunk = 1.0 if name == "base" else 0.71
        speed = [Measurement("throughput", 200 / shrunk + rng.normal(0, 4, 7), unit="tokens/s", better=HIGHER) for _ in SEEDS]
        found["throughput"] = [speed, [Measurement("prefill", 20 * one.items, unit="tokens/s", better=HIGHER) for one in speed]]
        found["size"] = [[Measurement("size", np.array([round(3_146_496 * shrunk)]), unit="parameters", exact=True)], [Measurement("bytes", np.array([12_585_984 * shrunk]), unit="bytes", exact=True)]]
    return {measure: [rows if len(rows) > 1 else rows * len(SEEDS) for rows in parts] for measure, parts in found.items()}


def rows_of(names: tuple[str, ...] = NAMES) -> list[dict[str, Any]]:
    """Rows of results.json, as `etude.study.results` makes them."""
    values, rows = {name: measured(name) for name in names}, []
    for measure in ("perplexity", "throughput", "size"):
        for name in names:
            for part, by_seed in enumerate(values[name].get(measure, [])):
                one, varies = by_seed[0], by_seed[0] is not by_seed[-1]
                difference = None if name == "base" else compare.difference(by_seed, values["base"][measure][part])
                shown = by_seed if varies else by_seed[:1]
                rows.append({
                    "measure": measure, "part": one.name, "of": name, "unit": one.unit, "better": one.better, "scale": one.scale, "exact": one.exact,
                    "estimate": compare.mean(by_seed).as_data(), "difference": {"from": "base", **difference.as_data()} if difference else None, "seeds_matter": varies,
                    "by_seed": [{"seed": seed if varies else None, "value": row.value} for seed, row in enumerate(shown)],
                    "items": {"names": list(one.item_names), "weights": None, "values": [row.items.tolist() for row in shown]},
                })  # fmt: skip
    return rows


def node(name: str, kind: str, inputs: list[str], seed: int | None = None, of: str = "", **more: Any) -> dict[str, Any]:
    label = re.search(r"\[(.*)\]", name)
    axes = {"pruned": label[1]} if label and kind == "step" else {}
    row = {"name": name, "kind": kind, "of": of or name.partition("[")[0], "output": "model", "digest": f"{name}-{seed}", "axes": axes, "inputs": {"model": inputs}, "seed": seed, "code": "c0de"}
    return {**row, **({} if kind == "given" or "error" in more else {"cost": {"seconds": 62.5, "processor_seconds": 110.0, "tokens": 100_000, "flops": 1.9e12, "peak_bytes": 1.4e9}, "finished": "2025-11-21T02:00:00Z"}), **more}


def nodes() -> list[dict[str, Any]]:
    found = [node("base", "given", []), node("text", "given", []), node("heldout", "given", [])]
    for label in VARIANTS:
        for seed in SEEDS if label == "random" else (None,):
            found.append(node(f"pruned[{label}]", "step", ["base-None"], seed))
    for label in VARIANTS:
        found += [node(f"healed[{label}]", "step", [f"pruned[{label}]-{seed if label == 'random' else None}"], seed) for seed in SEEDS]
    return [*found, node("perplexity of base", "measure", ["base-None"], of="perplexity"), node("size of base", "measure", ["base-None"], of="size")]


def sample(**more: Any) -> dict[str, Any]:
    drop = {"compress.drop_blocks": {"blocks": 0.33, "choose": "random"}}
    return {
        "schema": "etude-results/1",
        "study": "depth-pruning",
        "question": "Which way of dropping a third of the blocks costs this model least?",
        "digest": "d1gest",
        "seeds": list(SEEDS),
        "resolved": {
            "given": {"base": {"model": "etude:testbed"}, "text": {"corpus": "etude:stdlib", "split": "train"}, "heldout": {"corpus": "etude:stdlib", "split": "heldout"}},
            "steps": {
                "pruned": {"inputs": {"model": ["base"], "calibration": ["text"]}, "try": {"sleb": {"compress.sleb": {"blocks": 0.33}}, "random": drop, "last": drop}},
                "healed": {"inputs": {"model": ["pruned"], "corpus": ["text"]}, "use": {"adapt.lora": {"rank": 8}}, "budget": "100k tokens"},
            },
            "measure": {
                "perplexity": {"use": {"perplexity": {}}, "of": ["base", "pruned", "healed"], "on": ["heldout"]},
                "throughput": {"use": {"throughput": {}}, "of": ["base", "pruned"], "on": []},
                "size": {"use": {"size": {}}, "of": ["base", "pruned"], "on": []},
            },
        },
        "differs_from_defaults": ["pruned[sleb]: blocks = 0.33 (default 0.2)"],
        "recipe": RECIPE,
        "nodes": nodes(),
        "measurements": rows_of(),
        "expectations": [
            {"text": "pruned[sleb].perplexity < pruned[random].perplexity", "verdict": "holds", "margin": {"value": 33.1, "low": 28.2, "high": 38.1, "p": 0.001, "visible": 6.0}, "sentence": "holds by 33.1 [28.2, 38.1]"},
            {"text": "healed[last].perplexity < base.perplexity", "verdict": "contradicted", "margin": {"value": -9.3, "low": -10.0, "high": -8.0, "p": 0.001, "visible": 2.0}, "sentence": "missed by 9.3 [8, 10]"},
            {"text": "pruned[sleb].throughput > pruned[last].throughput", "verdict": "undecided", "margin": {"value": 0.3, "low": -2.0, "high": 3.0, "p": 0.7, "visible": 4.0}, "sentence": "undecided: the margin is 0.3"},
        ],
        "verdict": "Of 3 expectations 1 holds, 1 contradicted, 1 undecided.",
        "environment": {"python": "3.11.2", "torch": "2.9.0", "cores": 2},
        "complete": True,
        **more,
    }  # fmt: skip
