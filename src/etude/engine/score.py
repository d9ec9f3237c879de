"""Per-token log-probabilities over a corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from etude.engine import batch, forest, fused, losses
from etude.engine.cost import flops_per_token, spend
from etude.engine.progress import report
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from etude.engine import attention
else:
    torch, attention = lazy("torch"), lazy("etude.engine.attention")

COUNTED_LENGTH = 128
"""Tokens of the pass whose operations are counted for the bill."""
ROW_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens that are computed at once, where logits are made a chunk at a time."""
LARGE, LARGE_ROW_TOKENS = 10_000_000, 2048
"""Parameters from which a processor takes fewer at once: as fast, in less memory."""
LOGIT_ELEMENTS = 1 << 26
"""At most so many logits at once: 256 MiB in float32."""


def batch_tokens(model: Model, most: int = 8192) -> int:
    """How many tokens fit into one forward pass."""
    return max(64, min(most, LOGIT_ELEMENTS // int(model.config.get_text_config().vocab_size)))


def row_tokens(device: str, parameters: int) -> int:
    """How many tokens are computed at once on a device, by a network with so many parameters."""
    return LARGE_ROW_TOKENS if device == "cpu" and parameters >= LARGE else ROW_TOKENS.get(device, 8192)


def require_causal(model: Model, what: str) -> None:
    """Raises InputError unless the model predicts the next token."""
    if model.kind != "causal":
        raise InputError(f"{what} needs a causal language model, and this is a {model.kind} one ({model.base.model_type})")


class Scored(NamedTuple):
    """What a model says of the tokens of a text that were not given."""

    logs: np.ndarray
    """(tokens,) float32, natural log-probabilities."""
    greedy: np.ndarray | None
    """(tokens,) bool, whether each is the most probable one; None if nobody asked."""


def likelihoods(model: Model, texts: Sequence[np.ndarray], given: Sequence[int], *, greedy: bool = False, note: str = "scoring") -> list[Scored]:
    """Log-probabilities of every text's tokens after its first `given` ones, each after all tokens before it.

    texts: token ids with their start token; given: at least 1 each.  What texts begin with in common is computed once (`forest`), wherever the
    network takes attention by pieces, and logits only where a token is predicted.  The same texts give the same bits, in whatever order they come.
    Cost: one forward pass over the different beginnings.
    """
    require_causal(model, "scoring")
    network, longest = model.network, max(map(len, texts), default=1)
    wanted = Wanted(texts, given, greedy)
    with torch.no_grad(), losses.headless(network), fused.fused(network), attention.by_piece(network, longest) as pieces:
        try:
            tokens = (_by_piece if pieces else _padded)(model, wanted, note)
        except IndexError as error:  # of a table of positions
            raise InputError(f"this {model.base.model_type} cannot read {longest} tokens at once: {error}", remedy="Set a smaller window, or give shorter texts.") from error
    spend(tokens=tokens, flops=tokens * flops_per_token(network, min(longest, COUNTED_LENGTH)))
    return wanted.found()


class Wanted:
    """Predictions that are asked for, and those that were made."""

    def __init__(self, texts: Sequence[np.ndarray], given: Sequence[int], greedy: bool):
        self.texts, self.given = texts, given
        self._begins = np.cumsum([0, *map(len, texts)])
        self._ids = np.concatenate([*texts, np.zeros(0, np.int64)])
        self._logs = np.zeros(len(self._ids), np.float32)
        self._greedy = np.zeros(len(self._ids), bool) if greedy else None

    def read(self, network: PreTrainedModel, states: torch.Tensor, places: np.ndarray, wanted: np.ndarray) -> None:
        """Predict from what the network gave, (tokens, ...) logits or what a head reads; a chunk of logits at a time.

        places (reads,) of the tokens predicted from; wanted (reads, 2) as `forest.Piece` has them.
        """
        head = losses.head_of(network)
        order = np.argsort(places, kind="stable")
        at = self._begins[wanted[order, 0]] + wanted[order, 1]
        rows, index = np.unique(places[order], return_inverse=True)
        chosen = torch.from_numpy(rows).to(states.device)
        size = max(1, losses.CHUNK_ELEMENTS // (states.shape[-1] if head is None else head.weight.shape[0]))
        for begin in range(0, len(rows), size):
            scores = states[chosen[begin : begin + size]]
            if head is not None:
                scores = torch.nn.functional.linear(scores, head.weight, head.bias)
            some = slice(*np.searchsorted(index, [begin, begin + size]))
            row, token = (torch.from_numpy(one).to(scores.device) for one in (index[some] - begin, self._ids[at[some]]))
            scores = scores.float()
            self._logs[at[some]] = scores.log_softmax(1)[row, token].cpu().numpy()
            if self._greedy is not None:
                self._greedy[at[some]] = (scores.argmax(1)[row] == token).cpu().numpy()

    def found(self) -> list[Scored]:
        """Of every text's tokens after those given."""
        return self.at([np.arange(given, len(text)) for given, text in zip(self.given, self.texts, strict=True)])

    def at(self, places: Sequence[np.ndarray]) -> list[Scored]:
        """Of these tokens of every text."""
        chosen = [begin + some for begin, some in zip(self._begins, places, strict=False)]
        return [Scored(self._logs[some], None if self._greedy is None else self._greedy[some]) for some in chosen]


def _by_piece(model: Model, wanted: Wanted, note: str) -> int:
    """Along the trunk and its pieces; the tokens that were computed."""
    network, root, done = model.network, forest.plan(wanted.texts, wanted.given), 0
    total, most = root.tokens, row_tokens(network.device.type, network.num_parameters())
    if losses.head_of(network) is None:
        most = batch_tokens(model, most)
    waiting = [(root, attention.Trunk())]

    def go(row: list[forest.Piece], trunk: attention.Trunk, grow: bool = False) -> None:
        nonlocal done
        states, whole = attention.forward(network, row, trunk, grow), forest.side_by_side(row)
        wanted.read(network, states, whole.places, whole.wanted)
        done += len(whole.ids)
        report(note, done, total)

    while waiting:
        branch, trunk = waiting.pop()
        if branch.run is not None:
            trunk = trunk.copied()
            go([branch.run], trunk, grow=True)
        for row in forest.rows(branch.pieces, most):
            go(row, trunk)
        waiting += [(one, trunk) for one in reversed(branch.branches)]
    return done


def _padded(model: Model, wanted: Wanted, note: str) -> int:
    """Each text by itself, padded to the longest of its batch; the tokens that were computed."""
    network, lengths = model.network, [len(text) for text in wanted.texts]
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], wanted.texts[index].tobytes()))
    done = 0
    for group in batch.by_length([lengths[index] for index in order], batch_tokens(model)):
        chosen = [order[place] for place in group]
        width = lengths[chosen[0]]
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        for row, index in enumerate(chosen):
            ids[row, : lengths[index]] = torch.from_numpy(wanted.texts[index])
        states = network(input_ids=ids.to(network.device), use_cache=False).logits.flatten(0, 1)
        asked = [np.arange(wanted.given[index], lengths[index]) for index in chosen]
        places = np.concatenate([row * width + one - 1 for row, one in enumerate(asked)])
        wanted.read(network, states, places, np.stack([np.repeat(chosen, [len(one) for one in asked]), np.concatenate(asked)], 1))
        done += sum(lengths[index] for index in chosen)
        report(note, done, sum(lengths))
    return done


