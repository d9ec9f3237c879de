"""Measures that take more than what they measure and what they measure it on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from etude.measures.uncertainty import Uncertainty
from etude.study.plan import build
from etude.study.recipe import Study
from etude.values.errors import InputError

RECIPE = """\
study: s
given: {base: {model: ./base}, other: {model: ./masked}, text: {corpus: ./text.jsonl}}
steps:
  pruned: {inputs: {model: base}, try: {first: {compress.drop_blocks: {blocks: 0.33}}, all: compress.magnitude}}
measure:
"""
MEASURE = "  uncertainty: {of: [base, pruned], on: text, inputs: {encoder: other}, records: 3, new: 2}\n"


def test_an_input_is_a_slot_of_its_own(workplace):
    plan = build(Study.parse(RECIPE + MEASURE))
    nodes = [node for node in plan.nodes if node.kind == "measure"]
    assert [node.name for node in nodes] == ["uncertainty of base", "uncertainty of pruned[first]", "uncertainty of pruned[all]"]
    assert {slot: [one.name for one in given] for slot, given in nodes[1].inputs.items()} == {"model": ["pruned[first]"], "encoder": ["other"], "corpus": ["text"]}
    swapped = build(Study.parse(RECIPE + MEASURE.replace("encoder: other", "encoder: base")))
    assert not {node.key for node in nodes} & {node.key for node in swapped.nodes}


def test_which_slot_is_named_does_not_matter_to_the_digest(workplace):
    def keys(line):
        return {node.name: node.key for node in build(Study.parse(RECIPE + line)).nodes}

    assert keys(MEASURE) == keys(MEASURE.replace("on: text, inputs: {encoder: other}", "inputs: {corpus: text, encoder: other}"))
    assert keys(MEASURE) == keys(MEASURE.replace("on: text, inputs: {encoder: other}", "on: other, inputs: {corpus: text}"))
    assert keys("  perplexity: {of: base, on: text}\n") == keys("  perplexity: {of: base, inputs: {corpus: text}}\n")


def test_python_builds_the_same(workplace):
    read = Study.parse(RECIPE + MEASURE)
    same = Study.of(
        study="s",
        given={"base": {"model": "./base"}, "other": {"model": "./masked"}, "text": {"corpus": "./text.jsonl"}},
        measure={"uncertainty": {"of": ["base"], "on": "text", "inputs": {"encoder": "other"}, "records": 3, "new": 2}},
    )
    assert same.measures["uncertainty"].method == read.measures["uncertainty"].method == Uncertainty(records=3, new=2)
    key = next(node.key for node in build(same).nodes if node.kind == "measure")
    assert key in {node.key for node in build(read).nodes}


def test_it_runs_and_the_results_name_it(workplace, etude):
    Path("s.yaml").write_text(RECIPE + MEASURE)
    assert etude("run", "s.yaml", "--out", "out").code == 0
    found = json.loads(Path("out/results.json").read_text())
    assert found["resolved"]["measure"]["uncertainty"]["inputs"] == {"encoder": ["other"]}
    assert {row["of"] for row in found["measurements"]} == {"base", "pruned[first]", "pruned[all]"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("  uncertainty: {of: base, on: text}\n", r"uncertainty needs the input 'encoder', a model\n.*inputs: \{encoder"),
        ("  uncertainty: {of: base, inputs: {encoder: other}}\n", "needs `on:`, a corpus"),
        ("  uncertainty: {of: base, on: text, inputs: {encodr: other}}\n", r"no key 'encodr' here\n.*'encoder'"),
        ("  uncertainty: {of: base, on: text, inputs: {model: other}}\n", "no key 'model' here"),
        ("  uncertainty: {of: base, on: text, inputs: {encoder: othr}}\n", r"no value 'othr'\n.*'other'"),
        ("  uncertainty: {of: base, on: text, inputs: {encoder: text}}\n", "measures a model as encoder, and text is a corpus"),
        ("  uncertainty: {of: base, on: text, inputs: {encoder: [other, base]}}\n", "takes one encoder, got 2"),
        ("  uncertainty: {of: base, on: text, inputs: {encoder: pruned}}\n", r"takes one encoder, and pruned has 2 variants\n.*pruned\[first\]"),
        ("  uncertainty: {of: base, on: text, inputs: other}\n", "expected a mapping with corpus, encoder, got str"),
        ("  perplexity: {of: base, on: text, inputs: {corpus: text}}\n", "takes no `on:`"),
    ],
)
def test_what_does_not_fit_is_refused(line, message, workplace):
    with pytest.raises(InputError) as caught:
        build(Study.parse(RECIPE + line))
    import re

    assert re.search(message, str(caught.value)), str(caught.value)


def test_a_search_is_judged_by_a_measure_without_more_inputs(workplace):
    recipe = (
        RECIPE.replace("measure:\n", "")
        + "  tuned: {inputs: {model: base}, use: compress.magnitude, tune: {trials: 1, over: {sparsity: [0.1, 0.2]}, by: {uncertainty: {on: text, inputs: {encoder: other}}}}}\n"
    )
    with pytest.raises(InputError, match="by is one measure on a corpus"):
        Study.parse(recipe)
