"""The report of a study.  What it shows is checked against results that are made by hand here, through `compare`."""

from __future__ import annotations

import copy
import functools
import html
import re
from typing import Any

import numpy as np
import pytest

from etude.study import compare
from etude.study.report import frontier, judged, render
from etude.study.report.plots import Point, Scale, Span, duration, graph, plain
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
    return [copy.deepcopy(row) for row in every_row() if row["of"] in names]


@functools.cache
def every_row() -> list[dict[str, Any]]:
    values, rows = {name: measured(name) for name in NAMES}, []
    for measure in ("perplexity", "throughput", "size"):
        for name in NAMES:
            for part, by_seed in enumerate(values[name].get(measure, [])):
                one, varies = by_seed[0], by_seed[0] is not by_seed[-1]
                difference = None if name == "base" else compare.difference(by_seed, values["base"][measure][part])
                shown = by_seed if varies else by_seed[:1]
                rows.append({
                    "measure": measure, "part": one.name, "of": name, "unit": one.unit, "better": one.better, "scale": one.scale, "exact": one.exact,
                    "estimate": compare.mean(by_seed).as_data(), "difference": {"from": "base", **difference.as_data()} if difference else None, "seeds_matter": varies,
                    "by_seed": [{"seed": seed if varies else None, "value": row.value} for seed, row in enumerate(shown)],
                    "items": {"names": [list(one.item_names)], "weights": [None], "values": [row.items.tolist() for row in shown]},
                })  # fmt: skip
    return rows


def node(name: str, kind: str, inputs: list[str], seed: int | None = None, of: str = "", **more: Any) -> dict[str, Any]:
    label = re.search(r"\[(.*)\]", name)
    axes = {"pruned": label[1]} if label and kind == "step" else {}
    row = {"name": name, "kind": kind, "of": of or name.partition("[")[0], "output": "model", "digest": f"{name}-{seed}", "axes": axes, "inputs": {"model": inputs}, "seed": seed, "code": "c0de"}
    return {
        **row,
        **(
            {}
            if kind == "given" or "error" in more
            else {"cost": {"seconds": 62.5, "processor_seconds": 110.0, "tokens": 100_000, "flops": 1.9e12, "peak_bytes": 1.4e9}, "finished": "2025-11-21T02:00:00Z"}
        ),
        **more,
    }


def nodes() -> list[dict[str, Any]]:
    found = [node("base", "given", []), node("text", "given", []), node("heldout", "given", [])]
    for label in VARIANTS:
        for seed in SEEDS if label == "random" else (None,):
            found.append(node(f"pruned[{label}]", "step", ["base-None"], seed))
    for label in VARIANTS:
        found += [node(f"healed[{label}]", "step", [f"pruned[{label}]-{seed if label == 'random' else None}"], seed) for seed in SEEDS]
    return [*found, node("perplexity of base", "measure", ["base-None"], of="perplexity"), node("size of base", "measure", ["base-None"], of="size")]


def expectation(text: str, verdict: str, margin: float, sentence: str) -> dict[str, Any]:
    return {"text": text, "verdict": verdict, "margin": {"value": margin, "low": margin - 5, "high": margin + 5, "p": 0.01, "visible": 6.0}, "sentence": sentence}


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
            expectation("pruned[sleb].perplexity < pruned[random].perplexity", "holds", 33.1, "holds by 33.1 [28.2, 38.1]"),
            expectation("healed[last].perplexity < base.perplexity", "contradicted", -9.3, "missed by 9.3 [8, 10]"),
            expectation("pruned[sleb].throughput > pruned[last].throughput", "undecided", 0.3, "undecided: the margin is 0.3"),
        ],
        "verdict": "Of 3 expectations 1 holds, 1 contradicted, 1 undecided.",
        "environment": {"python": "3.11.2", "torch": "2.9.0", "cores": 2},
        "complete": True,
        **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def page() -> str:
    return render(sample())


