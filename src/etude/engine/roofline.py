"""How long a pass through a network takes, by the roofline model: every operator is bound by arithmetic or by memory.

For each operator of every block the operations and the bytes that move are counted as functions of batch, tokens, context and bytes a number;
it attains min(peak, intensity · bandwidth) operations a second (Williams et al., 2009; for language models Yuan et al., arXiv:2402.16363,
section 2).  The machine's peak and bandwidth are measured (`etude.engine.calibrate`), both by size: small products stay under the peak, and small
sets of bytes lie in caches.  Nothing here needs torch but `layout`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from etude.values.errors import InputError

if TYPE_CHECKING:
    from etude.values.model import Model

COMPUTE, MEMORY = "compute", "memory"
NORM, SOFTMAX, ACTIVATION, ADD = 7, 5, 2, 1
"""Operations an element outside of matrix products, as LLM-Viewer (the paper's program) counts them."""
HEADS, KEY_VALUE_HEADS = ("num_attention_heads", "n_head", "num_heads"), ("num_key_value_heads", "num_kv_heads")
WIDTHS, CHANNELS = ("hidden_size", "n_embd", "d_model", "dim"), ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "ffn_hidden_size")


@dataclass(frozen=True)
class Linear:
    """A matrix product with a weight of inputs · outputs."""

    path: str
    inputs: int
    outputs: int
    bias: bool = False


@dataclass(frozen=True)
class Heads:
    """The self-attention of a block."""

    path: str
    heads: int
    key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class Layout:
    """What a network computes, as far as its cost goes."""

    width: int
    """Of the residual stream."""
    linears: tuple[Linear, ...]
    """All but the head."""
    attentions: tuple[Heads, ...]
    """One a block."""
    norms: tuple[tuple[str, int, int], ...]
    """Path, numbers a token, and parameters."""
    activations: tuple[tuple[str, int, bool], ...]
    """Path, channels a token, and whether a gate is multiplied in."""
    head: Linear
    parameters: int
    """Distinct ones: tied embeddings count once."""


@dataclass(frozen=True)
class Pass:
    """One pass: `batch` rows of `new` tokens each, after `context` tokens whose keys and values are kept.

    A prefill has no context; a decoding step has one new token.
    """

    batch: int
    new: int
    context: int = 0
    weight_bytes: float = 4
    """Bytes a number of the weights; 0.5 for four bits."""
    activation_bytes: float = 4
    cache_bytes: float = 4
    """Bytes a number of the keys and values."""
    fused: bool = True
    """Whether attention keeps its scores out of memory (FlashAttention)."""
    appended: bool = False
    """Whether the cache is copied whenever it grows, as transformers' dynamic cache is."""
    logits: int = 1
    """Tokens of each row whose logits are made: the last alone, unless all are scored."""


@dataclass(frozen=True)
class Operator:
    """One operator's work in one pass: operations, and bytes read and written."""

    name: str
    kind: str
    """``linear``, ``scores``, ``softmax``, ``values``, ``cache``, ``norm``, ``activation``, ``add``, ``embedding`` or ``head``."""
    operations: float
    weights: float
    activations: float
    cache: float = 0
    products: int = 1
    """Independent matrix products among which the operations are divided."""

    @property
    def bytes(self) -> float:
        return self.weights + self.activations + self.cache

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes if self.bytes else math.inf


def operators(layout: Layout, one: Pass) -> Iterator[Operator]:
    """Every operator of a pass, those of attention first.  A product of (m, k) and (k, n) has 2mkn operations; attention is counted unmasked, as it is computed in blocks at best."""
    tokens, size = one.batch * one.new, one.activation_bytes
    for heads in layout.attentions:
        yield from _attention(heads, one)
        stream = tokens * layout.width
        for place in ("attention", "feed-forward"):
            yield Operator(f"{heads.path}.{place} add", "add", ADD * stream, 0, 3 * stream * size)
    yield Operator("embedding", "embedding", 0, tokens * layout.width * one.weight_bytes, tokens * layout.width * size)
    for path, width, weights in layout.norms:
        yield Operator(path, "norm", NORM * tokens * width, weights * one.weight_bytes, 2 * tokens * width * size)
    for path, channels, gated in layout.activations:
        yield Operator(path, "activation", ACTIVATION * tokens * channels, 0, (2 + gated) * tokens * channels * size)
    for linear in layout.linears:
        yield _linear(linear, "linear", tokens, one)
    if layout.head.outputs:
        yield _linear(layout.head, "head", one.batch * min(one.logits, one.new), one)


def _linear(linear: Linear, kind: str, rows: int, one: Pass) -> Operator:
    weights = linear.inputs * linear.outputs + linear.bias * linear.outputs
    return Operator(linear.path, kind, 2 * rows * linear.inputs * linear.outputs, weights * one.weight_bytes, rows * (linear.inputs + linear.outputs) * one.activation_bytes)


