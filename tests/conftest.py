"""Settings that every test shares."""

import os
from typing import NamedTuple

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def one_thread_a_worker():
    import torch

    torch.set_num_threads(1)


WORDS = ["the", "a", "of", "in", "on", "under", "over", "river", "stone", "house", "tree", "bird", "sings", "runs", "falls", "quickly", "slowly", "old", "new", "red", "green", "blue"]

STUDY = """\
study: tiny
question: Which block is missed least?

given:
  base:    {model: ./base}
  text:    {corpus: ./text.jsonl}
  heldout: {corpus: ./heldout.jsonl}

steps:
  pruned:
    inputs: {model: base, calibration: text}
    try:
      sleb:   {compress.sleb: {blocks: 0.33, tokens: 512, length: 64}}
      random: {compress.drop_blocks: {blocks: 0.33, choose: random}}
      last:   {compress.drop_blocks: {blocks: 0.33, choose: last}}
  trained:
    inputs: {model: pruned, corpus: text}
    use: {pretrain.causal_lm: {batch_tokens: 256, length: 64}}
    budget: 3 steps

measure:
  perplexity: {of: [base, pruned, trained], on: heldout, window: 64, stride: 63}
  size:       {of: [base, pruned]}

seeds: 2
"""


def sentences(count: int, seed: int) -> list[str]:
    import random

    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(20, 80))) for _ in range(count)]


TASK = """task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a tiny checkpoint, two small corpora, and a study of them."""
    from etude.methods.pretrain.initialize import Initialize
    from etude.values.corpus import Corpus

    folder = tmp_path_factory.mktemp("tiny")
    text = Corpus([
        {"text": one, "path": f"{place}.txt", "source": f"{place % 3}.example", "prompt": f"{one[:12]}:", "completion": f" {one[12:24]}\n", "test": "pass"}
        | {"label": ("one", "other")[place % 2], "language": ("one", "other")[place % 2], "sentence": place // 2}
        | {"choices": [one[12:20], one[20:24], "no"], "answer": place % 3}
        | {"model": place // 4, "item": str(place % 4), "skill": "all", "correct": int(place // 4 + place % 3 > 3 * (place % 4))}
        | {"step": place + 1, "learning_rate": 1e-3 * (1 - place / 80), "loss": 3 + 4 / (place + 2)}
        for place, one in enumerate(sentences(40, 1))
    ])  # fmt: skip
    text.write_jsonl(folder / "text.jsonl")
    Corpus(sentences(12, 2)).write_jsonl(folder / "heldout.jsonl")
    for kind, name in (("causal", "base"), ("masked", "masked"), ("seq2seq", "seq2seq")):
        size = {"vocabulary": 300, "hidden_size": 32, "blocks": 3, "heads": 4, "key_value_heads": 2, "intermediate_size": 48, "max_length": 128}
        Initialize(kind=kind, **size)(text, seed=0).save(folder / name)
    (folder / "study.yaml").write_text(STUDY)
    (folder / "task.yaml").write_text(TASK.format(data=folder / "text.jsonl"))
    return folder


@pytest.fixture
def workplace(tiny, tmp_path, monkeypatch):
    """A fresh folder with the tiny study in it, as the current folder."""
    import shutil

    shutil.copytree(tiny, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("ETUDE_STORE", raising=False)
    return tmp_path / "work"


class Ended(NamedTuple):
    """What a command ended with."""

    code: int
    out: str
    err: str


@pytest.fixture
def etude(monkeypatch, capsys):
    """The command line in this process: gives exit code, standard output, standard error."""

    def call(*arguments: str) -> Ended:
        from etude.cli import main

        monkeypatch.setattr("sys.argv", ["etude", *arguments])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    return call


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """Runs what is given twice in one place: stopped when a feed of this class is asked for rows after so many steps, and taken up again."""
    from etude.engine import resume

    def run(feed, steps, what):
        taken, take = 0, feed.take

        def failing(self, count, progress):
            nonlocal taken
            taken += 1
            if taken > steps:
                raise KeyboardInterrupt
            return take(self, count, progress)

        with monkeypatch.context() as patch, resume.keeping(tmp_path, every=0):
            patch.setattr(feed, "take", failing)
            with pytest.raises(KeyboardInterrupt):
                what()
        assert list(tmp_path.glob("*.safetensors")), "nothing was kept that could be taken up"
        with resume.keeping(tmp_path, every=0):
            return what()

    return run
