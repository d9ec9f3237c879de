"""A user's mistake: one message that names the place and the remedy, exit code 2, no traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

STEPS = """
study: s
given:
  base: {model: ./base}
  text: {corpus: ./text.jsonl}
steps:
"""


def mistakes(etude, *arguments: str) -> str:
    """The one message; asserts that there is no more than that."""
    code, out, err = etude(*arguments)
    assert code == 2, (code, out, err)
    assert "Traceback" not in err + out
    assert len(re.findall("^error:", err, re.MULTILINE)) == 1
    return err


def refuses(etude, workplace, recipe: str, *wanted: str, line: int | None = None) -> None:
    (workplace / "wrong.yaml").write_text(recipe)
    message = mistakes(etude, "plan", "wrong.yaml")
    for part in wanted:
        assert part in message, message
    if line is not None:
        assert f"wrong.yaml:{line}:" in message, message


RECIPES = {
    "unknown method": (STEPS + "  a: {inputs: {model: base, calibration: text}, use: compress.slab}\n", ["compress.slab", "compress.sleb"], 7),
    "unknown parameter": (STEPS + "  a:\n    inputs: {model: base, calibration: text}\n    use: {compress.sleb: {block: 0.5}}\n", ["no parameter 'block'", "Did you mean 'blocks'?"], 9),
    "wrong type": (STEPS + "  a:\n    inputs: {model: base, calibration: text}\n    use: {compress.sleb: {blocks: many}}\n", ["blocks", "float", "many"], 9),
    "wrong range": (STEPS + "  a:\n    inputs: {model: base, calibration: text}\n    use: {compress.sleb: {blocks: 33}}\n", ["less than 1", "33", "0.33"], 9),
    "missing input": (STEPS + "  a:\n    inputs: {model: base}\n    use: compress.sleb\n", ["needs the input 'calibration'", "a corpus"], 9),
    "surplus input": (STEPS + "  a:\n    inputs: {model: base, calibration: text, text: text}\n    use: compress.sleb\n", ["takes no input 'text'"], 8),
    "wrong kind": (STEPS + "  a:\n    inputs: {model: text, calibration: base}\n    use: compress.sleb\n", ["takes a model as model", "text is a corpus"], 8),
    "wrong kind of source": ("study: s\ngiven:\n  base: {corpus: etude:testbed}\nmeasure:\n  size: {of: base}\n", ["testbed is a model"], 3),
    "unknown value": (STEPS + "  a:\n    inputs: {model: bose, calibration: text}\n    use: compress.sleb\n", ["no value 'bose'", "'base'"], 8),
    "unknown variant": (
        STEPS + "  a:\n    inputs: {model: base}\n    try: {x: compress.drop_blocks}\n  b:\n    inputs: {model: 'a[y]'}\n    use: compress.drop_blocks\n",
        ["no variant y"],
        11,
    ),
    "cycle": (STEPS + "  a: {inputs: {model: b}, use: compress.drop_blocks}\n  b: {inputs: {model: a}, use: compress.drop_blocks}\n", ["circle", "a → b → a"], 7),
    "empty study": ("study: s\n", ["empty"], 1),
    "no name": ("given: {}\n", ["'study' is missing"], 1),
    "empty file": ("", ["expected a mapping"], 1),
    "duplicate key": ("study: s\nseeds: 1\nseeds: 2\n", ["'seeds'", "twice"], 3),
    "unknown key": ("study: s\nstep: {}\n", ["no key 'step'", "'steps'"], 2),
    "not YAML": ("study: [s\nseeds: 1\n", ["no YAML"], None),
    "a tag": ("study: !!python/object/apply:os.system ['true']\n", ["plain value"], 1),
    "escaping name": ("study: ../../etc\nmeasure: {}\n", ["is no name"], 1),
    "escaping step name": ("study: s\nsteps:\n  ../x: {use: compress.drop_blocks}\n", ["is no name"], 3),
    "bad budget": (STEPS + "  a:\n    inputs: {model: base, corpus: text}\n    use: pretrain.causal_lm\n    budget: lots\n", ["200k tokens", "lots"], 10),
    "missing budget": (STEPS + "  a:\n    inputs: {model: base, corpus: text}\n    use: pretrain.causal_lm\n", ["needs a budget"], 7),
    "missing file": ("study: s\ngiven:\n  text: {corpus: ./texd.jsonl}\nmeasure:\n  size: {of: text}\n", ["texd.jsonl", "text.jsonl"], 3),
    "missing folder": ("study: s\ngiven:\n  base: {model: ./bass}\nmeasure:\n  size: {of: base}\n", ["bass", "'base'"], 3),
    "no comparison": ("study: s\ngiven:\n  base: {model: ./base}\nmeasure:\n  size: {of: base}\nexpect:\n  - base.size is small\n", ["compares no measured values"], 7),
    "code in an expectation": ("study: s\ngiven:\n  base: {model: ./base}\nmeasure:\n  size: {of: base}\nexpect:\n  - __import__('os').getpid() < base.size\n", ["something else than"], 7),
    "expectation of nothing": ("study: s\ngiven:\n  base: {model: ./base}\nmeasure:\n  size: {of: base}\nexpect:\n  - base.perplexity < 3\n", ["nothing measures 'perplexity'"], 7),
    "unknown measure": ("study: s\ngiven:\n  base: {model: ./base}\nmeasure:\n  sise: {of: base}\n", ["no measure 'sise'", "'size'"], 5),
    "settings within use": ("study: s\ngiven:\n  base: {model: ./base}\nmeasure:\n  fast: {use: {size: {}}, of: base}\n", ["a measure's name"], 5),
    "seeds": ("study: s\nseeds: 0\nmeasure:\n  size: {of: base}\n", ["seeds"], 2),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_mistake_in_a_recipe(name, etude, workplace):
    recipe, wanted, line = RECIPES[name]
    refuses(etude, workplace, recipe, *wanted, line=line)


def test_an_alias_bomb_is_refused_at_once(etude, workplace):
    lines = ["study: s", "a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    refuses(etude, workplace, "\n".join(lines) + "\n", "aliases")


def test_deep_nesting_is_refused(etude, workplace):
    refuses(etude, workplace, "study: " + "[" * 5000 + "]" * 5000 + "\n", "error")


def test_a_study_that_is_not_there_names_the_nearest(etude, workplace):
    assert "study.yaml" in mistakes(etude, "run", "studi.yaml")


def test_a_wrong_override(etude, workplace):
    assert "Did you mean 'sleb'?" in mistakes(etude, "plan", "study.yaml", "--set", "pruned.slep.blocks=0.5")
    assert "key=value" in mistakes(etude, "plan", "study.yaml", "--set", "pruned")
    assert "'pruned'" in mistakes(etude, "run", "study.yaml", "--only", "prund")


def test_an_empty_corpus(etude, workplace):
    (workplace / "text.jsonl").write_text("")
    assert re.search(r"study.yaml:6:\d+.*no records", mistakes(etude, "run", "study.yaml"))


def test_a_broken_corpus(etude, workplace):
    (workplace / "text.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "text.jsonl cannot be read" in mistakes(etude, "run", "study.yaml")
    (workplace / "text.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "text.jsonl cannot be read" in mistakes(etude, "run", "study.yaml")


def test_a_corpus_without_text(etude, workplace):
    (workplace / "heldout.jsonl").write_text('{"txt": "a b c"}\n')
    assert "no column 'text'" in mistakes(etude, "run", "study.yaml")


def test_truncated_and_corrupt_weights(etude, workplace):
    weights = workplace / "base" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert re.search(r"study.yaml:\d+:\d+.*broken", mistakes(etude, "run", "study.yaml"))
    weights.write_bytes(b"\xff" * 200)
    assert "broken" in mistakes(etude, "run", "study.yaml")


def test_a_checkpoint_that_has_only_pickles(etude, workplace):
    (workplace / "base" / "model.safetensors").rename(workplace / "base" / "pytorch_model.bin")
    message = mistakes(etude, "run", "study.yaml")
    assert "pickles" in message
    assert "study.yaml:5:" in message


def test_a_tokenizer_that_does_not_fit(etude, workplace):
    path = workplace / "base" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] |= {f"more{i}": 300 + i for i in range(50)}
    path.write_text(json.dumps(data))
    assert "does not fit the model" in mistakes(etude, "run", "study.yaml")


def test_a_config_that_does_not_fit(etude, workplace):
    path = workplace / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 5}))
    assert "lack" in mistakes(etude, "run", "study.yaml")
    path.write_text("{")
    assert "config.json" in mistakes(etude, "run", "study.yaml")


def test_weights_that_are_not_finite(etude, workplace):
    from safetensors.torch import load_file, save_file

    weights = workplace / "base" / "model.safetensors"
    state = load_file(weights)
    next(iter(state.values())).view(-1)[0] = float("nan")
    save_file(state, weights, metadata={"format": "pt"})
    assert "not finite" in mistakes(etude, "run", "study.yaml")


def test_a_checkpoint_cannot_name_code_to_run(etude, workplace):
    (workplace / "base" / "edits.json").write_text(json.dumps([{"edit": "os:system", "command": "touch owned"}]))
    assert "is not Étude's" in mistakes(etude, "run", "study.yaml")
    assert not (workplace / "owned").exists()


def test_a_store_that_cannot_be_written(etude, workplace):
    (workplace / "file").write_text("")
    assert "cannot be written" in mistakes(etude, "run", "study.yaml", "--store", "file/store")


def test_a_read_only_store(etude, workplace):
    (workplace / "store").mkdir(mode=0o500)
    place = "store" if os.geteuid() else "/sys/etude"  # the superuser may write anywhere but there
    assert "cannot be written" in mistakes(etude, "run", "study.yaml", "--store", place)


def test_a_full_disk(workplace):
    """A limit on the size of files stands in for the disk: writing fails in the middle of an object."""
    script = "import resource, signal, errno, os; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); from etude.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script, "run", "study.yaml", "--set", "seeds=1"], capture_output=True, text=True, cwd=workplace, check=False)
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((workplace / ".etude" / "objects").glob("*/model.safetensors"))