def _attention(heads: Heads, one: Pass) -> Iterator[Operator]:
    keys, products = one.context + one.new, one.batch * heads.heads
    queries, scores = products * one.new * heads.head_dim * one.activation_bytes, products * one.new * keys
    kept = one.batch * heads.key_value_heads * heads.head_dim  # numbers of the keys of one position
    added, copied = 2 * kept * one.new, 2 * 2 * kept * one.context * one.appended
    written = 0 if one.fused else scores * one.activation_bytes
    yield Operator(f"{heads.path}.cache", "cache", 0, 0, added * one.activation_bytes, (added + copied) * one.cache_bytes)
    yield Operator(f"{heads.path}.scores", "scores", 2 * scores * heads.head_dim, 0, queries + written, kept * keys * one.cache_bytes, products)
    if not one.fused:
        yield Operator(f"{heads.path}.softmax", "softmax", SOFTMAX * scores, 0, 2 * written)
    yield Operator(f"{heads.path}.values", "values", 2 * scores * heads.head_dim, 0, queries + written, kept * keys * one.cache_bytes, products)


@dataclass(frozen=True)
class Machine:
    """What a machine can do, as (size, value) by size, interpolated between logarithms; one pair is a constant."""

    rates: tuple[tuple[float, float], ...]
    """Operations a second of matrix products, by the operations of one product."""
    bandwidths: tuple[tuple[float, float], ...]
    """Bytes a second at which weights are read, by the bytes of all that are gone over again and again."""
    streams: tuple[tuple[float, float], ...]
    """Bytes a second at which an operator on activations reads and writes, its memory still to be had from the system, by the bytes of that operator."""
    overhead: float = 0.0
    """Seconds that an operator takes beside its work."""
    start: float = 0.0
    """Seconds that a pass takes beside its operators."""
    resident: int = 0
    """Bytes of a process that has loaded torch and transformers, and no model."""

    @property
    def peak(self) -> float:
        return max(rate for _, rate in self.rates)

    @property
    def bandwidth(self) -> float:
        """Of memory proper: that of the largest set measured."""
        return self.bandwidths[-1][1]

    def as_data(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Machine:
        pairs = {name: tuple((float(size), float(value)) for size, value in data[name]) for name in ("rates", "bandwidths", "streams")}
        return cls(**pairs, overhead=float(data["overhead"]), start=float(data["start"]), resident=int(data["resident"]))


def between(pairs: Sequence[tuple[float, float]], size: float) -> float:
    """The value at a size, linear in both logarithms; constant outside of what was measured."""
    for (low, first), (high, last) in itertools.pairwise(pairs):
        if size < high:
            share = max(0.0, math.log(max(size, 1e-9) / low) / math.log(high / low))
            return first ** (1 - share) * last**share
    return pairs[-1][1]


@dataclass(frozen=True)
class Timed:
    """An operator on a machine."""

    operator: Operator
    seconds: float
    """Without the overhead."""
    bound: str
    """``compute`` or ``memory``."""

    @property
    def attained(self) -> float:
        """Operations a second."""
        return self.operator.operations / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Prediction:
    """A pass on a machine."""

    timed: tuple[Timed, ...]
    seconds: float
    """Of the whole pass, overheads included."""
    peak_bytes: float
    """Weights, keys and values, and the largest activations that one operator reads and writes."""
    operations: float = field(default=0.0)

    @property
    def memory_bound(self) -> float:
        """Share of the operators' time, without overheads, in which memory is the bound."""
        total = sum(one.seconds for one in self.timed)
        return sum(one.seconds for one in self.timed if one.bound == MEMORY) / total if total else 0.0


def predict(layout: Layout, one: Pass, machine: Machine) -> Prediction:
    """Roofline of a pass: each operator takes operations / min(peak, intensity · bandwidth) seconds, one after another.

    Weights and cache are read at the bandwidth of all of them together, since the next pass reads them again; activations move at that of their
    own size, since they were written just before.  Raises InputError unless there is a token to read.
    """
    if one.batch < 1 or one.new < 1 or one.context < 0:
        raise InputError(f"a pass reads at least one token after 0 or more, got batch {one.batch}, new {one.new}, context {one.context}")
    found = tuple(operators(layout, one))
    cache = 2 * sum(heads.key_value_heads * heads.head_dim for heads in layout.attentions) * one.batch * (one.context + one.new) * one.cache_bytes
    kept = layout.parameters * one.weight_bytes + cache
    far = between(machine.bandwidths, kept)
    timed = tuple(_timed(operator, far, machine) for operator in found)
    seconds = sum(part.seconds for part in timed) + len(timed) * machine.overhead + machine.start
    return Prediction(timed, seconds, kept + max(operator.activations for operator in found), sum(operator.operations for operator in found))


def _timed(operator: Operator, far: float, machine: Machine) -> Timed:
    compute = operator.operations / between(machine.rates, operator.operations / operator.products)
    memory = (operator.weights + operator.cache) / far + operator.activations / between(machine.streams, operator.activations)
    return Timed(operator, max(compute, memory), COMPUTE if compute >= memory else MEMORY)


# What a network is made of.


def layout(model: Model) -> Layout:
    """Read a network's operators from its modules, and the heads from its anatomy.

    Raises InputError for encoder–decoders, layers of experts, and blocks without self-attention.  Cost: tracing its blocks, once a model.
    """
    from etude.values.trace import is_linear, output_dim

    blocks, kind = model.anatomy.blocks, model.base.model_type
    if any(block.attention is None or block.cross_attention or (block.feed_forward and block.feed_forward.experts) for block in blocks):
        raise InputError(f"the roofline knows blocks of self-attention and a plain feed-forward layer; this {kind} has others")
    network: Any = model.network
    head: Any = model.anatomy.head
    embeddings: Any = model.anatomy.embeddings
    linears, norms = [], []
    width = int(embeddings.weight.shape[1])
    shared = {f"{block.path}.": block.attention for block in blocks if block.attention}
    for path, module in network.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if is_linear(module) and module is not head:
            inputs, outputs = module.weight.shape if output_dim(module) else reversed(module.weight.shape)
            linears.append(Linear(path, inputs, outputs, own.get("bias") is not None))
        elif "weight" in own and own["weight"].ndim == 1:
            attention = next((found for begin, found in shared.items() if path.startswith(begin)), None)
            norms.append((path, _norm_width(path, own["weight"].numel(), width, attention), sum(part.numel() for part in own.values())))
    activations = tuple((block.path, block.feed_forward.channels, sum(map(len, block.feed_forward.inputs.values())) > 1) for block in blocks if block.feed_forward)
    heads = tuple(Heads(block.path, block.attention.heads, block.attention.key_value_heads, block.attention.head_dim) for block in blocks if block.attention)
    last = Linear("head", head.weight.shape[1], head.weight.shape[0], getattr(head, "bias", None) is not None) if head is not None else Linear("head", width, 0)
    return Layout(width, tuple(linears), heads, tuple(norms), activations, last, model.parameters)


def _norm_width(path: str, size: int, width: int, attention: Any) -> int:
    """Numbers a token: a norm of one head's width is applied to every head of the queries, or of the keys."""
    if attention is None or size == width or size != attention.head_dim:
        return size
    return size * (attention.key_value_heads if "k" in path.rpartition(".")[2].split("_")[0] else attention.heads)


BLOCK = re.compile(r"(.*?\.\d+)\.(.+)\.weight")


def layout_from(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> Layout | None:
    """The same from the shapes in a checkpoint's header and its config alone, without torch; None where they do not say.

    shapes: by the parameter's name.  What lies in a numbered block and has two dimensions is taken for a linear layer.
    """

    def known(names: Sequence[str]) -> int | None:
        return next((int(config[name]) for name in names if isinstance(config.get(name), int)), None)

    count, width, vocabulary = known(HEADS), known(WIDTHS), known(("vocab_size",))
    more = any(".experts." in name or (len(shape) > 2 and not name.endswith("bias")) for name, shape in shapes.items())
    if not count or not width or not vocabulary or more or config.get("is_encoder_decoder"):
        return None
    channels = known(CHANNELS) or 4 * width
    heads = Heads("", count, 1 if config.get("multi_query") else known(KEY_VALUE_HEADS) or count, known(("head_dim",)) or width // count)
    blocks: dict[str, list[Linear]] = {}
    norms = []
    for name, shape in shapes.items():
        path, place = name.removesuffix(".weight"), BLOCK.fullmatch(name)
        if len(shape) == 1 and name.endswith(".weight"):
            norms.append((path, _norm_width(path, shape[0], width, heads), shape[0] * (1 + (f"{path}.bias" in shapes))))
        elif place and len(shape) == 2 and "embed" not in name:
            blocks.setdefault(place[1], []).append(Linear(path, shape[1], shape[0], f"{path}.bias" in shapes))
    return Layout(
        width, tuple(one for own in blocks.values() for one in own), tuple(dataclasses.replace(heads, path=block) for block in blocks), tuple(norms),
        tuple((block, channels, _gated(own, channels)) for block, own in blocks.items()), Linear("head", width, vocabulary), sum(map(math.prod, shapes.values())),
    )  # fmt: skip


def _gated(linears: Sequence[Linear], channels: int) -> bool:
    """Whether two projections, or one twice as wide, read the residual stream on the way to as many channels."""
    sides = [(one.inputs, one.outputs) for one in linears]
    single = sum(channels in pair for pair in sides)
    return single > 2 or (single == 1 and any(2 * channels in pair for pair in sides))
