"""Corpora in and out of every format, and models in and out of folders."""

from __future__ import annotations

import gzip

import pyarrow as pa
import pytest
import torch
from architectures import small

from etude.values import checkpoint
from etude.values.corpus import Corpus, bytes_of
from etude.values.edits import from_plain, positions, runs, to_plain
from etude.values.errors import InputError
from etude.values.model import Model

RECORDS = [{"text": "a b", "label": 1, "choices": ["x", "y"]}, {"text": "cé\n\u2028d", "label": None, "choices": []}, {"text": "", "label": 3, "choices": ["z"]}]


@pytest.fixture
def corpus() -> Corpus:
    return Corpus(RECORDS)


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst"])
def test_json_lines_round_trip(name, corpus, tmp_path):
    corpus.write_jsonl(tmp_path / name)
    again = Corpus.read(tmp_path / name)
    assert list(again) == RECORDS
    assert again.digest == corpus.digest
    if name.endswith(".gz"):
        assert gzip.open(tmp_path / name).readline().startswith(b'{"choices"')


def test_saved_as_parquet_it_is_the_same(corpus, tmp_path):
    corpus.save(tmp_path / "saved")
    assert Corpus.load(tmp_path / "saved") == corpus
    assert Corpus.read(tmp_path / "saved" / "corpus.parquet").digest == corpus.digest


def test_a_folder_of_texts_and_a_folder_of_tables(corpus, tmp_path):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "b.txt").write_text("second")
    (tmp_path / "texts" / "a.md").write_text("first")
    (tmp_path / "texts" / "deep" / "c.txt").write_text("third")
    found = Corpus.read(tmp_path / "texts")
    assert found.texts == ["first", "second", "third"]
    assert found.column("path") == ["a.md", "b.txt", "deep/c.txt"]
    (tmp_path / "tables").mkdir()
    corpus.write_jsonl(tmp_path / "tables" / "1.jsonl")
    corpus.write_jsonl(tmp_path / "tables" / "2.jsonl.gz")
    assert len(Corpus.read(tmp_path / "tables")) == 6


def test_written_as_texts_or_parquet_it_comes_back(corpus, tmp_path):
    texts = Corpus([{"text": "first\r\n", "path": "a.txt"}, {"text": "é", "path": "deep/b.md"}])
    texts.write_texts(tmp_path / "texts")
    assert Corpus.read(tmp_path / "texts").column("path") == ["a.txt", "deep/b.md"]
    assert (tmp_path / "texts" / "a.txt").read_bytes() == b"first\r\n"
    Corpus(["x", "y"]).write_texts(tmp_path / "numbered")
    assert Corpus.read(tmp_path / "numbered").texts == ["x", "y"]
    with pytest.raises(InputError, match="no place"):
        Corpus([{"text": "x", "path": "../out.txt"}]).write_texts(tmp_path / "texts")
    assert not (tmp_path / "out.txt").exists()
    corpus.write_parquet(tmp_path / "c.parquet")
    assert Corpus.read(tmp_path / "c.parquet") == corpus


def test_datasets_round_trip(corpus):
    datasets = pytest.importorskip("datasets")
    dataset = corpus.to_dataset()
    assert isinstance(dataset, datasets.Dataset)
    assert Corpus.from_dataset(dataset).digest == corpus.digest
    assert Corpus.from_dataset(dataset.select([2, 0])).texts == ["", "a b"]


def test_the_digest_is_of_the_content_alone(corpus):
    table = corpus.table
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    assert Corpus(chunked).digest == corpus.digest
    assert Corpus(chunked) == corpus
    assert corpus[1:].digest != corpus.digest
    assert Corpus(RECORDS[::-1]).digest != corpus.digest
    assert corpus.renamed({"text": "body"}).digest != corpus.digest


def test_it_never_changes(corpus):
    before = corpus.digest
    longer = corpus.with_column("more", [1, 2, 3])
    assert longer.columns == ["text", "label", "choices", "more"]
    assert corpus.keep(lambda record: record["label"] == 3).texts == [""]
    assert corpus.keep([True, False, True]).column("label") == [1, 3]
    assert corpus.select([2, 2]).column("label") == [3, 3]
    assert corpus[0] == RECORDS[0]
    assert corpus[-1] == RECORDS[2]
    upper = corpus.map(lambda batch: pa.RecordBatch.from_pydict({"text": [text.upper() for text in batch.column("text").to_pylist()]}), batch_size=2)
    assert upper.texts == ["A B", "CÉ\n\u2028D", ""]
    assert corpus.digest == before
    with pytest.raises(AttributeError):
        corpus.table = None
    with pytest.raises(InputError, match="'lable'"):
        corpus.column("lable")


def test_bytes_are_counted_as_utf8():
    assert bytes_of(["é", "ab", ""]) == 4
    assert bytes_of([]) == 0


@pytest.mark.parametrize("kept", [[0], [0, 1, 2], [3, 5, 6, 7, 9], [], [10, 11]])
def test_runs_write_positions(kept):
    assert positions(runs(kept)) == kept if kept else runs(kept) == ""


def test_edits_are_plain_data_and_come_back_as_they_were():
    model = small("llama")
    model.anatomy.drop([1])
    model.anatomy.drop_channels({0: [1, 5]})
    model.anatomy.drop_heads({1: [0, 1]})
    assert [from_plain(to_plain(edit)) for edit in model.edits] == list(model.edits)
    with pytest.raises(InputError, match="is no edit"):
        from_plain({"edit": "etude.values.model:Model"})
    with pytest.raises(InputError, match="not Étude's"):
        from_plain({"edit": "subprocess:run"})


def test_weights_load_when_they_are_needed(tmp_path):
    small("llama").save(tmp_path)
    model = Model.load(tmp_path)
    assert model._network is None
    assert model.base.hidden_size == 32
    assert len(model.digest) == 40
    assert model._network is None
    assert model.kind == "causal"
    assert sum(p.numel() for p in model.network.parameters()) == model.parameters
    assert model.frozen


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_saved_model_is_read_back_and_compared(name, tmp_path, monkeypatch):
    model = small(name)
    model.save(tmp_path / "good")
    real = checkpoint.save_plain

    def wrong(network, config, folder):
        with torch.no_grad():
            next(network.parameters()).add_(0.1)
        real(network, config, folder)
        with torch.no_grad():
            next(network.parameters()).sub_(0.1)

    monkeypatch.setattr(checkpoint, "save_plain", wrong)
    with pytest.raises(RuntimeError, match="not what was meant"):
        model.save(tmp_path / "bad")


def test_bfloat16_is_kept(tmp_path):
    model = small("llama")
    model.network.to(torch.bfloat16)
    model.save(tmp_path)
    assert Model.load(tmp_path, dtype="bfloat16").network.dtype == torch.bfloat16
    assert Model.load(tmp_path).network.dtype == torch.float32


def test_a_copy_is_its_own(tmp_path):
    model = small("llama").frozen_now()
    draft = model.copy()
    with torch.no_grad():
        next(draft.network.parameters()).zero_()
    assert next(model.network.parameters()).abs().sum() > 0
    assert model.frozen
    assert not draft.frozen


def test_a_hub_id_without_network_is_one_clear_message():
    with pytest.raises(InputError, match="nobody/nothing"):
        Model.load("nobody/nothing")
