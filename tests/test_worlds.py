"""What is always at hand."""

from __future__ import annotations

import json
import lzma
import math

import pytest
import torch

from etude.engine import batch
from etude.engine.corrupt import Spans
from etude.engine.feed import Feed, Row
from etude.measures.perplexity import Perplexity
from etude.measures.reconstruction import Reconstruction
from etude.study import yaml
from etude.values.digest import digest_file
from etude.worlds import testbed, testbed_masked, testbed_seq2seq
from etude.worlds.stdlib import Stdlib, split_of


def test_the_splits_of_the_library_are_disjoint_and_whole():
    train, heldout, everything = (Stdlib(split)() for split in ("train", "heldout", "all"))
    names = [set(corpus.column("path")) for corpus in (train, heldout, everything)]
    assert not names[0] & names[1]
    assert names[0] | names[1] == names[2]
    assert 0.07 < len(heldout) / len(everything) < 0.13
    assert "textwrap.py" in names[2]
    assert not any("site-packages" in name or name.startswith("_sysconfigdata") for name in names[2])


def test_a_module_is_in_the_same_split_on_every_machine():
    assert [name for name in ("textwrap.py", "abc.py", "json/decoder.py", "ast.py", "asyncio/tasks.py", "zipapp.py", "this.py", "uu.py") if split_of(name) == "heldout"] == HELD_OUT


HELD_OUT = ["ast.py"]
"""Of these eight; computed once by ``sha256(name)[0] % 10 == 0`` in another program."""


@pytest.mark.parametrize(
    ("world", "kind", "method", "budget"),
    [
        (testbed, "causal", "pretrain.causal_lm", "5M tokens"),
        (testbed_masked, "masked", "pretrain.denoise", "3M tokens"),
        (testbed_seq2seq, "seq2seq", "pretrain.denoise", "3M tokens"),
    ],
)
def test_a_testbed_is_small_and_what_its_record_says(world, kind, method, budget):
    model = next(vars(world)[name] for name in vars(world) if name.startswith("Testbed"))()()
    record = json.loads((world.FOLDER / "record.json").read_text())
    assert sum(path.stat().st_size for path in world.FOLDER.iterdir()) <= 8_000_000
    assert 2.5e6 < model.parameters < 3.6e6
    assert digest_file(world.FOLDER / "model.safetensors") == record["shipped"]["model.safetensors"]
    assert (record["method"], record["budget"], model.kind) == (method, budget, kind)
    assert next(model.network.parameters()).dtype == torch.float32
    assert yaml.parse((world.FOLDER / "study.yaml").read_text(), "study")[0]["steps"]["trained"]["budget"] == budget


@pytest.mark.parametrize("world", [testbed_masked.TestbedMasked, testbed_seq2seq.TestbedSeq2Seq])
def test_what_was_hidden_is_restored_better_than_by_counting_tokens(world):
    """On every twentieth held-out module: in nats a token, less than a guesser needs that knows how often each token stands in this very text."""
    heldout, model = Stdlib("heldout")()[::20], world()()
    counts = torch.bincount(torch.cat([torch.from_numpy(ids) for ids in batch.encode(testbed.Testbed()(), heldout)])).double()
    share = counts[counts > 0] / counts.sum()
    assert Reconstruction()(model, heldout)[0].value < 0.85 * float(-(share * share.log()).sum())


def test_what_the_encoder_decoder_says_hangs_on_what_it_reads():
    """In nats a hidden token, more than one is lost when the decoder is given the source of another document."""
    model = testbed_seq2seq.TestbedSeq2Seq()()
    spans, documents = Spans.of(model), [ids[:256] for ids in batch.encode(model, Stdlib("heldout")()[::10]) if len(ids) >= 256]
    parts = [spans.hide(Feed().collate([Row(ids, ids)]), torch.Generator().manual_seed(place)) for place, ids in enumerate(documents)]

    def nats(sources) -> float:
        with torch.no_grad():
            said = [model.network(input_ids=source.ids, decoder_input_ids=part.targets).logits[0] for part, source in zip(parts, sources, strict=True)]
        wanted = torch.cat([part.labels[0] for part in parts])
        hidden = ~torch.isin(wanted, torch.tensor([*spans.sentinels, spans.end]))
        return float(torch.nn.functional.cross_entropy(torch.cat(said)[hidden], wanted[hidden]))

    assert nats(parts) < nats([*parts[1:], parts[0]]) - 1


def test_the_testbed_packs_the_held_out_library_better_than_xz():
    """On every tenth held-out module; the whole split is measured in benchmarks/testbed.py."""
    heldout = Stdlib("heldout")()[::10]
    text = "".join(heldout.texts).encode()
    _, bits = Perplexity(stride=511)(testbed.Testbed()(), heldout)
    assert bits.value < 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert bits.value <= 1.40
    assert math.isfinite(bits.value)
