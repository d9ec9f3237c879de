"""A generator: prompt in, completion out."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from etude.values.digest import digest
from etude.values.errors import InputError
from etude.values.model import Model

POLICY = "generator.json"


@dataclass(frozen=True)
class Policy:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the most probable token; above, samples from the distribution at this temperature."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens that has this probability, in (0, 1]."""
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    """Strings at which a completion ends; they are not part of it."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise ValueError(f"a policy has temperature >= 0, 0 < top_p <= 1 and max_new_tokens >= 1, got {self}")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is a tuple of strings that are not empty, got {self.stop!r}")


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible completion server."""

    url: str
    """Base address, as in ``http://localhost:8000/v1``."""
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never stored."""

    @property
    def key(self) -> str | None:
        return os.environ.get(self.key_variable)


@dataclass(frozen=True, eq=False)
class Generator:
    """A model, or an endpoint, with the policy by which it decodes.  `etude.engine.generate` runs it."""

    source: Model | Endpoint
    policy: Policy = Policy()

    @property
    def digest(self) -> str:
        source = self.source.digest if isinstance(self.source, Model) else self.source
        return digest(source, self.policy)

    def save(self, folder: str | Path) -> None:
        """Write the policy, and the model beside it or the endpoint's address."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        endpoint = None if isinstance(self.source, Model) else dataclasses.asdict(self.source)
        if isinstance(self.source, Model):
            self.source.save(folder)
        (folder / POLICY).write_text(json.dumps({"policy": dataclasses.asdict(self.policy), "endpoint": endpoint}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Generator:
        """Read a generator back.  Raises InputError if the folder holds none."""
        folder = Path(folder)
        if not (folder / POLICY).exists():
            raise InputError(f"{folder} holds no {POLICY}", remedy="Load a plain checkpoint with Model.load, and give it a policy.")
        data = json.loads((folder / POLICY).read_text())
        policy = Policy(**{**data["policy"], "stop": tuple(data["policy"]["stop"])})
        return cls(Endpoint(**data["endpoint"]) if data["endpoint"] else Model.load(folder), policy)
