"""Names for values: the same content always has the same digest, on every machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LENGTH = 40
"""Hexadecimal digits kept of a SHA-256: 160 bits."""


def canonical(value: Any) -> str:
    """Write a plain value as JSON in one way only: keys sorted, no spaces, dataclasses by class and fields.

    Raises TypeError for anything that has no such form.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"class": type(value).__qualname__, **fields}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no canonical form")


def digest(*parts: Any) -> str:
    """Digest of plain values, dataclasses of them, or bytes."""
    state = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else canonical(part).encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()[:LENGTH]


def digest_file(path: Path) -> str:
    """Digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:LENGTH]


def digest_files(paths: Iterable[Path], root: Path) -> str:
    """Digest of some files under root: their relative names and their bytes, in order of name."""
    return digest([[str(path.relative_to(root)), digest_file(path)] for path in sorted(paths)])
