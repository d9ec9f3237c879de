"""Studies: the graph, what runs again and what does not, expectations, failures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import etude
from etude.method import discover
from etude.methods.compress.drop_blocks import DropBlocks
from etude.methods.compress.sleb import SLEB
from etude.methods.pretrain.causal_lm import CausalLM
from etude.study import source
from etude.study.expect import Expectation
from etude.study.plan import build
from etude.study.recipe import Study
from etude.study.source import code_digest
from etude.values.errors import InputError, StepError


def keys(study: Study) -> dict[str, str]:
    return {f"{node.name}/{node.seed}": node.key for node in build(study).nodes}


# The graph.


def test_a_try_fans_out_and_shared_steps_are_one_node(workplace):
    plan = build(Study.read("study.yaml"))
    names = [node.label for node in plan.nodes]
    assert names.count("pruned[sleb]") == 1  # takes no seed, so both seeds share it
    assert names.count("pruned[last]") == 1  # could take one, and draws nothing
    assert {"pruned[random] seed 0", "pruned[random] seed 1"} <= set(names)
    assert sum(name.startswith("trained[sleb]") for name in names) == 2
    assert sum(name.startswith("perplexity of trained[") for name in names) == 6
    assert len(names) == len({(node.name, node.key) for node in plan.nodes})
    assert sum(node.kind == "step" for node in plan.nodes) == 4 + 6


def test_yaml_and_python_build_the_same_graph(workplace):
    python = Study.of(
        study="tiny",
        question="asked otherwise",
        given={"base": {"model": "./base"}, "text": {"corpus": "./text.jsonl"}, "heldout": {"corpus": "./heldout.jsonl"}},
        steps={
            "pruned": {
                "inputs": {"model": "base", "calibration": "text"},
                "try": {"sleb": SLEB(blocks=0.33, tokens=512, length=64), "random": DropBlocks(blocks=0.33, choose="random"), "last": DropBlocks(blocks=0.33)},
            },
            "trained": {"inputs": {"model": "pruned", "corpus": "text"}, "use": CausalLM(batch_tokens=256, length=64), "budget": "3 steps"},
        },
        measure={"perplexity": {"of": ["base", "pruned", "trained"], "on": "heldout", "window": 64, "stride": 63}, "size": {"of": ["base", "pruned"]}},
        seeds=2,
    )
    assert keys(python) == keys(Study.read("study.yaml"))


def test_grid_and_zip():
    def labels(fan: str) -> list[str]:
        recipe = f"study: s\ngiven: {{base: {{model: ./base}}}}\nsteps:\n  a:\n    inputs: {{model: base}}\n    try: {{{fan}}}\n"
        return list(Study.parse(recipe).steps["a"].variants)

    assert labels("grid: {compress.drop_blocks: {blocks: [0.2, 0.4], choose: [first, last]}}") == [
        "blocks=0.2,choose=first",
        "blocks=0.2,choose=last",
        "blocks=0.4,choose=first",
        "blocks=0.4,choose=last",
    ]
    assert labels("zip: {compress.drop_blocks: {blocks: [0.2, 0.4], choose: [first, last]}}") == ["blocks=0.2,choose=first", "blocks=0.4,choose=last"]
    with pytest.raises(InputError, match="one length"):
        labels("zip: {compress.drop_blocks: {blocks: [0.2, 0.4], choose: [first]}}")


def test_overrides_reach_every_part(workplace):
    study = Study.read("study.yaml", ["pruned.sleb.blocks=0.6", "trained.budget=5 steps", "trained.learning_rate=0.01", "seeds=3", "text.take=7", "base=./other", "measure.perplexity.stride=32"])
    assert study.measures["perplexity"].method.stride == 32
    assert study.steps["pruned"].variants["sleb"].blocks == 0.6
    assert str(study.steps["trained"].budget) == "5 steps"
    assert study.steps["trained"].variants[""].learning_rate == 0.01
    assert study.steps["trained"].variants[""].length == 64  # merged, not replaced
    assert study.seeds == (0, 1, 2)
    assert study.given["text"].options == {"take": 7}
    assert study.given["base"].reference == "./other"


def test_an_explicit_default_is_the_default_and_every_input_counts(workplace):
    before = keys(Study.read("study.yaml"))
    assert keys(Study.read("study.yaml", ["pruned.last.blocks=0.33", "trained.weight_decay=0.1"])) == before
    changed = keys(Study.read("study.yaml", ["pruned.sleb.tokens=256"]))
    assert {name for name in before if before[name] != changed[name]} == {name for name in before if "sleb" in name}
    with open("text.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    after = keys(Study.read("study.yaml"))
    assert {name for name in before if before[name] == after[name]} == {"base/None", "heldout/None", "perplexity of base/None", "size of base/None"}


def test_two_fans_multiply_and_meet_again_only_where_they_agree(workplace):
    recipe = """
