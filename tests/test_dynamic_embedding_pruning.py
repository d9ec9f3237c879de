"""Vocabularies that are cut to what a corpus uses: every text is read by the full tokenizer and by the small one, and every network is asked for the logits of what is kept."""

from __future__ import annotations

import json
import random

import pytest
import texts
import tokenizers
import torch
import transformers as t
from architectures import NAMES, VOCABULARY, small
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from etude.engine import vocabulary
from etude.methods.compress.dynamic_embedding_pruning import DynamicEmbeddingPruning
from etude.methods.compress.restore_embedding import RestoreEmbedding
from etude.values import checkpoint
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
STRANGE = ["", " ", "\n\n\t x", "ØÅ 你好 🦀", "zqxjkv ZZZ 0123456789", "don't, won't; (can't)!", "<|end|>", "  two  spaces  ", "a" * 300]


def trained(model, trainer, pre_tokenizer, decoder=None):
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    backend.train_from_iterator(texts.SENTENCES * 3, trainer)
    return backend


def bytes_bpe():
    model = models.BPE()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<|end|>", "<|pad|>"], initial_alphabet=ALPHABET, show_progress=False)
    return trained(model, trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()), {}


def all_splits():
    """As converted from tiktoken: every pair that makes a known piece is a merge, and a word that is a piece needs none."""
    full, _ = bytes_bpe()
    vocabulary_ = full.get_vocab()
    splits = [(piece[:at], piece[at:]) for piece in sorted(vocabulary_, key=vocabulary_.get) for at in range(1, len(piece)) if {piece[:at], piece[at:]} <= vocabulary_.keys()]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary_, merges=splits, ignore_merges=True))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|pad|>", "<|later|>"])
    backend.add_tokens(["crows", "harbour"])  # known whole, and not special
    return backend, {}


def characters_bpe():
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=["<unk>", "<|end|>", "<|pad|>"], end_of_word_suffix="</w>", show_progress=False)
    return trained(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), trainer, pre_tokenizers.Whitespace(), decoders.BPEDecoder()), {"unk_token": "<unk>"}


def byte_fallback():
    """As Llama 2: characters with merges, and bytes for every character that is no piece."""
    full = trained(models.BPE(), trainers.BpeTrainer(vocab_size=200, show_progress=False), pre_tokenizers.Metaspace())
    pieces = ["<unk>", "<|end|>", "<|pad|>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(full.get_vocab(), key=full.get_vocab().get)]
    known = json.loads(full.to_str())["model"]["merges"]
    model = models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[tuple(pair) for pair in known], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens(["<unk>", "<|end|>", "<|pad|>"])
    return backend, {"unk_token": "<unk>"}


def wordpiece():
    special = ["<|pad|>", "[UNK]", "[CLS]", "<|end|>", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=180, special_tokens=special, show_progress=False)
    backend = trained(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())
    backend.post_processor = processors.BertProcessing(("<|end|>", backend.token_to_id("<|end|>")), ("[CLS]", backend.token_to_id("[CLS]")))
    return backend, {"unk_token": "[UNK]", "cls_token": "[CLS]", "mask_token": "[MASK]"}


def unigram():
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>", "<|pad|>"], unk_token="<unk>", show_progress=False)
    backend = trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())
    backend.add_special_tokens(["<|end|>"])  # one that the vocabulary model does not know
    backend.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", backend.token_to_id("<|end|>"))])
    return backend, {"unk_token": "<unk>"}


def words():
    trainer = trainers.WordLevelTrainer(vocab_size=90, special_tokens=["<unk>", "<|end|>", "<|pad|>"], show_progress=False)
    return trained(models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizers.Whitespace()), {"unk_token": "<unk>"}


KINDS = [bytes_bpe, all_splits, characters_bpe, byte_fallback, wordpiece, unigram, words]
SPELT = [bytes_bpe, all_splits, byte_fallback]
"""Those that can write any text."""


def of_kind(kind) -> t.PreTrainedTokenizerFast:
    backend, named = kind()
    return t.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|pad|>", **named)


def carrier(tokenizer, name: str = "llama") -> Model:
    """A small network for this tokenizer, with three rows more than it has tokens."""
    config = small(name).base
    config.vocab_size = len(tokenizer) + 3
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    return Model(checkpoint.network_class(config)(config).eval(), tokenizer)


