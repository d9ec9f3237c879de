"""The installed Python's own library as text."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from etude.method import Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError

SPLITS = ("train", "heldout", "all")
MACHINE_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "ensurepip"}
"""Folders that differ between machines with the same Python."""


@dataclass(frozen=True)
class Stdlib(Method):
    """About 30 MB of real code and English prose that every machine with Python already has, a record a module.

    A module's split follows from a hash of its path, so that it is the same on every machine with that Python; one module in ten is held
    out.  Files that are not UTF-8, or that describe the machine (`_sysconfigdata…`), are left out.  A Python that was
    packaged without its test modules holds less, and gives a corpus of another digest.
    """

    split: str = "train"
    """``train``, ``heldout`` or ``all``."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split is one of {', '.join(SPLITS)}, got {self.split!r}")

    def apply(self) -> Corpus:
        root = Path(sysconfig.get_paths()["stdlib"])
        records = []
        for name in sorted(modules(root), key=lambda name: name.split("/")):
            if self.split != "all" and (split_of(name) == "heldout") != (self.split == "heldout"):
                continue
            try:
                text = (root / name).read_bytes().decode("utf8")
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip():
                records.append({"text": text, "path": name})
        if not records:
            raise InputError(f"this Python has no library sources under {root}", remedy="Use a Python that was installed with its .py files.")
        return Corpus(records)


def modules(root: Path) -> Iterator[str]:
    """Paths of the library's source files under its folder, those aside that describe the machine."""
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in MACHINE_FOLDERS and not name.startswith("config-")]
        for name in files:
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize")):
                yield Path(folder, name).relative_to(root).as_posix()


def split_of(name: str) -> str:
    """``heldout`` for one path in ten, by the hash of its name."""
    return "heldout" if hashlib.sha256(name.encode()).digest()[0] % 10 == 0 else "train"
