"""Make a fresh Llama with a tokenizer of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from etude.method import Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Initialize(Method):
    """Train a byte-level BPE tokenizer on the text, and draw the weights of a Llama to go with it.

    The network has the Llama architecture (Touvron et al., 2023): pre-normalisation by RMS, rotary positions, SwiGLU, grouped-query
    attention; input and output embeddings are tied.  Weights are normal with a standard deviation of 0.02, those that
    write to the residual stream narrower by the root of twice the number of blocks (Radford et al., 2019, section 2.3).
    Cost: one pass of the tokenizer's trainer over the text.
    """

    vocabulary: int = 4096
    """Tokens in the tokenizer, the 256 bytes and the end-of-text token included."""
    hidden_size: int = 192
    """Width of the residual stream."""
    blocks: int = 6
    """Number of transformer blocks."""
    heads: int = 6
    """Attention heads; the width is divided among them."""
    key_value_heads: int = 2
    """Heads of keys and values; each serves heads / key_value_heads query heads."""
    intermediate_size: int = 512
    """Channels of the feed-forward layer."""
    max_length: int = 1024
    """Longest sequence, in tokens, that the config promises."""

    def __post_init__(self) -> None:
        if self.vocabulary < 257:
            raise ValueError(f"vocabulary is at least 257, the bytes and the end of text, got {self.vocabulary}")
        if self.hidden_size % self.heads or self.heads % self.key_value_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) is a multiple of heads ({self.heads}), and heads of key_value_heads ({self.key_value_heads})")

    def apply(self, text: Corpus, seed: int) -> Model:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        if not len(text):
            raise InputError("the corpus is empty")
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=self.vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
        backend.train_from_iterator(text.texts, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size, num_hidden_layers=self.blocks,
            num_attention_heads=self.heads, num_key_value_heads=self.key_value_heads, max_position_embeddings=self.max_length,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(seed)
        network = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.div_((2 * self.blocks) ** 0.5)
        return Model(network.eval(), tokenizer)
