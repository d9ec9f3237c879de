"""Modules that are imported when they are first used.

`import torch` takes a second or two; a study that is all in the store, and every `--help`, can do without it.
"""

from __future__ import annotations

import importlib
from typing import Any


class lazy:  # noqa: N801, reads like the import statement that it stands for
    """Stands for a module until something of it is asked for: ``torch = lazy("torch")``."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
