"""The report: one self-contained HTML file."""

from __future__ import annotations

from typing import Any


def render(results: dict[str, Any]) -> str:
    """The report of some results as HTML."""
    return "<!doctype html>"
