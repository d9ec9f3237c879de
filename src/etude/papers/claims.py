"""Claims: for a paper a study whose expectations are what the paper says, and what came out when it ran."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude.papers import evidence
from etude.papers.catalogue import Paper, find
from etude.study.plan import Plan, build
from etude.study.recipe import Study
from etude.study.results import write
from etude.study.run import Event, Run, run
from etude.study.store import Store
from etude.values.errors import InputError, nearest

FOLDER = Path(__file__).with_name("claims")


@dataclass(frozen=True)
class Claim:
    """A paper with the study that puts its claim to the test."""

    paper: Paper
    path: Path

    @property
    def text(self) -> str:
        """The study as it is written, for evidence to be compared with and readers to copy."""
        return self.path.read_text(encoding="utf8")

    @property
    def evidence(self) -> evidence.Evidence | None:
        return evidence.read(self.paper.slug)

    @property
    def state(self) -> str | None:
        """Whether the evidence still speaks of this study and these methods; None without evidence."""
        known = self.evidence
        return known.state(self.text) if known else None


@functools.cache
def claims() -> Mapping[str, Claim]:
    """Every claim that has a study, by its paper's slug: ``claims/<stage>/<slug>.yaml``."""
    return types.MappingProxyType({path.stem: Claim(find(path.stem), path) for path in sorted(FOLDER.glob("*/*.yaml"))})


def claim(slug: str) -> Claim:
    """The claim of a paper.  Raises InputError if there is no such paper, or nothing to run for it yet."""
    if slug in claims():
        return claims()[slug]
    paper = find(slug)
    raise InputError(f"the claim of {paper.name} ({slug}) has no study yet", remedy=f"What would test it: {paper.check}" if paper.covers is None else nearest(slug, claims()))


@dataclass(frozen=True)
class Tested:
    """A claim that was run: what came out, and where it lies."""

    claim: Claim
    run: Run
    found: Mapping[str, Any]
    evidence: evidence.Evidence


def planned(one: Claim, overrides: Sequence[str] = ()) -> Plan:
    """A claim's study, unrolled.  overrides: changes to it, `base=…` above all: the claim on another model."""
    return build(Study.read(one.path, overrides))


def put_to_test(one: Claim, plan: Plan, store: Store, folder: Path, listen: Callable[[Event], None] = lambda event: None) -> Tested:
    """Run a claim's study as it was planned; results, report and evidence go into a folder."""
    done = run(plan, store, listen=listen)
    found = write(done, folder)
    data = evidence.build(one.paper, plan, found)
    path = evidence.write(data, found, folder)
    return Tested(one, done, found, evidence.Evidence(data, path))


def record(tested: Tested) -> Path:
    """Keep what was found beside the catalogue, as the evidence from now on."""
    return evidence.write(tested.evidence.data, tested.found, evidence.FOLDER)
