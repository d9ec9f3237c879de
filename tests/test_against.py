"""Two results side by side: what the items say, whoever wrote them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from etude.study.against import against, read
from etude.study.compare import holm


def results(values, *, of="base", names=None, part="bits_per_byte", seeds=(0, 1, 2)) -> dict:
    """A results.json with one measurement, values (seeds, items)."""
    return {
        "schema": "etude-results/2",
        "seeds": list(seeds),
        "measurements": [
            {
                "measure": "perplexity", "part": part, "of": of, "unit": "", "better": "lower", "scale": "identity", "exact": False, "seeds_matter": len(values) > 1,
                "items": {"names": [names or [str(place) for place in range(len(values[0]))]], "weights": [None], "values": [list(map(float, row)) for row in values]},
            }
        ],
    }  # fmt: skip


def samples(values, metric="acc") -> str:
    return "".join(json.dumps({"doc_id": place, "filter": "none", "metrics": [metric], metric: value}) + "\n" for place, value in enumerate(values))


def written(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_one_seed_is_a_paired_t_test(tmp_path):
    random = np.random.default_rng(0)
    one, other = random.normal(1, 1, 30), random.normal(1.5, 1, 30)
    (row,) = against(read(written(tmp_path, "a.json", results([one]))), read(written(tmp_path, "b.json", results([other]))))
    expected = stats.ttest_rel(one, other)
    assert row.difference.value == pytest.approx((one - other).mean())
    assert (row.difference.low, row.difference.high) == pytest.approx(tuple(expected.confidence_interval()), rel=1e-6)
    assert row.p == pytest.approx(expected.pvalue)
    assert row.verdict == ("first" if expected.pvalue < 0.05 else "undecided")


def test_lm_eval_samples_are_paired_by_document(tmp_path):
    random = np.random.default_rng(1)
    one = (random.random(200) < 0.7).astype(float)
    other = np.where(random.random(200) < 0.3, 0.0, one)
    (row,) = against(read(written(tmp_path, "samples_task_2026.jsonl", samples(one))), read(written(tmp_path, "samples_task_2027.jsonl", samples(other))))
    assert row.name == "task.acc"
    assert row.verdict == "first"
    assert row.p == pytest.approx(stats.ttest_rel(one, other).pvalue)


def test_many_comparisons_are_corrected(tmp_path):
    random = np.random.default_rng(2)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    shifts = [0.0, 0.3, 0.6, 0.0, 0.0]
    plain = []
    for place, shift in enumerate(shifts):
        one, other = random.normal(shift, 1, 60), random.normal(0, 1, 60)
        written(tmp_path / "a", f"samples_t{place}_1.jsonl", samples(one.tolist()))
        written(tmp_path / "b", f"samples_t{place}_1.jsonl", samples(other.tolist()))
        plain.append(stats.ttest_rel(one, other).pvalue)
    found = against(read(tmp_path / "a"), read(tmp_path / "b"))
    assert [row.p for row in found] == pytest.approx(holm(plain))
    assert any(p < 0.05 <= row.p for p, row in zip(plain, found, strict=True)) or [row.verdict for row in found].count("undecided") >= 3


def test_differently_called_values_meet_where_there_is_one_of_each(tmp_path):
    one, other = read(written(tmp_path, "a.json", results([[1, 2, 3]], of="base"))), read(written(tmp_path, "b.json", results([[1, 2, 4]], of="mine")))
    (row,) = against(one, other)
    assert row.name == "base.perplexity.bits_per_byte / mine.perplexity.bits_per_byte"


def test_a_measurement_without_seeds_stands_beside_every_seed(tmp_path):
    one = read(written(tmp_path, "a.json", results([[1, 2, 3, 5]])))
    other = read(written(tmp_path, "b.json", results([[2, 2, 3, 5], [2, 3, 3, 6], [2, 2, 4, 5]])))
    (row,) = against(one, other)
    assert row.difference.value == pytest.approx(11 / 4 - np.mean([[2, 2, 3, 5], [2, 3, 3, 6], [2, 2, 4, 5]]))


def test_other_items_are_not_paired(tmp_path):
    (row,) = against(read(written(tmp_path, "a.json", results([[1, 2, 3]]))), read(written(tmp_path, "b.json", results([[1, 2, 3]], names=["x", "y", "z"]))))
    assert row.difference is None
    assert row.verdict == "not the same items"


def test_the_command(tmp_path, etude):
    a, b = written(tmp_path, "a.json", results([[1.0, 2.0, 3.0, 2.5]])), written(tmp_path, "b.json", results([[2.0, 3.1, 4.0, 3.4]]))
    code, text, _ = etude("compare", str(a), str(b))
    assert code == 0
    assert "base.perplexity.bits_per_byte" in text
    assert text.split()[-1] == "A"
    code, text, _ = etude("compare", str(a), str(b), "--json")
    assert json.loads(text)[0]["verdict"] == "first"
    for content, match in (("{", "cannot be read"), ("{}", "no results of the schema")):
        code, _, error = etude("compare", str(a), str(written(tmp_path, "c.json", content)))
        assert code == 2
        assert match in error
    code, _, error = etude("compare", str(a), str(written(tmp_path, "d.json", results([[1, 2]], part="other", of="else"))))
    assert code == 2
    assert "nothing is measured in both" in error
