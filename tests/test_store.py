"""The store: whole or not at all, once and not twice, and the same after any interruption."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from etude.study.store import Store
from etude.values.errors import InputError

EXAMPLE = Path(__file__).parent.parent / "examples" / "depth-pruning.yaml"
LITTLE = [
    "--set", "base=./base", "--set", "given.text={corpus: ./text.jsonl}", "--set", "given.heldout={corpus: ./heldout.jsonl}",
    "--set", "pruned.sleb.tokens=256", "--set", "pruned.sleb.length=64", "--set", "healed.budget=1 steps", "--set", "healed.length=64", "--set", "healed.batch_tokens=128",
    "--set", "measure.perplexity.window=64", "--set", "measure.perplexity.stride=63",
    "--set", "measure.throughput.rounds=2", "--set", "measure.throughput.prompt=16", "--set", "measure.throughput.new=2",
]  # fmt: skip
"""The example with as little to compute as will do: the same graph, the same writes."""


def put(store: Store, key: str, text: str = "x") -> None:
    store.put(key, lambda folder: (folder / "value.txt").write_text(text), {"kind": "corpus", "dtype": None})


def test_an_object_is_there_whole_or_not_at_all(tmp_path):
    store = Store.open(tmp_path)
    put(store, "a" * 40)
    assert store.has("a" * 40)
    assert store.verify("a" * 40) == []

    def breaks(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put("b" * 40, breaks, {"kind": "corpus"})
    assert not store.has("b" * 40)
    assert store.digests() == ["a" * 40]
    assert list(store.aside.iterdir()) == []


def test_verify_sees_what_was_changed_lost_and_added(tmp_path):
    store = Store.open(tmp_path)
    put(store, "k")
    (store.path("k") / "value.txt").write_text("y")
    (store.path("k") / "other.txt").write_text("z")
    assert store.verify("k") == ["other.txt is not in the record", "value.txt is not what was written"]
    (store.path("k") / "value.txt").unlink()
    assert "value.txt is missing" in store.verify("k")


def test_garbage_is_what_no_study_needs(tmp_path):
    store = Store.open(tmp_path)
    put(store, "needed")
    put(store, "old")
    (store.aside / "old.999999999.abcd").mkdir()  # left by a process that is no more
    (store.aside / f"now.{os.getpid()}.abcd").mkdir()
    store.remember_run("study", ["needed"])
    assert [path.name for path in store.garbage()] == ["old", "old.999999999.abcd"]


def test_a_lock_is_held_by_one(tmp_path):
    store = Store.open(tmp_path)
    waited: list[bool] = []
    with store.locked("k"):
        context = multiprocessing.get_context("fork")
        other = context.Process(target=_hold, args=(tmp_path,))
        other.start()
        time.sleep(0.5)
        assert not (tmp_path / "held").exists()
    other.join(20)
    assert (tmp_path / "held").exists()
    with store.locked("k", lambda: waited.append(True)):
        assert not waited


def _hold(folder: Path) -> None:
    with Store.open(folder).locked("k"):
        (folder / "held").touch()


def test_a_file_in_the_way_is_a_clear_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        Store.open(tmp_path / "file")


# Whole runs, in processes of their own that start with everything imported.


def _study(folder: str, store: str, out: str, arguments: list[str]) -> None:
    os.chdir(folder)
    sys.argv = ["etude", "run", str(EXAMPLE), "--store", store, "--out", out, *arguments]
    sys.stdout = sys.stderr = open(os.devnull, "w")
    import torch

    torch.set_num_threads(1)
    from etude.cli import main

    main()


@pytest.fixture(scope="module")
def server():
    """Processes that are forked from one in which torch and the rest are loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["etude.cli", "etude.study.plan", "etude.study.run", "etude.study.results", "torch", "peft", "transformers.models.llama.modeling_llama", "scipy.stats", "altair", "vl_convert"]
    )
    return context


def without_clocks(results: dict) -> dict:
    """What must be equal however a run went: all but durations, dates, and measures of speed."""
    for node in results["nodes"]:
        node.pop("cost", None)
        node.pop("finished", None)
    results["measurements"] = [row for row in results["measurements"] if row["measure"] != "throughput"]
    return results


def start(server, tiny: Path, store: Path, out: Path):
    process = server.Process(target=_study, args=(str(tiny), str(store), str(out), LITTLE))
    process.start()
    return process


def finish(process) -> int:
    process.join(300)
    return process.exitcode


def undisturbed(server, tiny: Path, folder: Path) -> tuple[dict, float]:
    finish(start(server, tiny, folder / "warm-store", folder / "warm-out"))
    began = time.perf_counter()
    assert finish(start(server, tiny, folder / "whole-store", folder / "whole-out")) in (0, 1)
    return without_clocks(json.loads((folder / "whole-out" / "results.json").read_text())), time.perf_counter() - began


def test_killed_at_twenty_random_moments_it_loses_nothing(server, tiny, tmp_path):
    wanted, seconds = undisturbed(server, tiny, tmp_path)
    draw = random.Random(0)
    interrupted = 0
    store, out = tmp_path / "store", tmp_path / "out"
    for _ in range(20):
        process = start(server, tiny, store, out)
        time.sleep(draw.uniform(0.02, 0.6) * seconds)
        interrupted += process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if not store.exists():
            continue
        opened = Store.open(store)
        assert all(opened.verify(key) == [] for key in opened.digests())
        finished = {key: opened.record(key)["finished"] for key in opened.digests()}
        stamps = {key: (opened.path(key) / "record.json").stat().st_mtime_ns for key in finished}
        assert finish(start(server, tiny, store, out)) in (0, 1)
        assert all(opened.verify(key) == [] for key in opened.digests())
        assert {key: (opened.path(key) / "record.json").stat().st_mtime_ns for key in finished} == stamps, "a finished step was repeated"
        assert without_clocks(json.loads((out / "results.json").read_text())) == wanted
        shutil.rmtree(store)  # the next moment falls into a run from the beginning
        shutil.rmtree(out, ignore_errors=True)
    assert interrupted >= 15, "the kills came too late to mean anything"


def test_two_runs_at_once_compute_every_object_once(server, tiny, tmp_path):
    wanted, _ = undisturbed(server, tiny, tmp_path)
    one = start(server, tiny, tmp_path / "store", tmp_path / "one")
    other = start(server, tiny, tmp_path / "store", tmp_path / "other")
    assert finish(one) in (0, 1)
    assert finish(other) in (0, 1)
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "other"))
    assert first == second  # clocks too: they read the same records
    assert without_clocks(first) == wanted
    store = Store.open(tmp_path / "store")
    assert all(store.verify(key) == [] for key in store.digests())


def test_the_same_again_is_quick(tiny, tmp_path):
    """Nothing is executed, and no weights are loaded: the whole command is over in a few seconds even here (the benchmark says how many)."""
    shutil.copytree(tiny, tmp_path / "work")
    arguments = [sys.executable, "-m", "etude", "run", str(EXAMPLE), *LITTLE]
    subprocess.run(arguments, cwd=tmp_path / "work", capture_output=True, check=False)
    script = """
import sys
sys.argv = ["etude", *sys.argv[1:]]
try:
    from etude.cli import main
    main()
except SystemExit:
    pass
print([name for name in sys.modules if name.startswith("transformers.models.llama")], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script, *arguments[3:]], cwd=tmp_path / "work", capture_output=True, text=True, check=False)
    assert "0 computed" in done.stdout
    assert done.stderr.strip().endswith("[]"), done.stderr
