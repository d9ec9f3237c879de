"""Vectors of papers: those of the catalogue come with it, others are computed once and kept among the user's caches."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from etude.papers import encoder
from etude.papers.catalogue import Paper, catalogue
from etude.papers.search import Index, text_of
from etude.values.digest import digest

SHIPPED = Path(__file__).with_name("vectors.safetensors")
"""The catalogue's; `make vectors` writes it anew."""
FILE = "vectors-minilm-1.safetensors"


def folder() -> Path:
    """Where indices and vectors are kept: ``$ETUDE_CACHE``, else the system's place for caches."""
    return Path(os.environ.get("ETUDE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "etude").expanduser() / "papers"


def of(papers: Sequence[Paper], report: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray | None:
    """A vector a paper, (papers, width) float32 of length 1; None without the encoder.

    Cost: some 20 ms for each paper that was never seen before.
    """
    if not encoder.installed():
        return None
    names = [name_of(paper) for paper in papers]
    known = _read(SHIPPED)
    if any(name not in known for name in names):
        kept = _read(folder() / FILE)
        missing = [place for place, name in enumerate(names) if name not in known and name not in kept]
        if missing:
            made = encoder.encoder().vectors([_whole(papers[place]) for place in missing], report)
            kept |= {names[place]: row for place, row in zip(missing, made.astype(np.float16), strict=True)}
            with contextlib.suppress(OSError):  # a cache that cannot be kept is computed again
                _write(folder() / FILE, kept)
        known |= kept
    found = np.stack([known[name] for name in names]).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def ship() -> None:
    """Write the vectors of the catalogue beside it."""
    papers = list(catalogue().values())
    made = encoder.encoder().vectors([_whole(paper) for paper in papers], lambda done, total: print(f"\r{done} of {total}", end="", flush=True))
    _write(SHIPPED, {name_of(paper): row for paper, row in zip(papers, made.astype(np.float16), strict=True)})


def name_of(paper: Paper) -> str:
    """What a paper's vector is kept under: it is that of its text alone."""
    return digest((paper.title, text_of(paper)))[:32]


def _whole(paper: Paper) -> str:
    return f"{paper.title}. {text_of(paper)}"


def index(papers: Sequence[Paper], report: Callable[[int, int], None] = lambda done, total: None) -> Index:
    """The papers, ready to be searched by words and, where the encoder is installed, by meaning."""
    return Index(papers, of(papers, report), folder())


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
        return {bytes(name).hex(): row for name, row in zip(tensors["names"], tensors["vectors"], strict=True)}
    except (OSError, SafetensorError, KeyError, ValueError):  # no cache, or none of ours: it is made anew
        return {}


def _write(path: Path, known: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save

    tensors = {"names": np.array([list(bytes.fromhex(name)) for name in known], np.uint8), "vectors": np.stack(list(known.values()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(save(tensors))
    aside.replace(path)
