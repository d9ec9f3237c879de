"""Scoring and generation: the engine against lm-eval's hf backend and plain transformers loops, on the same model, questions and text.

    python benchmarks/scoring.py [--rounds 3] [--sizes 3M 25M]

Prints and writes benchmarks/results/scoring.json.  Each contestant runs in a process of its own, in turn, round by round; ratios are paired within a round.
Multiple choice: four choices of about 12 tokens, questions of about 75, five examples before them (1,500 tokens), which are the same for all as lm-eval's first_n sampler
takes them; items a second, all of lm-eval's own work included.  Rolling: windows of 512 tokens as lm-eval cuts them.  Sampling: 24 prompts of 5 to 60 tokens,
completions of 8 to 128, whose lengths are given, so that all write the same; lm-eval's batch sizes and transformers' are searched, and the best counts.
Peak memory is the process's, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from training import SIZES, network, spread

ITEMS = {"3M": 24, "25M": 8}
TEXT_TOKENS = {"3M": 24_000, "25M": 6_000}
CONTESTANTS = {
    "choice": ("etude", "hf 1", "hf 4"),
    "rolling": ("etude", "hf 1", "hf 4", "loop"),
    "sampling": ("etude", "transformers 4", "transformers 8", "transformers 24"),
}
TASK = """task: bench
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl, shots: {folder}/shots.jsonl}}}}
test_split: test
fewshot_split: shots
fewshot_config: {{sampler: first_n}}
num_fewshot: 5
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
"""


def prepare(folder: Path) -> None:
    """Questions and text: pieces of the standard library's modules."""
    from etude.worlds.stdlib import Stdlib
    from etude.worlds.testbed import Testbed

    testbed = Testbed()()
    tokenizer, random = testbed.tokenizer, np.random.default_rng(0)
    tokenizer.save_pretrained(folder / "tokenizer")
    ids = tokenizer("\n".join(Stdlib()()[:60].texts))["input_ids"]

    def piece(size: int) -> str:
        at = int(random.integers(0, len(ids) - size))
        return str(tokenizer.decode(ids[at : at + size]))

    rows = [{"prompt": piece(75 if place >= 5 else 270), "choices": [" " + piece(12) for _ in range(4)], "answer": place % 4} for place in range(5 + max(ITEMS.values()))]
    (folder / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[5:]))
    (folder / "bench.yaml").write_text(TASK.format(folder=folder))
    (folder / "text.json").write_text(json.dumps([piece(size) for size in (3000, 900, 5000, 2100, 1500, 4000, 700, 2600, 4200)]))


