"""Keep the rows of the embeddings that a corpus uses, and give the model a tokenizer of these tokens alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from etude.engine import vocabulary
from etude.method import Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

COLUMNS = ("text", "prompt", "completion", "choices", "chosen", "rejected")
AT_ONCE = 1024
"""Texts that are encoded together."""


@dataclass(frozen=True)
class DynamicEmbeddingPruning(Method):
    """Drop the rows (tokens, width) of the embeddings, and of a head, whose tokens do not occur in the corpus of the task.

    What comes out is an ordinary smaller checkpoint: the kept tokens are numbered anew in their old order, in the weights, the config and the tokenizer.  A text of kept
    tokens is encoded to the same pieces and gets the same logits for these; of a head's softmax the mass of the dropped tokens goes to the others.
    Any other text is spelt in smaller pieces.  After training, `compress.restore_embedding` writes the rows back into the full model.
    Source: Williams and Aletras, "Frustratingly Simple Memory Efficiency for Pre-trained Language Models via Dynamic Embedding Pruning", 2023 (arXiv 2309.08708), section 4, and the authors' code.
    Departures: the authors keep the tokenizer and renumber its ids on the way to a model that ends in a classifier, and let other rows in when they are asked for; here the tokenizer
    itself changes, so that any tool can use the model.  Therefore the tokens with which any text can be spelt (bytes or single characters, for BPE the parts of kept merges too)
    stay beside the corpus's and the special ones; and the head of a language model is cut with its embeddings.
    Reads the columns text; prompt, completion and choices, alone and joined; chosen and rejected.  Any kind of model; a tokenizer with a ``tokenizer.json``.
    Raises InputError if the corpus has none of these columns or nothing in them, or the tokenizer or the architecture cannot be cut.
    Removes: rows of the embeddings and of the head.
    Cost: encoding the corpus twice.
    """

    paper = "dynamic-embedding-pruning"

    def apply(self, model: Model, corpus: Corpus) -> Model:
        texts = list(dict.fromkeys(written(corpus)))
        if not any(texts):
            raise InputError(f"the corpus has no text in the columns {', '.join(COLUMNS)}")
        used = {token for ids in encoded(model, texts) for token in ids}
        tokenizer, kept = vocabulary.subset(model.tokenizer, used)
        pruned = vocabulary.narrowed(model, tokenizer, kept)
        for text, before, after in zip(texts, encoded(model, texts), encoded(pruned, texts), strict=True):
            if before != [kept[token] for token in after]:
                raise InputError(f"a tokenizer of the corpus's tokens alone would read {text[:60]!r} otherwise: the kind of this model's tokenizer cannot be cut")
        return pruned


def written(corpus: Corpus) -> Iterator[str]:
    """Every text of a corpus as methods and measures read it: a completion or a choice alone, and behind its prompt."""
    columns = {name: corpus.column(name) for name in COLUMNS if name in corpus.columns}
    for place in range(len(corpus)):
        record = {name: values[place] for name, values in columns.items()}
        prompt = record.get("prompt") or ""
        for name, value in record.items():
            for text in value if isinstance(value, list) else [value]:
                if not isinstance(text, str):
                    continue
                yield text
                if prompt and name not in ("text", "prompt"):
                    yield prompt + text


def encoded(model: Model, texts: list[str]) -> Iterator[list[int]]:
    """Token ids of every text, nothing around them."""
    for begin in range(0, len(texts), AT_ONCE):
        yield from model.tokenizer(texts[begin : begin + AT_ONCE], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
