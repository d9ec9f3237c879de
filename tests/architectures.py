"""Small networks of every architecture that the anatomy answers for."""

from __future__ import annotations

import functools

import torch
import transformers as t

from etude.values.model import Model

WIDTH, BLOCKS, HEADS, CHANNELS, VOCABULARY = 32, 3, 4, 48, 99
LLAMA_LIKE = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=CHANNELS, num_hidden_layers=BLOCKS, num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=64)
BERT_LIKE = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=CHANNELS, num_hidden_layers=BLOCKS, num_attention_heads=HEADS, max_position_embeddings=64)
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)

CONFIGS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA_LIKE, **IDS)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**LLAMA_LIKE, **IDS, use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**LLAMA_LIKE, **IDS, head_dim=16)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**LLAMA_LIKE, **IDS, head_dim=16, sliding_window=4, query_pre_attn_scalar=16)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**LLAMA_LIKE, **IDS)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**LLAMA_LIKE, **IDS)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=64, **IDS)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**BERT_LIKE, **IDS)),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=CHANNELS, num_hidden_layers=BLOCKS, num_attention_heads=HEADS, max_position_embeddings=64, word_embed_proj_dim=WIDTH, **IDS)
    ),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=HEADS, **IDS)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**LLAMA_LIKE, **IDS, num_local_experts=3, num_experts_per_tok=2)),
    "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=BLOCKS, state_size=4, **IDS)),
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**BERT_LIKE, pad_token_id=0)),
    "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**BERT_LIKE, **IDS)),
    "distilbert": lambda: t.DistilBertForMaskedLM(t.DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, hidden_dim=CHANNELS, n_layers=BLOCKS, n_heads=HEADS, max_position_embeddings=64)),
    "electra": lambda: t.ElectraForMaskedLM(t.ElectraConfig(**BERT_LIKE, embedding_size=16)),
    "deberta-v2": lambda: t.DebertaV2ForMaskedLM(
        t.DebertaV2Config(**BERT_LIKE, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True, position_buckets=8, norm_rel_ebd="layer_norm", pad_token_id=0)
    ),
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=CHANNELS, num_layers=BLOCKS, num_decoder_layers=BLOCKS, num_heads=HEADS, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    ),
    "bart": lambda: t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=BLOCKS, decoder_layers=BLOCKS, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
            encoder_ffn_dim=CHANNELS, decoder_ffn_dim=CHANNELS, max_position_embeddings=64, decoder_start_token_id=2, forced_eos_token_id=None, **IDS,
        )
    ),
}  # fmt: skip

NAMES = sorted(CONFIGS)
WITH_HEADS = [name for name in NAMES if name != "mamba"]
CAUSAL = ["falcon", "gemma2", "gpt2", "gpt_neox", "llama", "mamba", "mistral", "mixtral", "opt", "phi3", "qwen2", "qwen3"]


@functools.cache
def _network(name: str) -> t.PreTrainedModel:
    torch.manual_seed(0)
    network = CONFIGS[name]().eval()
    with torch.no_grad():  # larger weights than at initialisation, so that every part of the network matters
        for key, parameter in network.named_parameters():
            if parameter.ndim > 1 and "embed" not in key:
                parameter.mul_(4.0)
            elif key.endswith("bias"):
                parameter.normal_(std=0.1)
    return network


def small(name: str) -> Model:
    """A fresh draft of the small network of this architecture."""
    import copy

    return Model(copy.deepcopy(_network(name)))
