"""Small networks that read bytes, English sentences for them, and what their layers read of those."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import architectures
import numpy as np
import tokenizers
import torch
import transformers as t

from etude.values import checkpoint
from etude.values.corpus import Corpus
from etude.values.model import Model

END = 256
"""The token that begins and ends a text; those below it are bytes."""

SENTENCES = [
    "The tide went out before dawn.",
    "Nobody had told the baker that the mill was closed for the winter.",
    "Two crows.",
    "She counted the steps, then counted them again.",
    "In the valley the snow stays until May, and the road with it.",
    "A clock that stands still is right twice a day; this one ran backwards.",
    "He wrote to the harbour master about the missing rope.",
    "Rain, mostly.",
]


def corpus() -> Corpus:
    return Corpus(SENTENCES)


def tokenizer() -> t.PreTrainedTokenizerFast:
    """A token a byte, and one that begins and ends a text."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return t.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>")


def reader(name: str, blocks: int | None = None, width: int | None = None) -> Model:
    """A fresh draft of the small network of this architecture, with a vocabulary of bytes and its tokenizer."""
    config = copy.deepcopy(architectures.small(name).base)
    config.vocab_size = END + 1
    config.bos_token_id = config.eos_token_id = END
    if width is not None:
        config.hidden_size = width
    if blocks is not None:
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[index % len(config.layer_types)] for index in range(blocks)]
    torch.manual_seed(1)
    network = checkpoint.network_class(config)(config).eval()
    with torch.no_grad():  # larger weights than at initialisation, so that every part of the network matters
        for key, parameter in network.named_parameters():
            if parameter.ndim > 1 and "embed" not in key:
                parameter.mul_(4.0)
            elif key.endswith("bias"):
                parameter.normal_(std=0.1)
    return Model(network, tokenizer())


def rows(length: int, tokens: int = 1 << 20) -> list[list[int]]:
    """The sentences as calibration rows, spelt out by hand: each part of a text after the start token, until the tokens are used up."""
    vocabulary = tokenizer().get_vocab()
    letters = {byte: vocabulary[letter] for byte, letter in enumerate_bytes().items()}
    found = []
    for sentence in SENTENCES:
        ids = [letters[byte] for byte in sentence.encode()]
        for begin in range(0, len(ids), length - 1):
            part = ids[begin : begin + length - 1][:tokens]
            if len(part) < 2:
                break
            found.append([END, *part])
            tokens -= len(part)
    return found


def enumerate_bytes() -> dict[int, str]:
    """The letter by which GPT-2's byte-level tokenizer writes each byte: printable ones themselves, the others 256 upwards in turn."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}


TOKENS, LENGTH = 200, 40
ROWS = rows(LENGTH, TOKENS)
"""What a method with these `tokens` and this `length` reads of the sentences."""


def matrix(module: torch.nn.Module) -> np.ndarray:
    """Weight as (output, input)."""
    weight = module.weight.detach().numpy()
    return weight if isinstance(module, torch.nn.Linear) else weight.T


def linear_layers(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {path: part for path, part in module.named_modules() if isinstance(part, torch.nn.Linear) or type(part).__name__ == "Conv1D"}


@contextmanager
def read_by(network: torch.nn.Module, paths: list[str]):
    """Collects what these layers read in the forward passes inside, by path, a list of (tokens, channels)."""
    seen: dict[str, list[np.ndarray]] = {path: [] for path in paths}
    hooks = [network.get_submodule(path).register_forward_pre_hook(lambda module, args, path=path: seen[path].append(args[0].reshape(-1, args[0].shape[-1]).numpy().copy())) for path in paths]
    yield seen
    for hook in hooks:
        hook.remove()


def inputs_of(network: torch.nn.Module, paths: list[str]) -> dict[str, np.ndarray]:
    """The same, (tokens, channels) by path, for every row of ROWS alone: no batch, no padding."""
    with read_by(network, paths) as seen, torch.no_grad():
        for row in ROWS:
            network(input_ids=torch.tensor([row]), use_cache=False)
    return {path: np.concatenate(parts).astype(np.float64) for path, parts in seen.items()}


def quiet(name: str) -> Model:
    """A model in whose first and last block one group of heads, or one head where all share their keys, says little."""
    model = reader(name)
    for block in (model.anatomy.blocks[0], model.anatomy.blocks[-1]):
        groups = block.attention.groups
        heads = groups[-1] if len(groups) > 1 else (1,)
        matrix(model.network.get_submodule(block.attention.output))[:, [head * block.attention.head_dim + i for head in heads for i in range(block.attention.head_dim)]] *= 0.1
    return model
