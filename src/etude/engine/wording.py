"""Prompts from templates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from etude.values.errors import InputError, nearest

SLOT = re.compile(r"\{(\w+)\}")


def fill(template: str, record: Mapping[str, Any]) -> str:
    """The template with each ``{column}`` replaced by what the record has there; other braces stay as they are.

    Raises InputError with the nearest name for a column that the record lacks.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in record:
            raise InputError(f"the corpus has no column {match[1]!r}, which the template {template!r} asks for", remedy=nearest(match[1], record))
        return str(record[match[1]])

    return SLOT.sub(value, template)


def check(templates: Sequence[str]) -> None:
    """Raises ValueError if a template names no column, or one stands there twice."""
    for place, template in enumerate(templates):
        if not SLOT.search(template):
            raise ValueError(f"a template names a column in braces, as in 'Text: {{text}}', got {template!r}")
        if template in templates[:place]:
            raise ValueError(f"the template {template!r} stands there twice")