def mixtures(count: int) -> list[str]:
    """Texts of the words of the sentences in other orders, whole, cut, joined and followed by marks."""
    draw, known = random.Random(0), " ".join(texts.SENTENCES).split()
    found = []
    for _ in range(count):
        some = [draw.choice(known) for _ in range(draw.randint(1, 6))]
        some = [word[: draw.randint(1, len(word))] if draw.random() < 0.3 else word for word in some]
        found.append(draw.choice([" ", " ", "", ", "]).join(some) + draw.choice(["", ".", " ", "!"]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_kept_tokens_are_read_as_before(kind, tmp_path):
    model = carrier(of_kind(kind)).frozen_now()
    full = model.tokenizer
    before = model.digest
    corpus = Corpus(texts.SENTENCES[:4])
    pruned = DynamicEmbeddingPruning()(model, corpus)
    assert model.digest == before
    tokens, part = full.convert_ids_to_tokens(range(len(full))), pruned.tokenizer
    kept = set(part.get_vocab())
    assert kept <= set(tokens)
    assert len(kept) == checkpoint.embedding_rows(pruned.network) < checkpoint.embedding_rows(model.network)
    assert sorted(part.get_vocab().values()) == list(range(len(part)))
    assert (part.eos_token, part.pad_token, part.unk_token, part.mask_token) == (full.eos_token, full.pad_token, full.unk_token, full.mask_token)
    pruned.export(tmp_path)
    again = t.AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == part.get_vocab()
    same = 0
    for text in [*corpus.texts, *mixtures(400), *STRANGE]:
        pieces = full.tokenize(text)
        assert part(text)["input_ids"] == again(text)["input_ids"]
        if set(pieces) <= kept:
            assert part.tokenize(text) == pieces
            assert full.convert_ids_to_tokens(full(text)["input_ids"]) == part.convert_ids_to_tokens(part(text)["input_ids"]), "what stands around a text has changed"
            same += 1
        elif kind in SPELT:
            assert part.decode(part(text, add_special_tokens=False)["input_ids"]) == full.decode(full(text, add_special_tokens=False)["input_ids"])
    assert same > 100
    assert all(len(full.tokenize(text)) for text in mixtures(5))


@pytest.mark.parametrize("kind", [bytes_bpe, characters_bpe, wordpiece, unigram])
def test_unseen_words_are_spelt(kind):
    """Words of the other sentences are not in the corpus: their characters are."""
    model = carrier(of_kind(kind))
    part = DynamicEmbeddingPruning()(model, Corpus(texts.SENTENCES[:1])).tokenizer
    unseen = part.tokenize("counted harbour missing rope")
    assert part.unk_token not in unseen
    assert len(unseen) > len(model.tokenizer.tokenize("counted harbour missing rope"))


def numbered(count: int) -> t.PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer(models.WordLevel(vocab={f"w{place:02}": place for place in range(count)}, unk_token="w03"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w01", eos_token="w02", pad_token="w00", unk_token="w03")


USED = [4, 9, 17, 40, 41, 58, 77, 98]
CORPUS = Corpus([" ".join(f"w{place:02}" for place in USED)])


def outputs(network, ids: torch.Tensor) -> torch.Tensor:
    more = {"decoder_input_ids": ids.flip(1)} if network.config.is_encoder_decoder else {}
    with torch.no_grad():
        return network(input_ids=ids, **more).logits


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_gives_kept_tokens_the_logits_they_had(name, tmp_path):
    draft = small(name)
    model = Model(draft.network, numbered(VOCABULARY)).frozen_now()
    before = model.digest
    pruned = DynamicEmbeddingPruning()(model, CORPUS)
    kept = [0, 1, 2, 3, *USED]
    assert pruned.tokenizer.get_vocab() == {f"w{old:02}": new for new, old in enumerate(kept)}
    assert checkpoint.embedding_rows(pruned.network) == pruned.network.config.vocab_size == len(kept)
    less = {id(parameter): parameter.numel() for module in (model.network.get_input_embeddings(), model.network.get_output_embeddings()) if module for parameter in module.parameters()}
    assert model.parameters - pruned.parameters >= sum(less.values()) * (VOCABULARY - len(kept)) // VOCABULARY
    ids = torch.randint(1, len(kept), (2, 12), generator=torch.Generator().manual_seed(1))
    wanted = outputs(model.network, torch.tensor(kept)[ids])[..., kept]
    assert torch.allclose(outputs(pruned.network, ids), wanted, atol=1e-5 * wanted.abs().max().item())
    assert model.digest == before
    pruned.export(tmp_path)
    plain = type(model.network).from_pretrained(tmp_path)
    assert torch.allclose(outputs(plain.eval(), ids), wanted, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_tuned_rows_return_to_their_places(name):
    model = Model(small(name).network, numbered(VOCABULARY)).frozen_now()
    pruned = DynamicEmbeddingPruning()(model, CORPUS)
    assert RestoreEmbedding()(model, pruned).digest == model.digest
    tuned, draw = pruned.copy(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in tuned.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    tuned.frozen_now()
    before, digest = tuned.digest, model.digest
    restored = RestoreEmbedding()(model, tuned)
    assert (tuned.digest, model.digest) == (before, digest)
    kept = [0, 1, 2, 3, *USED]
    gone = [place for place in range(VOCABULARY) if place not in kept]
    rows, old, new = (one.network.get_input_embeddings().weight for one in (restored, model, tuned))
    assert torch.equal(rows[gone], old[gone])
    assert torch.equal(rows[kept], new)
    ids = torch.randint(1, len(kept), (2, 12), generator=draw)
    wanted = outputs(tuned.network, ids)
    assert torch.allclose(outputs(restored.network, torch.tensor(kept)[ids])[..., kept], wanted, atol=1e-5 * wanted.abs().max().item())
    assert restored.tokenizer.get_vocab() == model.tokenizer.get_vocab()


def test_tokens_that_only_the_config_names_keep_their_rows():
    model = Model(small("llama").network, numbered(90))
    model.base.pad_token_id = model.network.config.pad_token_id = 95
    model.network.generation_config.eos_token_id = [2, 93]
    model.network.generation_config.suppress_tokens = [4, 5]
    pruned = DynamicEmbeddingPruning()(model, Corpus(["w09 w04"]))
    kept = [0, 1, 2, 3, 4, 9, 93, 95]
    assert torch.equal(pruned.network.get_input_embeddings().weight, model.network.get_input_embeddings().weight[kept])
    assert pruned.network.config.pad_token_id == 7
    assert pruned.network.generation_config.eos_token_id == [2, 6]
    assert pruned.network.generation_config.suppress_tokens == [4]
    assert model.base.pad_token_id == 95
    assert RestoreEmbedding()(model, pruned).digest == model.digest


def test_a_pruned_model_may_be_cut_before_and_after():
    model = texts.reader("llama")
    model.anatomy.drop_channels({0: [1, 2, 3]})
    pruned = DynamicEmbeddingPruning()(model.frozen_now(), Corpus(["Two crows."]))
    assert pruned.edits == model.edits
    assert RestoreEmbedding()(model, pruned).digest == model.digest
    shorter = pruned.copy()
    shorter.anatomy.drop([1])
    restored = RestoreEmbedding()(model, shorter.frozen_now())
    assert len(restored.anatomy.blocks) == len(model.anatomy.blocks) - 1


def test_every_way_in_which_a_record_is_read_counts():
    model = Model(small("llama").network, numbered(VOCABULARY))
    corpus = Corpus([{"prompt": "w10", "completion": "w11", "choices": ["w12", "w13"], "label": "w14"}, {"prompt": "w15", "completion": "w16", "choices": None, "label": "w14"}])
    kept = DynamicEmbeddingPruning()(model, corpus).tokenizer.get_vocab()
    assert set(kept) == {f"w{place:02}" for place in (0, 1, 2, 3, 10, 11, 12, 13, 15, 16)}


def test_what_cannot_be_cut_is_refused():
    model = Model(small("llama").network, numbered(VOCABULARY))
    with pytest.raises(InputError, match="no text in the columns"):
        DynamicEmbeddingPruning()(model, Corpus([{"label": "w04"}]))
    with pytest.raises(InputError, match="no text in the columns"):
        DynamicEmbeddingPruning()(model, Corpus([]))
    roberta = small("roberta").base
    roberta.pad_token_id = 50  # its positions count from there
    torch.manual_seed(0)
    moved = Model(checkpoint.network_class(roberta)(roberta).eval(), numbered(VOCABULARY))
    with pytest.raises(InputError, match="reads more from token ids"):
        DynamicEmbeddingPruning()(moved, CORPUS)
    odd = numbered(VOCABULARY)
    odd._tokenizer = None
    with pytest.raises(InputError, match="cannot be cut"):
        vocabulary.subset(odd, [1])


def test_only_the_pruned_model_can_be_restored():
    model = Model(small("llama").network, numbered(VOCABULARY)).frozen_now()
    pruned = DynamicEmbeddingPruning()(model, CORPUS)
    with pytest.raises(InputError, match="the full one a gpt2"):
        RestoreEmbedding()(Model(small("gpt2").network, numbered(VOCABULARY)), pruned)
    with pytest.raises(InputError, match="tokens that the full one has not, 'w"):
        RestoreEmbedding()(Model(small("llama").network, numbered(50)), pruned)
    wider = small("llama").base
    wider.intermediate_size += 1
    with pytest.raises(InputError, match=r"model and .* in the full one"):
        RestoreEmbedding()(Model(checkpoint.network_class(wider)(wider), numbered(VOCABULARY)), pruned)
