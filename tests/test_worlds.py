"""What is always at hand."""

from __future__ import annotations

import json
import lzma
import math

import torch

from etude.measures.perplexity import Perplexity
from etude.values.digest import digest_file
from etude.worlds.stdlib import Stdlib, split_of
from etude.worlds.testbed import FOLDER, Testbed


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


def test_the_testbed_is_small_and_what_its_record_says():
    model = Testbed()()
    record = json.loads((FOLDER / "record.json").read_text())
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000
    assert 2.5e6 < model.parameters < 3.5e6
    assert digest_file(FOLDER / "model.safetensors") == record["shipped"]["model.safetensors"]
    assert record["method"] == "pretrain.causal_lm"
    assert record["budget"] == "5M tokens"
    assert next(model.network.parameters()).dtype == torch.float32


def test_the_testbed_packs_the_held_out_library_better_than_xz():
    """On every tenth held-out module; the whole split is measured in benchmarks/testbed.py."""
    heldout = Stdlib("heldout")()[::10]
    text = "".join(heldout.texts).encode()
    _, bits = Perplexity(stride=511)(Testbed()(), heldout)
    assert bits.value < 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert bits.value <= 1.40
    assert math.isfinite(bits.value)