def harnessed(size: str, folder: Path, who: str) -> Any:
    """The contestant as a model of lm-eval."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from etude.values.model import Model

    tokenizer, net = AutoTokenizer.from_pretrained(folder / "tokenizer"), network(size).eval()
    net.config.max_position_embeddings = 4096
    if who == "etude":
        from etude.engine.harness import Harnessed

        return Harnessed(Model(net, tokenizer))
    return HFLM(pretrained=net, tokenizer=tokenizer, backend="causal", batch_size=int(who.split()[1]), device="cpu")


def choice(size: str, folder: Path, who: str) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model, manager = harnessed(size, folder, who), TaskManager(include_path=str(folder), include_defaults=False)
    simple_evaluate(model=model, tasks=["bench"], limit=2, task_manager=manager, bootstrap_iters=0, verbosity="ERROR")  # loads and warms up
    start = time.perf_counter()
    found = simple_evaluate(model=model, tasks=["bench"], limit=ITEMS[size], task_manager=manager, bootstrap_iters=0, verbosity="ERROR")
    seconds = time.perf_counter() - start
    logs = [float(answer[0]) for sample in found["samples"]["bench"] for (answer,) in sample["resps"]]
    return {"rate": ITEMS[size] / seconds, "answers": logs}


def rolling(size: str, folder: Path, who: str) -> dict[str, Any]:
    import torch
    from lm_eval.api.instance import Instance

    model = harnessed(size, folder, "hf 1" if who == "loop" else who)
    model._max_length = 512
    texts = json.loads((folder / "text.json").read_text())
    while sum(len(model.tok_encode(text)) for text in texts) > TEXT_TOKENS[size]:
        texts.pop()
    count = sum(len(model.tok_encode(text)) for text in texts)

    def run(some: list[str]) -> list[float]:
        if who != "loop":
            return [float(one) for one in model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), place) for place, text in enumerate(some)])]
        found = []
        for text in some:
            ids, total = [model.prefix_token_id, *model.tok_encode(text)], 0.0
            for at in range(0, len(ids) - 1, 512):
                row = torch.tensor([ids[at : at + 513]])
                with torch.no_grad():
                    logits = model.model(row[:, :-1], use_cache=False).logits
                total -= torch.nn.functional.cross_entropy(logits[0], row[0, 1:], reduction="sum").item()
            found.append(total)
        return found

    run([texts[0][:500]])
    start = time.perf_counter()
    answers = run(texts)
    return {"rate": count / (time.perf_counter() - start), "answers": answers}


def where(size: str) -> dict[str, float]:
    """Where the engine's time goes on rows of 512 tokens: matrix products, attention, and everything else, as torch's profiler has it."""
    from torch.profiler import ProfilerActivity, profile
    from training import kinds

    from etude.engine import score
    from etude.values.model import Model

    model, random = Model(network(size).eval()), np.random.default_rng(0)
    texts = [np.concatenate([[0], random.integers(1, SIZES[size]["vocab_size"], 512)]) for _ in range(16)]
    score.likelihoods(model, texts[:1], [1])
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        score.likelihoods(model, texts, [1] * len(texts))
    return kinds(seen)


def sampling(size: str, folder: Path, who: str) -> dict[str, Any]:
    import torch

    from etude.engine import attention, decode, losses
    from etude.values.generator import Policy

    net, random = network(size).eval(), np.random.default_rng(0)
    prompts = [np.concatenate([[0], random.integers(1, SIZES[size]["vocab_size"], count)]) for count in random.integers(5, 60, 24)]
    wanted = [int(count) for count in random.integers(8, 128, 24)]

    def run(scale: float) -> int:
        lengths = [max(2, int(count * scale)) for count in wanted]
        if who == "etude":
            with losses.headless(net), attention.by_piece(net, 256):
                found = decode.complete(net, Policy(temperature=1.0, max_new_tokens=max(lengths)), prompts, list(range(24)), set(), lambda place, new: len(new) >= lengths[place])
            return sum(map(len, found))
        rows = int(who.split()[1])
        for begin in range(0, 24, rows):
            some, most = prompts[begin : begin + rows], max(lengths[begin : begin + rows])
            width = max(map(len, some))
            ids = torch.tensor([[0] * (width - len(one)) + one.tolist() for one in some])
            mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in some])
            with torch.no_grad():
                net.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=most, min_new_tokens=most, pad_token_id=0)
        return sum(lengths)

    run(0.05)
    start = time.perf_counter()
    return {"rate": run(1.0) / (time.perf_counter() - start), "answers": []}


def child(what: str, who: str, size: str, folder: Path) -> None:
    found = {"choice": choice, "rolling": rolling, "sampling": sampling}[what](size, folder, who)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # getrusage would give the parent's, if that is more
    assert peak
    print("\n" + json.dumps({**found, "peak_bytes": int(peak.group(1)) * 1024}))


def started(what: str, who: str, size: str, folder: Path) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", what, who, "--sizes", size, "--folder", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "TQDM_DISABLE": "1"})
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def summary(kept: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, ratios paired within a round against each peer's best setting, and how far the answers lie from its own."""
    rows: dict[str, Any] = {who: {"rate": spread([one["rate"] for one in several]), "peak_bytes": spread([one["peak_bytes"] for one in several])} for who, several in kept.items()}
    for peer in sorted({who.split()[0] for who in kept} - {"etude"}):
        best = max((who for who in kept if who.split()[0] == peer), key=lambda who: rows[who]["rate"]["median"])
        pairs = list(zip(kept["etude"], kept[best], strict=True))
        rows[f"etude / {best}, rate"] = spread([one["rate"] / other["rate"] for one, other in pairs])
        rows[f"etude / {best}, peak_bytes"] = spread([one["peak_bytes"] / other["peak_bytes"] for one, other in pairs])
        if pairs[0][0]["answers"] and peer == "hf":  # a plain loop cuts its last window otherwise
            rows[f"largest difference of an answer to {best}, nats"] = max(float(np.abs(np.subtract(one["answers"], other["answers"])).max()) for one, other in pairs)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["3M", "25M"], choices=SIZES)
    parser.add_argument("--what", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(*arguments.child, arguments.sizes[0], arguments.folder)
    from etude.study.environment import environment

    found, rounds = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for size in arguments.sizes:
            for what in arguments.what:
                kept: dict[str, list[dict[str, Any]]] = {who: [] for who in CONTESTANTS[what]}
                for turn in range(arguments.rounds):
                    for who in kept:
                        kept[who].append(started(what, who, size, folder))
                        rounds.append({"size": size, "what": what, "round": turn, "who": who, "rate": kept[who][-1]["rate"], "peak_bytes": kept[who][-1]["peak_bytes"]})
                        print(rounds[-1], flush=True)
                found[f"{what}, {size}"] = summary(kept)
                if what == "rolling":
                    found[f"{what}, {size}"]["etude, share of the time"] = where(size)
    print(json.dumps(found, indent=1))
    path = Path(__file__).parent / "results" / "scoring.json"
    before = json.loads(path.read_text()) if path.exists() else {"found": {}, "rounds": []}
    rounds = [row for row in before["rounds"] if f"{row['what']}, {row['size']}" not in found] + rounds
    path.write_text(json.dumps({"found": {**before["found"], **found}, "rounds": rounds, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