def text_of(page: str) -> str:
    """What a reader sees."""
    shown = re.sub(r"<style>.*?</style>|<wbr>", "", page, flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", shown)))


def without(results: dict[str, Any], *gone: str) -> dict[str, Any]:
    return {**results, "measurements": [row for row in results["measurements"] if row["of"] not in gone]}


def test_every_value_estimate_and_expectation_appears(page):
    text = text_of(page)
    for row in sample()["measurements"]:
        scale = Scale.of([row["estimate"]["value"], row["estimate"]["low"], row["estimate"]["high"]], row["unit"], row["exact"])
        assert f" {row['of']} " in text
        assert scale.write(row["estimate"]["value"]) in text, row["part"]
        assert scale.interval(row["estimate"]["low"], row["estimate"]["high"]) in text
        assert scale.decimals or scale.factor == 1
        if row["difference"] and row["difference"]["low"] is not None:
            scale = Scale.of([row["difference"][key] for key in ("value", "low", "high")], row["unit"], row["exact"])
            assert scale.write(row["difference"]["value"], sign=True) in text
    for one in sample()["expectations"]:
        assert one["text"] in text
        assert one["sentence"] in text
        assert f'class="badge {one["verdict"]}"' in page
    for line in (sample()["verdict"], sample()["question"], "d1gest", "pruned[sleb]: blocks = 0.33 (default 0.2)", "torch 2.9.0", "seed 2"):
        assert line in text


def test_parts_and_steps_are_drawn_and_summed(page):
    text = text_of(page)
    assert page.count('<svg class="plot"') == 4  # against size, against speed, against seconds, the dots
    assert text.count("healed[random]") >= 6
    assert "pruned[random] 3 3 min 8 s 5 min 30 s 300,000 5.7 T 1.4 GB" in text  # three seeds of 62.5 s
    assert "all 16 16 min 40 s" in text
    assert "compress.drop_blocks" in page
    assert "budget 100k tokens" in page


def test_seconds_on_the_way_add_up():
    """A healed value took its own 62.5 s and those of the pruned one before it; base took none."""
    from etude.study.report import _Report

    spent = _Report(sample())._spent()
    assert spent["base"] == 0
    assert spent["pruned[random]"] == 62.5
    assert spent["healed[last]"] == 125


def test_same_results_same_bytes(page):
    assert render(copy.deepcopy(sample())) == page


def test_all_text_is_data():
    """One word, put wherever a recipe, a method or an error has a say."""
    evil = "<script>alert(1)</script>\"><img src=x onerror=alert(1)>'{{ 7 * 7 }} </pre></style><b>]]><svg onload=alert(1)> & &lt;"
    results = sample()
    name = f"pruned[{evil}]"
    results.update(study=evil, question=evil, recipe=evil, verdict=evil, digest=evil, differs_from_defaults=[evil], environment={evil: evil}, complete=False)
    for one in results["expectations"]:
        one.update(text=evil, sentence=evil)
    for row in results["measurements"]:
        row.update(unit=evil)
        if row["of"] == "pruned[sleb]":
            row["of"] = name
        if row["measure"] == "perplexity":
            row["measure"] = evil
    for one in results["nodes"]:
        if one["name"] == "pruned[sleb]":
            one.update(name=name, axes={"pruned": evil}, digest=evil)
    results["nodes"].append(node(f"bad {evil}", "step", [], of="healed", error=evil))
    resolved = results["resolved"]
    resolved["given"][evil] = {"corpus": evil, "split": evil}
    resolved["steps"][evil] = {"inputs": {"model": ["base"]}, "try": {evil: {evil: {}}}, "budget": evil}
    resolved["measure"][evil] = {"use": {evil: {}}, "of": ["base"], "on": [evil]}
    page = render(results)
    assert page.count(html.escape(evil).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")) > 40
    tags = set(re.findall(r"<([A-Za-z][\w-]*)", page))
    assert not tags & {"script", "img", "b"}
    assert not re.findall(r"<[^>]*\son\w+\s*=", re.sub(r'"[^"]*"', '""', page))
    assert "{{ 7 * 7 }}" in page
    assert "'49 " not in html.unescape(page)
    assert page.count("</style>") == 1


def test_nothing_is_fetched(page):
    assert not re.search(r"<(script|link|iframe|img|object|embed|base)\b", page)
    assert not re.search(r"\b(src|href|action|data)\s*=", page)
    assert not re.search(r"@import|url\((?!#head\))", page)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    assert "http:" not in page
    assert "https:" not in page


def test_a_failed_step_and_what_hung_on_it_are_named():
    results = without(sample(complete=False), "pruned[last]", "healed[last]")
    for one in results["nodes"]:
        if one["name"] == "pruned[last]":
            del one["cost"]
            one["error"] = "RuntimeError: the loss is NaN at step 12"
        elif one["name"] == "healed[last]":
            del one["cost"]
    results["nodes"].append(node("perplexity of healed[sleb]", "measure", [], of="perplexity", error="MemoryError: 3 GB"))
    text = text_of(render(results))
    assert "This study is incomplete." in text
    assert "pruned[last] failed: RuntimeError: the loss is NaN at step 12" in text
    assert "healed[last] under seed 0, 1, 2 was not computed" in text
    assert "perplexity of healed[sleb] failed: MemoryError: 3 GB" in text
    assert "pruned[last] failed missing" in text  # its row in the table stays
    assert "healed[last] not computed missing" in text


@pytest.mark.parametrize(
    "more",
    [
        {"measurements": [], "expectations": [], "nodes": [], "resolved": {}, "complete": False, "verdict": "Nothing was measured."},
        {"measurements": [], "expectations": [], "question": "", "recipe": "", "differs_from_defaults": [], "environment": {}},
    ],
)
def test_a_study_without_measures_or_expectations(more):
    text = text_of(render(sample(**more)))
    assert "Nothing was measured." in text
    assert "states no expectation" in text
    assert "Holm" not in text


def test_one_cell_has_no_interval_and_says_so():
    """One item under one seed: nothing can be said of the difference, and nothing is."""
    rows = rows_of(("base", "pruned[last]"))
    for row in rows:
        row["estimate"].update(low=None, high=None, p=None, visible=None)
        if row["difference"]:
            row["difference"].update(low=None, high=None, p=None, visible=None)
    text = text_of(render(without(sample(measurements=rows))))
    assert "unknown: no interval" in text
    assert "✓" not in text.partition("What was measured")[2]


def test_nothing_but_null_and_nan_is_drawn_around():
    rows = rows_of()
    rows[0]["estimate"] = {"value": None, "low": None, "high": None, "p": None, "visible": None}
    rows[1]["estimate"]["value"] = float("nan")
    rows[2]["difference"] = None
    text = text_of(render(sample(measurements=rows)))
    assert "nan" not in text.lower()
    assert "measured on other items, not compared" in text


def test_holm_marks_only_what_survives():
    """p of 0.01, 0.02 and 0.04 among three: adjusted 0.03, 0.04, 0.04; among these and 0.04 again 0.04, 0.06, 0.08, 0.08."""
    rows = [row for row in rows_of(NAMES[:5]) if row["part"] == "perplexity"]
    for row, p in zip(rows[1:], (0.01, 0.02, 0.04, 0.04), strict=True):
        row["difference"] = {"from": "base", "value": 2.0, "low": 1.0, "high": 3.0, "p": p, "visible": 1.5}
    page = render(sample(measurements=rows))
    assert "Of 4 differences with an interval 1 survives Holm's correction" in text_of(page)
    assert page.count(">worse ✓<") == 1
    assert page.count(">worse<") == 3 + 1  # and the legend
    assert "perplexity: pruned[sleb] " in text_of(page)
    page = render(sample(measurements=rows[:4]))
    assert "Of 3 differences with an interval 3 survive Holm's correction" in text_of(page)


@pytest.mark.parametrize(
    ("low", "value", "high", "better", "exact", "said"),
    [
        (1, 2, 3, "lower", False, "worse"),
        (1, 2, 3, "higher", False, "better"),
        (-3, -2, -1, "lower", False, "better"),
        (-1, 2, 5, "lower", False, "not distinguishable"),
        (0, 2, 4, "higher", False, "not distinguishable"),
        (0, 0, 0, "lower", False, "the same"),
        (None, -7, None, "lower", True, "better"),
        (None, 0, None, "lower", True, "the same"),
        (None, -7, None, "lower", False, "unknown: no interval"),
        (None, None, None, "lower", False, "unknown"),
    ],
)
def test_a_difference_is_judged_by_its_interval(low, value, high, better, exact, said):
    assert judged({"value": value, "low": low, "high": high}, better, exact) == said


def test_the_best_of_a_column_is_bold(page):
    bold = re.findall(r"<strong>([\d.,]+(?: \w+)?)</strong>", page)
    best = {part: (max if part in ("throughput", "prefill") else min)(row["estimate"]["value"] for row in rows_of() if row["part"] == part) for part in ("perplexity", "throughput", "size")}
    assert bold[0] == f"{best['perplexity']:.2f}"
    assert f"{best['throughput']:.1f}" in bold
    assert bold.count("2.234 M") == 3  # a tie


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3_146_496, "", "3.146 M"),
        (3_150_000, "parameters", "3.15 M"),
        (912_484, "parameters", "912,484"),
        (12_585_984, "bytes", "12.59 MB"),
        (0, "bytes", "0 B"),
        (1.9e12, "", "1.9 T"),
        (14.263, "", "14.26"),
        (-14.263, "", "−14.26"),
        (0.01234567, "", "0.01235"),
        (0.00000123456, "", "1.235 ×10⁻⁶"),
        (7, "", "7"),
        (None, "", "–"),
        (float("nan"), "", "–"),
    ],
)
def test_numbers_have_four_digits(value, unit, text):
    assert plain(value, unit) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (0.4217, "0.422 s"), (12.34, "12.3 s"), (59.97, "1 min"), (125, "2 min 5 s"), (3599.9, "1 h"), (3780, "1 h 3 min"), (90_000, "1 d 1 h"), (8_640_000, "100 d")]
)
def test_seconds_are_said_as_people_do(seconds, text):
    assert duration(seconds) == text


