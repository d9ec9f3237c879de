"""What a step may cost that never ran here: by the roofline of its model on this machine (`etude.engine.roofline`).

No weights are loaded, and torch only to measure the machine, once: shapes come from the headers of checkpoints, dimensions from configs.
What a method does is known from the names of its fields, which mean the same in all methods.
"""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etude.engine import score, train
from etude.engine.roofline import Layout, Machine, Pass, Prediction, between, layout_from, predict
from etude.study.environment import environment
from etude.study.plan import Node
from etude.study.source import code_digest
from etude.study.store import Store, write_atomically, writing
from etude.values.corpus import Corpus, bytes_of
from etude.values.digest import digest
from etude.values.model import Model

LOGITS = 3 * 4 * (1 << 22)
"""Bytes of a chunk of logits, its softmax and its gradient (`engine/losses.py`)."""
SOFTMAX = 4
"""Numbers a logit that scoring moves beside the head: logits are gathered, read, and written as logarithms, of which one is read."""
BACKWARD = 2
"""A backward pass has twice the products of a forward one (Kaplan et al., 2020, section 2.1)."""
OPTIMIZER = 10
"""Numbers a parameter that a step of AdamW moves: gradients are cleared, normed and clipped; weights, gradients and two moments are read, three of them written."""
HELD = 5
"""Numbers a parameter that training holds: the model, its copy, gradients, and two moments."""
SAMPLED, CHARACTERS, BYTES_A_TOKEN = 12, 8192, 4.0
"""Documents of a corpus that are encoded, and how much of each, to know its tokens a byte; bytes of a token where there is no tokenizer."""
MOST = 10_000
"""Documents whose sizes stand for those of a larger corpus."""
DIMENSIONS = ("hidden_size", "blocks", "heads", "key_value_heads", "intermediate_size", "vocabulary")


class Sizes(NamedTuple):
    """Documents of a corpus in tokens, and how long it takes to encode them."""

    tokens: list[int]
    """Of some documents; they stand for all of them."""
    documents: int
    """Of all documents."""
    seconds: float
    """To encode all documents."""


