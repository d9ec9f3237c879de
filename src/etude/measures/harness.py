"""Tasks of lm-eval, at the engine's speed."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from etude.measures._asked import required
from etude.method import MEASUREMENTS, Method
from etude.values.digest import digest_files
from etude.values.errors import InputError
from etude.values.measurement import HIGHER, LOWER, Measurement
from etude.values.model import Model

OF_TEXT = {"word_perplexity": ("exp", 1.0), "byte_perplexity": ("exp", 1.0), "bits_per_byte": ("identity", 1 / math.log(2))}
"""Metrics whose samples are (log-likelihood, words or bytes): the scale on which their mean is read, and the unit of a nat."""


@dataclass(frozen=True)
class Harness(Method):
    """A task of EleutherAI's lm-eval: each of its metrics is a measurement, each of its documents an item.

    The prompts, choices, metrics and filters are those of the task's file; log-likelihoods and completions come from Étude's engine, and in float32 they are
    those of lm-eval's own ``hf`` backend.  A metric that has no number a document (a corpus's BLEU, say) is left out.  A task that loads its documents
    from the Hub needs the network, unless they are in the local cache.  A task's file may name Python functions beside it (``!function``), which are executed: take only files that you trust.

    Raises InputError without the extra ``harness``, for a task that is not there, and for one without any metric a document.
    Cost: a forward pass over what its questions do not share, or one a new token.
    """

    task: str = ""
    """A task's or group's name in lm-eval, or the path of a task's YAML file."""
    shots: int | None = None
    """Examples before each question; by default as the task says."""
    records: int | None = None
    """Ask only so many documents of each task, from the first; all of them by default."""
    contents: str = ""
    """Digest of the YAML file and those beside it; found by itself, so that an edited task is measured anew."""

    def __post_init__(self) -> None:
        for name in ("shots", "records"):
            value = getattr(self, name)
            if value is not None and value < (name == "records"):
                raise ValueError(f"{name} is a number, got {value}")
        path = self.path()
        if path is not None:
            beside = [one for one in path.parent.iterdir() if one.suffix in (".yaml", ".yml", ".py", ".jsonl", ".json")]
            object.__setattr__(self, "contents", digest_files(beside, path.parent))

    def path(self) -> Path | None:
        """The task's file, if it is one.  Raises ValueError if it is not there."""
        if not self.task.endswith((".yaml", ".yml")):
            return None
        path = Path(self.task).resolve()
        if not path.is_file():
            raise ValueError(f"there is no task file {self.task}")
        return path

    def apply(self, model: Model) -> MEASUREMENTS:
        required("lm_eval", "harness")
        if not self.task:
            raise InputError("which task is it to be?", remedy="Set `task` to the name of an lm-eval task, or to the path of its YAML file.")
        found = self._evaluate(model)
        several = len(found["samples"]) > 1
        measurements: list[Measurement] = []
        for task, samples in sorted(found["samples"].items()):
            higher = found["higher_is_better"].get(task, {})
            for (metric, kind), rows in sorted(by_metric(samples).items()):
                name = f"{task}.{metric}" if several else metric
                measurement = of_metric(name if kind == "none" else f"{name}.{kind}", metric, rows, bool(higher.get(metric, True)))
                if measurement is not None:
                    measurements.append(measurement)
        if not measurements:
            raise InputError(f"no metric of {self.task} has a number for each document", remedy="Take a task with acc, exact_match or a perplexity.")
        return tuple(measurements)

    def _evaluate(self, model: Model) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from etude.engine.harness import Harnessed

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        path = self.path()
        manager = TaskManager() if path is None else TaskManager(include_path=str(path.parent), include_defaults=False)  # reading lm-eval's own takes ten seconds
        name = self.task if path is None else _name(path)
        if name not in manager.all_tasks:
            raise InputError(f"lm-eval has no task {name!r}", remedy="`lm-eval ls tasks` lists them; a file of your own ends in .yaml.")
        with quiet():
            found = simple_evaluate(
                model=Harnessed(model), tasks=[name], num_fewshot=self.shots, limit=self.records, task_manager=manager, bootstrap_iters=0, log_samples=True, verbosity="ERROR",
            )  # fmt: skip
        assert found is not None
        return dict(found)


def _name(path: Path) -> str:
    """The task's name in its file."""
    from ruamel.yaml import YAML

    read = YAML(typ="rt").load(path.read_text())
    if not isinstance(read, dict) or "task" not in read:
        raise InputError(f"{path} names no task", remedy="A task's file begins with `task: NAME`.")
    return str(read["task"])


def by_metric(samples: list[dict[str, Any]]) -> dict[tuple[str, str], list[tuple[str, Any]]]:
    """Each metric's values by document, for each of a task's filters."""
    found: dict[tuple[str, str], list[tuple[str, Any]]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            found.setdefault((metric, sample["filter"]), []).append((str(sample["doc_id"]), sample[metric]))
    return found


def of_metric(name: str, metric: str, rows: list[tuple[str, Any]], higher: bool) -> Measurement | None:
    """A metric's measurement from its values by document; None if they are no numbers."""
    items, values = tuple(item for item, _ in rows), [value for _, value in rows]
    if metric in OF_TEXT:
        scale, unit = OF_TEXT[metric]
        logs, sizes = np.array(values, float).T
        return Measurement(name, -logs / sizes * unit, unit="bits/byte" if metric == "bits_per_byte" else "", better=LOWER, weights=sizes, scale=scale, item_names=items)
    if not all(isinstance(value, (int, float, np.number, np.bool_)) for value in values):
        return None
    return Measurement(name, np.array(values, float), better=HIGHER if higher else LOWER, item_names=items)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, bars of others are off, since the engine reports its progress, and lm-eval does not ask git where it is."""
    import tqdm
    from lm_eval import evaluator

    begin, ask = tqdm.std.tqdm.__init__, evaluator.get_git_commit_hash

    def unseen(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **{**named, "disable": True})

    tqdm.std.tqdm.__init__, evaluator.get_git_commit_hash = unseen, lambda: None
    try:
        yield
    finally:
        tqdm.std.tqdm.__init__, evaluator.get_git_commit_hash = begin, ask