study: s
given: {base: {model: ./base}, text: {corpus: ./text.jsonl}}
steps:
  c: {inputs: {model: b, corpus: text}, use: {pretrain.causal_lm: {length: 64}}, budget: 1 steps}
  b: {inputs: {model: a}, try: {p: {compress.drop_blocks: {blocks: 0.4, choose: first}}, q: compress.magnitude}}
  a: {inputs: {model: base}, try: {x: {compress.drop_blocks: {blocks: 0.33}}, y: compress.magnitude}}
measure:
  size: {of: [a, 'b[x]', 'c[y, q]']}
"""
    plan = build(Study.parse(recipe))
    assert [node.name for node in plan.values["c"][0]] == ["c[x, p]", "c[x, q]", "c[y, p]", "c[y, q]"]
    assert sorted(value for measure, value, _ in plan.measured) == ["a[x]", "a[y]", "b[x, p]", "b[x, q]", "c[y, q]"]


def test_an_ambiguous_expectation(workplace):
    text = Path("study.yaml").read_text() + "expect:\n  - pruned.perplexity < base.perplexity\n"
    with pytest.raises(InputError, match="names 3 variants"):
        build(Study.parse(text))


# Running.


def test_a_run_computes_once_and_says_what_it_found(etude, workplace):
    code, out, err = etude("run", "study.yaml")
    assert code == 0, err
    first = json.loads(Path("out/tiny/results.json").read_text())
    assert first["schema"] == "etude-results/2"
    assert first["complete"]
    assert "out/tiny/report.html" in out
    assert Path("out/tiny/report.html").stat().st_size > 1000
    row = next(row for row in first["measurements"] if (row["part"], row["of"]) == ("perplexity", "pruned[random]"))
    assert row["estimate"]["low"] < row["estimate"]["value"] < row["estimate"]["high"]
    assert [len(names) for names in row["items"]["names"]] == [12]
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM.from_pretrained("out/tiny/models/pruned-sleb").config.num_hidden_layers == 2
    code, out, err = etude("run", "study.yaml")
    assert code == 0
    assert "0 computed" in out
    assert json.loads(Path("out/tiny/results.json").read_text()) == first
    code, out, _ = etude("run", "study.yaml", "--json")
    assert json.loads(out) == first
    assert etude("store", "verify")[0] == 0
    code, out, _ = etude("plan", "study.yaml", "--json")
    assert {row["state"] for row in json.loads(out)} == {"given", "in the store"}


def test_only_computes_what_is_named_and_what_that_needs(etude, workplace):
    code, _, err = etude("run", "study.yaml", "--only", "pruned[last]")
    assert code == 0
    assert [path.name for path in Path("out/tiny/models").iterdir()] == ["pruned-last"]


def test_an_unmet_expectation_exits_1_and_says_by_how_much(etude, workplace):
    with open("study.yaml", "a") as file:
        file.write("expect:\n  - base.size < 2 * pruned[last].size\n  - base.size < pruned[last].size\n")
    code, out, _ = etude("run", "study.yaml", "--only", "size")
    assert code == 0  # with --only, the rest was not asked
    code, out, _ = etude("run", "study.yaml")
    assert code == 1
    found = json.loads(Path("out/tiny/results.json").read_text())
    assert [outcome["verdict"] for outcome in found["expectations"]] == ["holds", "contradicted"]
    sizes = {row["of"]: row["estimate"]["value"] for row in found["measurements"] if row["part"] == "size"}
    assert f"missed by {sizes['base'] - sizes['pruned[last]']:.4g}" in out


def test_a_failed_step_stops_its_descendants_only(etude, workplace, monkeypatch):
    def fails(self, model, calibration):
        raise StepError("the moon was full")

    real = SLEB.__call__
    monkeypatch.setattr(SLEB, "__call__", fails)
    code, out, err = etude("run", "study.yaml")
    assert code == 3
    assert "the moon was full" in err
    found = json.loads(Path("out/tiny/results.json").read_text())
    assert not found["complete"]
    assert {row["of"] for row in found["measurements"] if row["part"] == "perplexity"} == {"base", "pruned[random]", "pruned[last]", "trained[random]", "trained[last]"}
    monkeypatch.setattr(SLEB, "__call__", real)
    code, out, _ = etude("run", "study.yaml")
    assert code == 0
    assert "7 computed" in out  # sleb, its two trainings, the three perplexities of these, its size
    assert json.loads(Path("out/tiny/results.json").read_text())["complete"]


def test_export_gives_a_plain_checkpoint(etude, workplace):
    assert etude("run", "study.yaml", "--only", "pruned")[0] == 0
    code, out, _ = etude("export", "study.yaml", "smaller", "--value", "pruned[last]")
    assert code == 0
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained("smaller").config.num_hidden_layers == 2
    assert etude("export", "study.yaml", "smaller", "--value", "pruned[last]")[0] == 2
    assert "not computed yet" in etude("export", "study.yaml", "other", "--value", "trained[last]")[2]


def test_methods_and_show(etude):
    code, out, _ = etude("methods", "--json")
    sleb = next(row for row in json.loads(out) if row["name"] == "compress.sleb")
    assert sleb["inputs"] == {"model": "model", "calibration": "corpus"}
    assert sleb["output"] == "model"
    assert sleb["paper"] == "sleb"
    assert next(p for p in sleb["parameters"] if p["name"] == "blocks")["default"] == 0.2
    assert "algorithm 1" in etude("show", "compress.sleb")[1]
    assert "compress.sleb" in etude("show", "compress.slep")[2]
    room = {row["method"]: row for row in json.loads(etude("show", "compress", "--json")[1])}
    assert room.keys() == {name for name in discover("methods") if name.startswith("compress.")}
    assert all(row["removes"] and row["cost"] for row in room.values()), [name for name, row in room.items() if not (row["removes"] and row["cost"])]
    assert room["compress.sleb"]["needs"] == ["calibration"]
    assert (room["compress.magnitude"]["verdict"], room["compress.flap"]["verdict"]) == ("a baseline", "contradicted")
    assert "whole blocks." in etude("show", "compress")[1]


# What the code's digest covers.


def elsewhere(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the package that may be edited, and an environment in which it is the one imported."""
    shutil.copytree(Path(etude.__file__).parent, tmp_path / "src" / "etude", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "src" / "etude", {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}


def test_editing_a_method_runs_its_steps_again_and_nothing_else(workplace, tmp_path):
    package, environment = elsewhere(tmp_path)

    def computed() -> set[str]:
        done = subprocess.run([sys.executable, "-m", "etude", "run", "study.yaml", "--set", "seeds=1"], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return {line.split("computed")[1].strip() for line in done.stderr.splitlines() if "computed" in line}

    assert len(computed()) == 3 + 3 + 7 + 4
    assert computed() == set()
    file = package / "methods" / "compress" / "sleb.py"
    source = file.read_text()
    file.write_text(
        source.replace('"""Greedy depth pruning', '"""Greedy pruning of depth')
        .replace("            losses = []", "            # a comment\n            losses = []")
        .replace("Calibration tokens.", "Tokens to calibrate on.")
    )
    assert file.read_text() != source
    assert computed() == set()
    file.write_text(source.replace("pruned = model.copy()", "pruned = model.copy().copy()"))
    assert computed() == {"pruned[sleb]", "trained[sleb] seed 0", "perplexity of pruned[sleb]", "perplexity of trained[sleb] seed 0", "size of pruned[sleb]"}


def test_the_code_digest_follows_imports(tmp_path, monkeypatch):
    package = tmp_path / "quill"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "leaf.py").write_text("X = 1\n")
    (package / "middle.py").write_text("def f():\n    from quill import leaf\n    return leaf.X\n")
    (package / "top.py").write_text('"""Documented."""\nimport os\nfrom .middle import f\n')
    (package / "other.py").write_text("Y = 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    def fresh() -> str:
        for cached in (code_digest, source._read):
            cached.cache_clear()
        return code_digest("quill.top")

    before = fresh()
    (package / "other.py").write_text("Y = 2\n")
    (package / "top.py").write_text("import os  # a comment\n\nfrom .middle import f\n")
    assert fresh() == before
    (package / "leaf.py").write_text("X = 2\n")
    assert fresh() != before


# Expectations.


def test_an_expectation_is_arithmetic_of_measured_values():
    expectation = Expectation.parse("a[x, y].p.q + 2 * (b.p - 1) <= 10 / c.p")
    assert [str(term) for term in expectation.terms] == ["a[x, y].p.q", "b.p", "c.p"]
    values = dict(zip(expectation.terms, (1.0, 3.0, 2.0), strict=True))
    assert expectation.margin(values) == 10 / 2 - (1 + 2 * (3 - 1))
    assert not expectation.strict
    assert Expectation.parse("a.p > 1").margin({Expectation.parse("a.p > 1").terms[0]: 3.0}) == 2.0


@pytest.mark.parametrize("text", ["a.p", "a.p < b.p < c.p", "a.p == 1", "1 < 2", "f(a.p) < 1", "a.p[0] < 1", "a.p ** 9 < 1", "lambda: 0", "a.p < 'x'", "a.p < True"])
def test_anything_else_is_refused(text):
    with pytest.raises(InputError):
        Expectation.parse(text, "here")
