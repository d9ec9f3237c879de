"""Small networks that read bytes, and English sentences for them."""

from __future__ import annotations

import copy

import architectures
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


def reader(name: str, blocks: int | None = None) -> Model:
    """A fresh draft of the small network of this architecture, with a vocabulary of bytes and its tokenizer."""
    config = copy.deepcopy(architectures.small(name).base)
    config.vocab_size = END + 1
    config.bos_token_id = config.eos_token_id = END
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