def log_probabilities(model: Model, documents: Sequence[np.ndarray], *, window: int = 512, stride: int = 256) -> list[np.ndarray]:
    """Natural log-probability of every token after a document's first, float32, one array a document.

    documents: token ids with their start token.  Long ones are covered by overlapping windows: each token after the first
    window has at least `window - stride` tokens before it.  Cost: about window / stride forward passes over the tokens.
    """
    require_causal(model, "scoring")
    parts = batch.windows([len(document) for document in documents], window, stride)
    found = likelihoods(model, [documents[part.document][part.start : part.stop] for part in parts], [part.scored - part.start for part in parts])
    scores = [np.zeros(len(document) - 1, np.float32) for document in documents]
    for part, scored in zip(parts, found, strict=True):
        scores[part.document][part.scored - 1 : part.stop - 1] = scored.logs
    return scores


def mean_loss(model: Model, documents: Sequence[np.ndarray], *, window: int = 512) -> float:
    """Mean negative log-likelihood a token, in nats."""
    scores = log_probabilities(model, documents, window=window, stride=window - 1)
    return -float(np.concatenate(scores).mean(dtype=np.float64))


def sample_rows(model: Model, corpus: Corpus, tokens: int, length: int) -> list[np.ndarray]:
    """The first `tokens` tokens of a corpus in rows of at most `length`, each with its start token: a calibration set."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not 2 < length <= (most or length):
        raise InputError(f"a calibration row has 3 to {most or 'any number of'} tokens for this model, got {length}", remedy="Set `length` of the method.")
    rows: list[np.ndarray] = []
    left = tokens
    for record in range(len(corpus)):
        (document,) = batch.encode(model, corpus[record : record + 1])
        for begin in range(1, len(document), length - 1):
            part = document[begin : begin + min(length - 1, left)]
            if left <= 0 or len(part) < 2:
                break
            rows.append(np.concatenate([document[:1], part]))
            left -= len(part)
        if left <= 0:
            break
    return rows


def block_changes(model: Model, rows: Sequence[np.ndarray]) -> np.ndarray:
    """How far each block turns the residual stream: one minus the cosine of its input and output, averaged over tokens.

    rows: token ids, each at most as long as the model reads.  Returns (blocks,), float64.  Cost: one forward pass over the rows.
    """
    require_causal(model, "measuring blocks")
    network = model.network
    blocks = [network.get_submodule(f"{stack}.{place}") for stack, count in model.anatomy.stacks.items() for place in range(count)]
    sums, counted = np.zeros(len(blocks)), 0
    real: torch.Tensor

    def watch(index: int):  # type: ignore[no-untyped-def]
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, torch.Tensor) else output[0]
            sums[index] += (1 - torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1))[real].sum().item()

        return hook

    handles = [block.register_forward_hook(watch(index), with_kwargs=True) for index, block in enumerate(blocks)]
    try:
        for ids, real in padded_batches(model, rows):
            with torch.no_grad():
                network(input_ids=ids, use_cache=False)
            counted += int(real.sum())
            report("measuring blocks", counted, sum(map(len, rows)))
    finally:
        for handle in handles:
            handle.remove()
    spend(tokens=counted, flops=counted * flops_per_token(network, COUNTED_LENGTH))
    return sums / counted


def padded_batches(model: Model, rows: Sequence[np.ndarray], tokens: int = 8192) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows in batches of like length and at most so many tokens on the model's device: ids, and which of them are real; a causal model's real tokens never see the padding."""
    for group in batch.by_length([len(row) for row in rows], batch_tokens(model, tokens)):
        ids = torch.zeros(len(group), len(rows[group[0]]), dtype=torch.long)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for place, index in enumerate(group):
            ids[place, : len(rows[index])] = torch.from_numpy(rows[index])
            real[place, : len(rows[index])] = True
        yield ids.to(model.network.device), real.to(model.network.device)
