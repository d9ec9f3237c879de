"""Vectors of sentences from the small encoder that a package carries, without torch: a search should not wait seconds for an import.

The network is BERT's encoder (Devlin et al., 2019) in numpy, with the mean of the last states as in `worlds.minilm`, whose vectors these are within rounding.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from etude.worlds.minilm import PACKAGE

LONGEST = 256
"""Tokens of a text that are read; the encoder was trained on no more."""
TOKENS_AT_ONCE = 512


def installed() -> bool:
    """Whether the package with the encoder is there."""
    return importlib.util.find_spec(PACKAGE) is not None


@functools.cache
def encoder() -> Encoder:
    """The encoder, loaded once.  Cost: a tenth of a second."""
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None
    assert found.submodule_search_locations
    return Encoder(Path(next(iter(found.submodule_search_locations))) / "model")


class Encoder:
    """A BERT whose mean last state is the vector of a text."""

    def __init__(self, folder: Path):
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        config = json.loads((folder / "config.json").read_text())
        self.heads, self.epsilon = config["num_attention_heads"], config["layer_norm_eps"]
        self.weights = {name: np.asarray(value, np.float32) for name, value in load_file(folder / "model.safetensors").items() if value.dtype.kind == "f"}
        self.layers = [f"encoder.layer.{place}" for place in range(config["num_hidden_layers"])]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(min(LONGEST, config["max_position_embeddings"]))

    def vectors(self, texts: Sequence[str], report: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
        """A vector of length 1 a text, (texts, width) float32.  report: told how many are done, of how many."""
        rows = [np.array(encoding.ids) for encoding in self.tokenizer.encode_batch(list(texts))]
        found = np.zeros((len(rows), len(self.weights["embeddings.LayerNorm.weight"])), np.float32)
        order, done = sorted(range(len(rows)), key=lambda place: len(rows[place])), 0
        while done < len(order):
            length = len(rows[order[min(len(order), done + TOKENS_AT_ONCE // max(1, len(rows[order[done]]))) - 1]])
            chosen = order[done : done + max(1, TOKENS_AT_ONCE // length)]
            found[chosen] = self._read([rows[place] for place in chosen])
            done += len(chosen)
            report(done, len(order))
        return found

    def _read(self, rows: list[np.ndarray]) -> np.ndarray:
        """Vectors of rows of nearly one length, (rows, width)."""
        length = max(map(len, rows))
        ids = np.zeros((len(rows), length), np.int64)
        real = np.zeros((len(rows), length), np.float32)
        for place, row in enumerate(rows):
            ids[place, : len(row)], real[place, : len(row)] = row, 1
        w = self.weights
        states = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][:length] + w["embeddings.token_type_embeddings.weight"][0]
        states = self._norm(states, "embeddings.LayerNorm")
        hidden = np.where(real[:, None, None, :] > 0, np.float32(0), np.float32(-1e9))
        for layer in self.layers:
            states = self._norm(states + self._linear(self._attention(states, hidden, f"{layer}.attention.self"), f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
            wide = self._linear(states, f"{layer}.intermediate.dense")
            states = self._norm(states + self._linear(_gelu(wide), f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        mean = (states * real[..., None]).sum(1) / real.sum(1, keepdims=True)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def _attention(self, states: np.ndarray, hidden: np.ndarray, path: str) -> np.ndarray:
        count, length, width = states.shape
        split = (count, length, self.heads, width // self.heads)
        query, key, value = (self._linear(states, f"{path}.{name}").reshape(split).swapaxes(1, 2) for name in ("query", "key", "value"))
        scores = query @ key.swapaxes(2, 3) / np.float32(np.sqrt(split[-1])) + hidden
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        return ((scores / scores.sum(-1, keepdims=True)) @ value).swapaxes(1, 2).reshape(states.shape)

    def _linear(self, states: np.ndarray, path: str) -> np.ndarray:
        return states @ self.weights[f"{path}.weight"].T + self.weights[f"{path}.bias"]

    def _norm(self, states: np.ndarray, path: str) -> np.ndarray:
        centred = states - states.mean(-1, keepdims=True)
        return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + self.epsilon) * self.weights[f"{path}.weight"] + self.weights[f"{path}.bias"]


def _gelu(values: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return values * 0.5 * (1 + erf(values / np.float32(np.sqrt(2))))
