"""How often a program that a generator writes passes its tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from etude.engine import sandbox
from etude.engine.generate import generate
from etude.engine.progress import report
from etude.engine.sandbox import Limits
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.generator import Generator
from etude.values.measurement import HIGHER, Measurement

PROTECTIONS = ("namespaces", "read_only", "filtered")


@dataclass(frozen=True)
class PassAtK(Method):
    """pass@k: the probability that one of k samples passes the tests, estimated without bias from n samples (Chen et al., 2021, section 2.1): 1 - C(n - c, k) / C(n, k), where c passed.

    **It executes what a language model wrote**, in the sandbox that `etude.engine.sandbox` describes; `execute` must be said.  Each prompt is an item, named by the
    column ``task_id`` if there is one; one measurement a k.  Reads the columns prompt and test, and entry_point if there is one: the program is prompt, completion and
    test one after another, and, where a record names an entry point, the call ``check(entry_point)`` as in HumanEval.  It passes if it runs to its end.
    Completions are taken as they are: the generator's policy needs what makes samples differ (a temperature; 0.2 to 0.8 in the paper) and stop strings (there
    ``\\nclass``, ``\\ndef``, ``\\n#``, ``\\nif``, ``\\nprint``).  Time and memory are limited, so that a slow machine may fail what a fast one passes.
    ``protection`` says what kept the programs in: 1 for each protection that was in force, else 0.

    Raises InputError if `execute` is False, if samples cannot differ, or if the network or files would be unprotected and that is not allowed.
    Cost: n forward passes over the prompts and n a new token; about 60 ms and the program's own time for every different sample.
    """

    execute: bool = False
    """Whether programs may be executed on this machine; nothing is done without it."""
    ks: tuple[int, ...] = (1, 10)
    """How many samples are allowed, each at least 1."""
    samples: int = 20
    """n, samples a prompt; at least the largest k.  The paper takes 200, for k up to 100."""
    records: int | None = None
    """Ask only so many prompts, from the corpus's beginning; all of them by default."""
    seconds: float = 3.0
    """Wall-clock time of a program, as in OpenAI's human-eval."""
    memory: int = 512
    """Mebibytes of address space of a program, at least 64."""
    allow_network: bool = False
    """Run even where programs cannot be kept from the network; where they can, they are all the same."""
    allow_writes: bool = False
    """Run even where programs cannot be kept from altering files; where they can, they are all the same."""
    seed: int = 0
    """Which samples are drawn."""

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            raise ValueError(f"ks are distinct numbers of samples, at least 1, got {self.ks}")
        if self.samples < max(self.ks):
            raise ValueError(f"samples is at least the largest of ks ({max(self.ks)}), got {self.samples}")
        if self.records is not None and self.records < 1:
            raise ValueError(f"records is a number of prompts, at least 1, got {self.records}; leave it out to ask all")
        self.limits()

    def limits(self) -> Limits:
        """What a program may use.  Raises ValueError for what is no limit."""
        return Limits(seconds=self.seconds, memory_bytes=self.memory << 20)

    def apply(self, generator: Generator, corpus: Corpus) -> MEASUREMENTS:
        tasks = list(corpus[: self.records])
        self._check(generator, corpus, tasks)
        protection = self._run("").protection  # refused before anything is generated, if it is to be
        said = generate(generator, [task["prompt"] for task in tasks for _ in range(self.samples)], self.seed)
        programs = [program(tasks[place // self.samples], completion) for place, completion in enumerate(said)]
        passed: dict[str, bool] = {}
        for text in programs:
            if text not in passed:
                passed[text] = self._run(text).passed
                report("executing", len(passed), len(set(programs)))
        counts = np.array([passed[text] for text in programs]).reshape(len(tasks), self.samples).sum(1).tolist()
        names = tuple(str(task.get("task_id", place)) for place, task in enumerate(tasks))
        found = [Measurement(f"pass_at_{k}", np.array([pass_at_k(self.samples, count, k) for count in counts]), better=HIGHER, item_names=names) for k in self.ks]
        kept = np.array([getattr(protection, name) for name in PROTECTIONS], float)
        return (*found, Measurement("protection", kept, better=HIGHER, exact=True, item_names=PROTECTIONS))

    def _run(self, text: str) -> sandbox.Outcome:
        return sandbox.run(text, self.limits(), allow_network=self.allow_network, allow_writes=self.allow_writes)

    def _check(self, generator: Generator, corpus: Corpus, tasks: list[dict[str, Any]]) -> None:
        if not tasks:
            raise InputError("the corpus is empty")
        for name in ("prompt", "test"):
            corpus.column(name)
        if not self.execute:
            raise InputError(
                f"pass_at_k would execute up to {len(tasks) * self.samples:,} Python programs on this machine, which the generator writes and nobody has read",
                remedy="Read in etude/engine/sandbox.py what they are kept from, and say execute: true.",
            )
        if self.samples > 1 and generator.policy.temperature == 0:
            raise InputError(f"at temperature 0 all {self.samples} samples of a prompt are one", remedy="Give the generator's policy a temperature, or take ks: [1] and samples: 1.")


def program(task: dict[str, Any], completion: str) -> str:
    """What is executed: the prompt as it was completed, the test, and its call if the task names an entry point."""
    call = f"\ncheck({task['entry_point']})\n" if task.get("entry_point") else "\n"
    return f"{task['prompt']}{completion}\n{task['test']}{call}"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Share of the sets of k different samples that hold one that passed: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)
