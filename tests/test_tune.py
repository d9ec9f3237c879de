"""Searches: the same for every variant, chosen as brute force would, charged, stopped and taken up; and what sets variants apart."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest

from etude.measures.perplexity import Perplexity
from etude.method import interface
from etude.methods.pretrain.causal_lm import CausalLM
from etude.study.estimate import estimate
from etude.study.marks import marks
from etude.study.plan import build
from etude.study.recipe import Study
from etude.study.report import render
from etude.study.results import results
from etude.study.run import TRIED, run
from etude.study.store import Store
from etude.study.tune import Range
from etude.values import checkpoint
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

TUNED = """
study: tuned
given:
  base:       {model: ./base}
  text:       {corpus: ./text.jsonl}
  validation: {corpus: ./text.jsonl, take: 5}
  heldout:    {corpus: ./heldout.jsonl}
steps:
  trained:
    inputs: {model: base, corpus: text}
    try:
      plain:  {pretrain.causal_lm: {batch_tokens: 256, length: 64}}
      warm:   {pretrain.causal_lm: {batch_tokens: 256, length: 64, schedule: constant, learning_rate: 1.0}}
    budget: 2 steps
    tune:
      trials: 4
      over: {learning_rate: [1.0e-5, 1.0e-1], warmup: {choices: [0.02, 0.5]}}
      by: {perplexity: {on: validation, window: 64, stride: 63}}
measure:
  perplexity: {of: [base, trained], on: heldout, window: 64, stride: 63}
