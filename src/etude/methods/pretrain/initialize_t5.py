"""Make a fresh T5 whose weights suit Adam and Muon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from etude.method import Method
from etude.methods.pretrain.initialize import SENTINELS, Initialize
from etude.values.corpus import Corpus
from etude.values.model import Model

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class InitializeT5(Method):
    """Train a tokenizer with sentinels on the text, and draw the weights of a T5 in the sizes that Adam and Muon move well.

    T5 (Raffel et al., 2020, with the gated feed-forward layers of Shazeer, 2020) draws embeddings of standard deviation 1, and queries so small that their products with keys
    need no scale, for Adafactor, whose steps are in proportion to what they change.  Steps of one size move such embeddings too slowly and such queries too fast.
    Here embeddings (vocabulary, width) have a standard deviation of 0.05 and are read out unscaled; matrices (out, in) have 0.02, those that write to the residual stream narrower by
    the root of twice the number of blocks (Radford et al., 2019, section 2.3).  The norms (width) before attention begin where products of queries and keys come out
    divided by the root of a head's width, as elsewhere.  Two things begin where learning would bring them: in cross-attention keys equal queries, so that a sentinel in the target finds the
    same one in the source; and position biases (buckets, heads) fall with the distance (Press et al., 2022), in the encoder's heads by turns to the left and to the right.
    The architecture is T5's, and any code that reads T5 reads the checkpoint; `pretrain.initialize` draws as T5 does.
    Cost: one pass of the tokenizer's trainer over the text.
    """

    vocabulary: int = 4096
    """Tokens in the tokenizer, the 256 bytes, the end of text, padding and 32 sentinels included."""
    hidden_size: int = 192
    """Width of the residual stream."""
    blocks: int = 3
    """Number of transformer blocks of each stack."""
    heads: int = 6
    """Attention heads; the width is divided among them."""
    intermediate_size: int = 384
    """Channels of the feed-forward layer."""

    def __post_init__(self) -> None:
        least = 256 + 2 + SENTINELS
        if self.vocabulary < least:
            raise ValueError(f"vocabulary is at least {least}, the bytes, the end of text, padding and the sentinels, got {self.vocabulary}")
        self._plain()

    def apply(self, text: Corpus, seed: int) -> Model:
        model = self._plain().apply(text, seed)
        network: Any = model.network
        network.config.scale_decoder_outputs = False
        with torch.no_grad():
            self._draw(network)
        return Model(network, model.tokenizer)

    def _plain(self) -> Initialize:
        return Initialize(kind="seq2seq", vocabulary=self.vocabulary, hidden_size=self.hidden_size, blocks=self.blocks, heads=self.heads, key_value_heads=1, intermediate_size=self.intermediate_size)

    def _draw(self, network: Any) -> None:
        width = self.hidden_size // self.heads
        for name, parameter in network.named_parameters():
            if name == "shared.weight":
                parameter.normal_(0, 0.05)
            elif parameter.ndim == 2 and "relative_attention_bias" not in name:
                writes = name.endswith((".o.weight", ".wo.weight"))
                parameter.normal_(0, 0.02 / (2 * self.blocks) ** 0.5 if writes else 0.02)
        for stack in (network.encoder, network.decoder):
            for block in stack.block:
                block.layer[0].layer_norm.weight.fill_(width**-0.25)  # of queries and of keys
                block.layer[0].SelfAttention.v.weight.mul_(width**0.25)
                if stack is network.decoder:
                    block.layer[1].layer_norm.weight.fill_(width**-0.5)  # of queries alone
                    cross = block.layer[1].EncDecAttention
                    cross.k.weight.copy_(cross.q.weight.normal_(0, self.hidden_size**-0.5))
            attention = stack.block[0].layer[0].SelfAttention
            attention.relative_attention_bias.weight.copy_(self._nearness(attention, two_sided=stack is network.encoder))

    def _nearness(self, attention: Any, two_sided: bool) -> Tensor:
        """Position biases, (buckets, heads): minus a slope times the mean distance in a bucket; in a two-sided stack even heads look left, odd ones right."""
        farthest, count = 2 * attention.relative_attention_max_distance, attention.relative_attention_num_buckets
        distances = torch.arange(-farthest, farthest + 1 if two_sided else 1)
        buckets = attention._relative_position_bucket(distances, bidirectional=two_sided, num_buckets=count, max_distance=attention.relative_attention_max_distance)
        sums, sizes = torch.zeros(count).index_add(0, buckets, distances.float()), torch.bincount(buckets, minlength=count)
        mean = (sums / sizes.clamp(min=1))[:, None]
        head = torch.arange(self.heads)
        if not two_sided:
            return -mean.abs() * 2.0 ** -(head * 6 / self.heads)
        slope, looks = 4.0 ** -((head // 2) % 3), 2 * (head % 2) - 1
        return -mean.abs() * slope - 3.0 * (mean.sign() == -looks)
