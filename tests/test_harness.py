"""lm-eval's tasks on the engine against lm-eval's own backend, item by item."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from texts import reader

from etude.measures.harness import Harness
from etude.values.errors import InputError

lm_eval = pytest.importorskip("lm_eval")

CHOICE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
num_fewshot: 2
output_type: {kind}
doc_to_text: "{{{{question}}}}:"
"""
CHOICES = """doc_to_choice: choices
doc_to_target: right
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
"""
UNTIL = """doc_to_target: "{{choices[right]}}"
generation_kwargs: {until: ["e", "."], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match}
"""
ROLLING = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{long}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    random = np.random.default_rng(0)
    words = ["tide", "crow", "rain", "baker", "rope", "snow", "clock", "road"]
    rows = []
    for place in range(12):
        chosen = random.choice(words, 4, replace=False).tolist()
        rows.append({"question": f"Q{place % 3} the {words[place % 8]}", "choices": [*chosen[:3], f"{chosen[3]} again"], "right": place % 4, "long": " ".join(random.choice(words, 30))})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICE.format(name="etude_choice", data=data, kind="multiple_choice") + CHOICES)
    (folder / "until.yaml").write_text(CHOICE.format(name="etude_until", data=data, kind="generate_until") + UNTIL)
    (folder / "rolling.yaml").write_text(ROLLING.format(name="etude_rolling", data=data))
    return folder


def theirs(model, folder: Path, task: str) -> list[dict]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    backend = HFLM(pretrained=model.network, tokenizer=copy.deepcopy(model.tokenizer), backend="causal", batch_size=1, device="cpu")
    return simple_evaluate(model=backend, tasks=[task], task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0)["samples"][task]


def ours(model, folder: Path, task: str) -> list[dict]:
    return Harness(task=str(folder / f"{task.removeprefix('etude_')}.yaml"))._evaluate(model)["samples"][task]


def wide(name: str):
    """The small network with room for a prompt of bytes."""
    from transformers import AutoModelForCausalLM

    from etude.values.model import Model

    small = reader(name)
    config = copy.deepcopy(small.base)
    config.max_position_embeddings = 96
    import torch

    torch.manual_seed(2)
    return Model(AutoModelForCausalLM.from_config(config).eval(), small.tokenizer)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("task", ["etude_choice", "etude_until", "etude_rolling"])
def test_every_item_is_that_of_the_hf_backend(name, task, folder):
    model = wide(name)
    before = model.digest
    expected, found = theirs(model, folder, task), ours(model, folder, task)
    assert [row["doc_id"] for row in found] == [row["doc_id"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["arguments"] == other["arguments"]
        if task == "etude_until":
            assert one["resps"] == other["resps"]
        elif task == "etude_choice":
            for (mine,), (right,) in zip(one["resps"], other["resps"], strict=True):
                assert float(mine[0]) == pytest.approx(float(right[0]), abs=1e-3)
                assert str(mine[1]) == str(right[1])
            assert (one["acc"], one["acc_norm"]) == (other["acc"], other["acc_norm"])
        else:
            np.testing.assert_allclose(one["word_perplexity"], other["word_perplexity"], rtol=1e-5)
    assert model.digest == before
    assert model.tokenizer.pad_token is None


def test_measurements_are_what_lm_eval_reports(folder):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = wide("llama").frozen_now()
    backend = HFLM(pretrained=model.network, tokenizer=copy.deepcopy(model.tokenizer), backend="causal", batch_size=1, device="cpu")
    for task in ("choice", "rolling"):
        expected = simple_evaluate(model=backend, tasks=[f"etude_{task}"], task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0)["results"][f"etude_{task}"]
        for measurement in Harness(task=str(folder / f"{task}.yaml"))(model=model):
            assert measurement.value == pytest.approx(expected[f"{measurement.name},none"], rel=1e-4)
            assert len(measurement.items) == 12


def test_an_edited_task_is_another_measure(folder, tmp_path):
    for name in ("choice.yaml", "data.jsonl"):
        (tmp_path / name).write_text((folder / name).read_text())
    before = Harness(task=str(tmp_path / "choice.yaml"))
    (tmp_path / "choice.yaml").write_text((folder / "choice.yaml").read_text() + "# other\n")
    assert Harness(task=str(tmp_path / "choice.yaml")) != before


def test_what_is_not_there_is_said(tmp_path):
    model = wide("llama").frozen_now()
    with pytest.raises(InputError, match="no task 'nothing_like_it'"):
        Harness(task="nothing_like_it")(model=model)
    with pytest.raises(ValueError, match="no task file"):
        Harness(task="nowhere/at_all.yaml")
    (tmp_path / "a.yaml").write_text("dataset_path: json\n")
    with pytest.raises(InputError, match="names no task"):
        Harness(task=str(tmp_path / "a.yaml"))(model=model)