seeds: 2
"""


@pytest.fixture
def study(workplace):
    return Study.parse(TUNED)


def walked(study: Study, store: str = "store", listen=lambda event: None):
    return run(build(study), Store.open(store), listen=listen)


def row(found, name: str, seed: int):
    return next(node for node in found["nodes"] if (node["name"], node.get("seed")) == (name, seed))


def test_the_best_trial_is_chosen_and_all_are_charged(study):
    """What Optuna proposes is walked again by hand, each trial computed from the values themselves."""
    done = walked(study)
    found = results(done)
    base, text, validation = Model.load("base"), Corpus.read("text.jsonl"), Corpus.read("text.jsonl")[:5]
    sampler = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1, n_startup_trials=2))
    sampler.enqueue_trial({"learning_rate": CausalLM().learning_rate, "warmup": 0})
    trials = []
    for _ in range(4):
        trial = sampler.ask()
        chosen = {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True), "warmup": [0.02, 0.5][trial.suggest_categorical("warmup", [0, 1])]}
        trained = CausalLM(batch_tokens=256, length=64, **chosen)(base, text, seed=1, budget=study.steps["trained"].budget)
        value = Perplexity(window=64, stride=63)(trained, validation)[0].value
        sampler.tell(trial, value)
        trials.append((chosen, value, checkpoint.digest_state(trained.network)))
    node = row(found, "trained[plain]", 1)
    assert [(one["parameters"], one["value"]) for one in node["trials"]] == [(chosen, pytest.approx(value)) for chosen, value, _ in trials]
    best = min(trials, key=lambda one: one[1])
    assert node["chosen"] == best[0]
    assert checkpoint.digest_state(done.store.load(node["digest"]).network) == best[2]
    assert node["cost"]["tokens"] == sum(one["cost"]["tokens"] for one in node["trials"]) > 4 * 2 * 200
    assert len({one["digest"] for one in node["trials"]}) == 4
    assert node["trials"][0]["parameters"]["learning_rate"] == CausalLM().learning_rate  # as it was written
    assert row(found, "trained[warm]", 0)["trials"][0]["parameters"]["learning_rate"] != 1.0  # written outside of the range
    assert node["trials"][1]["parameters"] != row(found, "trained[plain]", 0)["trials"][1]["parameters"]  # each seed searches for itself
    assert found["differs_from_defaults"][:2] == ["trained: learning_rate searched over [1e-05, 0.1]", "trained: warmup searched over {'choices': [0.02, 0.5]}"]
    assert not any("learning_rate = " in line for line in found["differs_from_defaults"])
    page = render(found)
    assert "What was searched for" in page
    assert "perplexity on validation" in page
    assert json.loads(json.dumps(found["resolved"]))["steps"]["trained"]["tune"]["trials"] == 4


def test_a_search_that_was_stopped_goes_on_where_it_stood(workplace):
    study, seen = Study.parse(TUNED.replace("seeds: 2", "seeds: 1")), []

    def stop(event):
        if event.state == TRIED:
            seen.append(event.node.key)
            if len(seen) == 3:  # a step, its measurement, a step
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walked(study, listen=stop)
    later = []
    done = walked(study, listen=lambda event: later.append(event.node.key) if event.state == TRIED else None)
    assert not set(seen) & set(later)
    assert len(seen) + len(later) == 2 * 4 * 2  # variants, trials, a step and its measurement
    clean = walked(study, "another")
    assert {key: done.store.record(key)["chosen"] for key in done.states if "chosen" in done.store.record(key)} == {
        key: clean.store.record(key)["chosen"] for key in clean.states if "chosen" in clean.store.record(key)
    }
    assert {event for event in walked(study).states.values()} == {"cached"}


def test_measures_of_which_more_is_better_are_maximised(workplace):
    study = Study.parse(TUNED.replace("perplexity: {on: validation, window: 64, stride: 63}", "top_k: {on: validation}").replace("seeds: 2", "seeds: 1"))
    (node,) = [node for node in results(walked(study))["nodes"] if node["name"] == "trained[plain]"]
    assert next(one["value"] for one in node["trials"] if one["parameters"] == node["chosen"]) == max(one["value"] for one in node["trials"])
    assert min(one["value"] for one in node["trials"]) < max(one["value"] for one in node["trials"])


def test_a_trial_that_diverges_counts_and_the_search_goes_on(workplace):
    wild = TUNED.replace("[1.0e-5, 1.0e-1]", "{choices: [1.0e+30, 1.0e-3]}").replace("budget: 2 steps", "budget: 3 steps").replace("trials: 4", "trials: 6").replace("seeds: 2", "seeds: 1")
    found = results(walked(Study.parse(wild)))
    trials = [one for node in found["nodes"] for one in node.get("trials", [])]
    assert any(one["value"] is None and one["error"] for one in trials)
    assert all(node["chosen"]["learning_rate"] == 1e-3 for node in found["nodes"] if "chosen" in node)
    assert found["complete"]
    assert "1e+30" not in str([node["chosen"] for node in found["nodes"] if "chosen" in node])
    nothing = Study.parse(wild.replace("[1.0e+30, 1.0e-3]", "[1.0e+30, 1.0e+29]"))
    done = walked(nothing)
    assert {"failed", "skipped", "cached"} == set(done.states.values())
    assert "none of the 6 trials of trained[plain]" in "".join(done.errors.values())


def test_a_plan_counts_trials_and_other_digests_stay(study, workplace):
    plan = build(study)
    rows = [one for one in estimate(plan, Store.open("store")) if one["kind"] == "step"]
    assert {one["trials"] for one in rows} == {4}
    untuned = build(Study.parse(TUNED[: TUNED.index("    tune:")] + TUNED[TUNED.index("measure:") :]))
    assert not {node.key for node in plan.nodes if node.kind == "step"} & {node.key for node in untuned.nodes}
    more = build(Study.parse(TUNED.replace("trials: 4", "trials: 5")))
    assert not {node.key for node in plan.nodes if node.kind == "step"} & {node.key for node in more.nodes if node.kind == "step"}
    single = estimate(untuned, Store.open("store"))
    assert rows[0]["seconds"] == pytest.approx(4 * next(one["seconds"] for one in single if one["kind"] == "step"))


def test_python_says_the_same(study):
    body = {"trials": 4, "over": {"learning_rate": [1e-5, 1e-1], "warmup": {"choices": [0.02, 0.5]}}, "by": {"perplexity": {"on": "validation", "window": 64, "stride": 63}}}
    python = Study.of(
        study="tuned",
        given={"base": {"model": "./base"}, "text": {"corpus": "./text.jsonl"}, "validation": {"corpus": "./text.jsonl", "take": 5}, "heldout": {"corpus": "./heldout.jsonl"}},
        steps={
            "trained": {
                "inputs": {"model": "base", "corpus": "text"},
                "try": {"plain": CausalLM(batch_tokens=256, length=64), "warm": CausalLM(batch_tokens=256, length=64, schedule="constant", learning_rate=1.0)},
                "budget": "2 steps",
                "tune": body,
            }
        },
        measure={"perplexity": {"of": ["base", "trained"], "on": "heldout", "window": 64, "stride": 63}},
        seeds=2,
    )
    assert [node.key for node in build(python).nodes] == [node.key for node in build(study).nodes]


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("on: validation", "on: heldout", 18, "judged on heldout, which the study reports"),
        ("on: validation", "on: base", 18, "measures a corpus"),
        ("learning_rate: [1.0e-5", "lerning_rate: [1.0e-5", 17, "Did you mean 'learning_rate'"),
        ("[1.0e-5, 1.0e-1]", "[1.0e-1, 1.0e-5]", 17, "searched over"),
        ("[1.0e-5, 1.0e-1]", "[1.0e-5]", 17, "searched over"),
        ("[1.0e-5, 1.0e-1]", "[-1.0, 1.0e-1]", 17, "learning_rate"),
        ("[0.02, 0.5]", "[0.02, red]", 17, "warmup"),
        ("trials: 4", "trials: 0", 16, "from 1 to 1000"),
        ("trials: 4", "trial: 4", 16, "no key 'trial'"),
        ("on: validation, ", "", 18, "one measure on a corpus"),
    ],
)
def test_wrong_searches_are_refused_with_their_place(workplace, old, new, place, message):
    assert old in TUNED
    with pytest.raises(InputError) as caught:
        build(Study.parse(TUNED.replace(old, new, 1)))
    assert f":{place}:" in str(caught.value)
    assert message in str(caught.value)


def test_ranges():
    parameters = {parameter.name: parameter for parameter in interface(CausalLM).parameters}
    rate = Range.parse([1e-5, 1e-2], parameters["learning_rate"])
    assert (rate.log, rate.ends) == (True, (1e-5, 1e-2))
    whole = Range.parse([64, 128], parameters["length"])
    assert (whole.log, whole.whole, whole.ends, whole.holds(100), whole.holds(200)) == (False, True, (64, 128), True, False)
    assert not Range.parse([0, 5], parameters["learning_rate"]).log
    for wrong in ([True, 2], [1], "[1, 2]", {"choices": [1]}, [1, float("inf")]):
        with pytest.raises(ValueError, match="searched over"):
            Range.parse(wrong, parameters["learning_rate"])


# What sets variants apart.


def step(name: str, tokens: float, budget: str | None = "10k tokens", corpus: str = "text", dtype: str = "float32", **cost: float):
    inputs = {"corpus": [corpus]}
    return {"name": f"trained[{name}]", "kind": "step", "of": "trained", "output": "model", "digest": name, "budget": budget, "dtype": dtype, "inputs": inputs, "cost": {"tokens": tokens, **cost}}


GIVEN = [{"name": name, "kind": "given", "of": name, "output": "corpus", "digest": name} for name in ("text", "other")]


def test_who_is_not_treated_alike_is_marked():
    assert marks([*GIVEN, step("a", 10_000), step("b", 10_900), step("c", 9_200)]) == {}
    assert marks([*GIVEN, step("a", 10_000), step("b", 20_000), step("c", 10_000)]) == {"trained[b]": ["spent 20,000 tokens, others 10,000"]}
    assert marks([*GIVEN, step("a", 1, "5 steps"), step("b", 9, "5 steps")]) == {}
    assert marks([*GIVEN, step("a", 1, "60 seconds", seconds=60.0), step("b", 9, "60 seconds", seconds=90.0)]) == {"trained[b]": ["spent 90 seconds, others 60"]}
    assert marks([*GIVEN, step("a", 1), step("b", 1, corpus="other", dtype="bfloat16"), step("c", 1)]) == {"trained[b]": ["read other as corpus", "in bfloat16"]}
    assert marks([*GIVEN, step("a", 1)]) == {}


def test_marks_reach_the_report(workplace, etude):
    study = Path("study.yaml").read_text()
    study = study[: study.index("  pruned:")] + study[study.index("  trained:") :]
    study = study.replace("of: [base, pruned, trained]", "of: [base, trained]").replace("of: [base, pruned]", "of: [base]").replace("model: pruned", "model: base")
    study = study.replace(
        "use: {pretrain.causal_lm: {batch_tokens: 256, length: 64}}",
        "try: {small: {pretrain.causal_lm: {batch_tokens: 256, length: 64}}, large: {pretrain.causal_lm: {batch_tokens: 1024, length: 64}}}",
    )
    Path("marked.yaml").write_text(study.replace("budget: 3 steps", "budget: 500 tokens").replace("seeds: 2", "seeds: 1"))
    ended = etude("run", "marked.yaml", "--store", "store", "--out", "out")
    assert ended.code == 0
    assert "† trained[large] was not treated like the other variants: spent " in ended.out
    assert "† spent " in Path("out/report.html").read_text()