def test_a_span_far_apart_is_logarithmic():
    assert not Span.over([5, 90]).logarithmic
    far = Span.over([1, 10_000])
    assert far.logarithmic
    assert far.share(100) == pytest.approx(0.5)
    assert not Span.over([-1, 10_000]).logarithmic
    assert Span.over([3, 3]).low < 3 < Span.over([3, 3]).high


def test_long_labels_become_numbers_with_a_key():
    results = sample()
    for one in results["nodes"]:
        if one["axes"].get("pruned") == "sleb":
            one["axes"] = {"pruned": "sparsity=0.5,structure=unstructured"}
    page = render(results)
    assert "<li>2 pruned<wbr>[sleb]</li>" in page
    assert '<ul class="key">' not in render(without(results, "pruned[sleb]", "healed[sleb]") | {"resolved": {}})


def test_every_edge_of_the_graph_has_an_arrow():
    """Base and text to pruned, pruned and text to healed; four to perplexity, two each to throughput and size."""
    drawn = graph(sample()["resolved"], {"healed": 3})
    assert drawn is not None
    assert sum(path["head"] for path in drawn["paths"]) == 2 + 2 + 4 + 2 + 2
    spots = [(box["x"], box["y"], box["y"] + box["height"]) for box in drawn["boxes"]]
    assert all(a[0] != b[0] or a[2] < b[1] or b[2] < a[1] for i, a in enumerate(spots) for b in spots[:i])
    assert {box["title"]: box["x"] for box in drawn["boxes"]}["healed"] > {box["title"]: box["x"] for box in drawn["boxes"]}["pruned"]
    assert "3 variants" in [line["full"] for box in drawn["boxes"] for line in box["lines"]]


def test_the_line_goes_through_what_no_other_beats_on_both():
    places = [(1, 9), (2, 7), (2, 8), (3, 7), (4, 3), (5, 4), (6, 1)]
    points = [Point(str(place), "", "", float(x), float(y), None, None, ()) for place, (x, y) in enumerate(places)]

    def beaten(one, other, signs):
        gains = [sign * (a - b) for sign, a, b in zip(signs, (one.x, one.y), (other.x, other.y), strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    for x, y in (("lower", "lower"), ("higher", "lower"), ("lower", "higher"), ("higher", "higher")):
        signs = [1 if better == "lower" else -1 for better in (x, y)]
        wanted = [point for point in points if not any(beaten(point, other, signs) for other in points)]
        assert frontier(points, x, y) == sorted(wanted, key=lambda point: point.x)