class Foreteller:
    """Estimates for the nodes of one plan."""

    def __init__(self, store: Store):
        self._store = store
        self._machine: Machine | None = None
        self._layouts: dict[str, tuple[Layout | None, Path | None]] = {}
        self._sizes: dict[tuple[str, Path | None, int | None], Sizes | None] = {}
        self._predictions: dict[tuple[int, Pass], Prediction] = {}

    def of(self, node: Node) -> tuple[float, float] | None:
        """Seconds and peak bytes of the process; None for what the roofline does not know.

        It knows training on a budget, and measures that have fields `prompt` and `new`, `window` and `stride`, or `length`, `batch` and `rounds`.
        """
        names = getattr(node.method, "__dataclass_fields__", {}).keys()
        known: Callable[[Node], tuple[float, float] | None] | None = None
        if node.budget is not None:
            known = self._training
        elif node.kind == "measure" and {"prompt", "new", "rounds"} <= names:
            known = self._generating
        elif node.kind == "measure" and {"window", "stride"} <= names:
            known = self._scoring
        elif node.kind == "measure" and {"length", "batch", "rounds"} <= names:
            known = self._reading
        return known(node) if known else None

    # Kinds of work.

    def _training(self, node: Node) -> tuple[float, float] | None:
        layout, _ = self._model(node)
        assert node.budget is not None
        if layout is None:
            return None
        method: Any = node.method
        length = getattr(method, "length", 512)
        batch_tokens = getattr(method, "batch_tokens", 8192)
        rows = max(1, (train.MICRO_TOKENS["cpu"] if layout.parameters < train.LARGE else train.LARGE_MICRO_TOKENS) // length)
        one = self._predict(layout, Pass(rows, length, logits=length))
        bytes_moved = OPTIMIZER * 4.0 * layout.parameters
        step = batch_tokens / (rows * length) * (1 + BACKWARD) * one.seconds + bytes_moved / between(self.machine.streams, bytes_moved)
        steps = {"tokens": 1 / batch_tokens, "steps": 1.0, "flops": rows * length / ((1 + BACKWARD) * one.operations * batch_tokens), "seconds": 1 / step}
        kept = sum(part.operator.activations / 2 for part in one.timed if part.operator.kind != "head")
        # even a budget that ends early takes a whole step
        count = math.ceil(node.budget.amount * steps[node.budget.unit]) if node.budget.unit != "seconds" else node.budget.amount / step
        return count * step, self.machine.resident + HELD * 4.0 * layout.parameters + kept + LOGITS

    def _generating(self, node: Node) -> tuple[float, float] | None:
        method: Any = node.method
        batch, new, runs = getattr(method, "batch", 1), method.new, (method.rounds + 1) * getattr(method, "repeats", 1)
        seconds, peak = 0.0, 0.0
        grid = [(1 << power, method.prompt >> halved) for power in range(batch.bit_length()) for halved in range(method.prompts)] if hasattr(method, "prompts") else [(batch, method.prompt)]
        for layout, _ in self._models(node):
            if layout is None:
                return None
            for rows, prompt in grid:
                first = self._predict(layout, Pass(rows, prompt, logits=1 if "batch" in method.__dataclass_fields__ else prompt, appended=True))
                further = self._predict(layout, Pass(rows, 1, prompt + new // 2, appended=True))
                seconds += runs * (first.seconds + new * further.seconds)
                peak = max(peak, first.peak_bytes)
        return (seconds, self.machine.resident + peak) if seconds else None

    def _scoring(self, node: Node) -> tuple[float, float] | None:
        layout, folder = self._model(node)
        method: Any = node.method
        sizes = self._corpus(node, folder, getattr(method, "tokens", None))
        if layout is None or sizes is None:
            return None
        window, stride = method.window, method.stride
        read = [tokens if tokens <= window else window + math.ceil((tokens - window) / stride) * window for tokens in sizes.tokens]
        typical = max(2, min(window, round(sum(min(tokens, window) for tokens in sizes.tokens) / len(sizes.tokens))))
        rows = max(1, score.row_tokens("cpu", layout.parameters) // typical)
        one = self._predict(layout, Pass(rows, typical, logits=typical))
        passes = sum(read) / len(read) * sizes.documents / (rows * typical)
        softmax = SOFTMAX * 4.0 * layout.head.outputs * sum(sizes.tokens) / len(sizes.tokens) * sizes.documents / between(self.machine.streams, LOGITS)
        return passes * one.seconds + softmax + sizes.seconds, self.machine.resident + one.peak_bytes + LOGITS

    def _reading(self, node: Node) -> tuple[float, float] | None:
        layout, _ = self._model(node)
        if layout is None:
            return None
        method: Any = node.method
        one = self._predict(layout, Pass(method.batch, method.length, logits=method.length))
        return (method.rounds + 1) * one.seconds, self.machine.resident + one.peak_bytes

    def _predict(self, layout: Layout, one: Pass) -> Prediction:
        key = (id(layout), one)  # layouts live as long as this object
        if key not in self._predictions:
            self._predictions[key] = predict(layout, one, self.machine)
        return self._predictions[key]

    # Models.

    def _model(self, node: Node) -> tuple[Layout | None, Path | None]:
        return next(self._models(node), (None, None))

    def _models(self, node: Node) -> Iterator[tuple[Layout | None, Path | None]]:
        """Layouts of a node's models, with the folders that have their tokenizers."""
        for parents in node.inputs.values():
            for parent in parents:
                if issubclass(parent.output, Model):
                    yield self._layout(parent)

    def _layout(self, node: Node) -> tuple[Layout | None, Path | None]:
        """Of a node that gives a model: from its folder, else from its method's dimensions, else that of what it is made from, cuts not seen."""
        if node.key not in self._layouts:
            found: tuple[Layout | None, Path | None]
            folder = node.value._folder if isinstance(node.value, Model) else self._store.path(node.key) if self._store.has(node.key) else None
            if folder is not None:
                found = read_layout(folder), folder
            elif node.method is not None and all(hasattr(node.method, name) for name in DIMENSIONS):
                found = described(node.method), None
            else:
                found = self._model(node)
            self._layouts[node.key] = found
        return self._layouts[node.key]

    # Corpora.

    def _corpus(self, node: Node, folder: Path | None, limit: int | None) -> Sizes | None:
        parent = next((parent for parents in node.inputs.values() for parent in parents if issubclass(parent.output, Corpus)), None)
        if parent is None:
            return None
        key = (parent.key, folder, limit)
        if key not in self._sizes:
            self._sizes[key] = self._read_corpus(parent, folder, limit)
        return self._sizes[key]

    def _read_corpus(self, node: Node, folder: Path | None, limit: int | None) -> Sizes | None:
        """Of a corpus that is given, or of what it is made from, with as many records as a method on the way takes."""
        if isinstance(node.value, Corpus):
            if "text" not in node.value.columns:
                return None
            texts = node.value.texts
            sizes = [bytes_of([text]) for text in texts[:: max(1, len(texts) // MOST)]]
            if not any(sizes):
                return None
            tokens, seconds = _a_byte([text[:CHARACTERS] for text in texts[:: math.ceil(len(texts) / SAMPLED)] if text], folder)
            counts = [round(size * tokens) for size in sizes]
            return Sizes([min(count, limit or count) + 1 for count in counts], len(texts), seconds * sum(sizes) * len(texts) / len(sizes))
        found = self._corpus(node, folder, limit)
        records = getattr(node.method, "records", None)
        if found is None or not isinstance(records, int) or records >= found.documents:
            return found
        return Sizes(found.tokens, records, found.seconds * records / found.documents)

    # The machine.

    @property
    def machine(self) -> Machine:
        """What this machine can do: as it was measured when this store first asked, else measured now."""
        if self._machine is None:
            path = self._store.root / f"machine-{self._identity()}.json"
            try:
                self._machine = Machine.from_data(json.loads(path.read_text(encoding="utf8")))
            except (OSError, ValueError, KeyError, TypeError):
                from etude.engine.calibrate import calibrate

                self._machine = calibrate()
                with writing(self._store.root):
                    write_atomically(path, json.dumps(self._machine.as_data(), indent=1) + "\n")
        return self._machine

    def _identity(self) -> str:
        """Digest of the machine, of the versions that matter, of the threads, and of what measures them."""
        versions = {name: environment().get(name) for name in ("system", "cores", "torch", "transformers")}
        threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        return digest(_processor(), versions, threads, code_digest("etude.engine.calibrate"))[:12]


def _processor() -> str:
    """The processor's name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _a_byte(texts: list[str], folder: Path | None) -> tuple[float, float]:
    """Tokens a byte, and seconds to encode one, by the folder's fast tokenizer if it has one."""
    path = folder / "tokenizer.json" if folder else None
    if path is None or not path.exists():
        return 1 / BYTES_A_TOKEN, 0.0
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    start = time.perf_counter()
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    return tokens / bytes_of(texts), (time.perf_counter() - start) / bytes_of(texts)


def read_layout(folder: Path) -> Layout | None:
    """A checkpoint's layout from its config and the headers of its safetensors; None where they cannot be read or do not say."""
    shapes: dict[str, list[int]] = {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            shapes |= {name: part["shape"] for name, part in header.items() if name != "__metadata__"}
        return layout_from(shapes, config)
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None


def described(method: Any) -> Layout | None:
    """The layout of a fresh network from the dimensions that a method names: a Llama's, with tied embeddings."""
    if getattr(method, "kind", "causal") == "seq2seq":
        return None
    width, head_dim = method.hidden_size, method.hidden_size // method.heads
    matrices: dict[str, tuple[int, ...]] = {"q": (width, width), "k": (method.key_value_heads * head_dim, width), "v": (method.key_value_heads * head_dim, width), "o": (width, width)}
    matrices |= {"gate": (method.intermediate_size, width), "up": (method.intermediate_size, width), "down": (width, method.intermediate_size), "before": (width,), "after": (width,)}
    shapes = {f"layers.{block}.{name}.weight": shape for block in range(method.blocks) for name, shape in matrices.items()}
    config = {"hidden_size": width, "num_attention_heads": method.heads, "num_key_value_heads": method.key_value_heads, "intermediate_size": method.intermediate_size, "vocab_size": method.vocabulary}
    return layout_from({"embed.weight": (method.vocabulary, width), "norm.weight": (width,), **shapes}, config)
