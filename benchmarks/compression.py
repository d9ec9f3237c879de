"""Compression against peers, on the same trained checkpoint, calibration tokens and precision: Wanda, SparseGPT and GPTQ against llm-compressor, and structured pruning against torch-pruning.

    python benchmarks/compression.py --peer ~/llmcompressor/bin/python [--rounds 3]

`--peer` is the interpreter of an environment with both (``pip install llmcompressor torch-pruning``); the first demands another transformers than Étude's.
Prints and writes benchmarks/results/compression.json.  A Llama of 25 million parameters is trained once on the standard library (kept in `--folder`).  Each contestant runs in a process of
its own, in turn, round by round; ratios are paired within a round.  64 rows of 512 calibration tokens, float32.  Seconds are those of the method alone, without imports and loading; the limit
is a forward pass of plain transformers over the same rows.  Structured: two heads of seven and as large a share of the channels go from every block, by first-order Taylor importance, whose gradient
takes most of the time in either.  Peak memory is the process's, imports included; `more_bytes` is what the call added to the resident memory before it.
Perplexity is that of plain transformers over 48 other rows, computed by the same function in either environment.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = {"vocab_size": 8192, "hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 9, "num_attention_heads": 7, "num_key_value_heads": 7, "tie_word_embeddings": True}
ROWS, HELD_OUT, LENGTH = 64, 48, 512
METHODS = ("wanda", "sparsegpt", "gptq", "structured")
SHARE = 2 / 7


def contestants(method: str) -> tuple[str, str]:
    return "etude", "torch-pruning" if method == "structured" else "llm-compressor"


def prepare(folder: Path, tokens: int) -> None:
    """Train the checkpoint, and cut rows of other texts for calibration and for perplexity."""
    if (folder / "rows.npz").exists():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from etude.engine import batch, train
    from etude.engine.budget import Budget
    from etude.engine.feed import Packed
    from etude.values.model import Model
    from etude.worlds.stdlib import Stdlib
    from etude.worlds.testbed import Testbed

    torch.manual_seed(0)
    reader = Testbed()()
    ends = reader.tokenizer.bos_token_id
    config: Any = LlamaConfig(**SHAPE, max_position_embeddings=1024, bos_token_id=ends, eos_token_id=ends, pad_token_id=ends)  # type: ignore[arg-type]
    model = Model(LlamaForCausalLM(config), reader.tokenizer)
    recipe = train.Recipe(learning_rate=1e-3, batch_tokens=2048, length=256)
    train.train(model, Packed(batch.Documents(reader, Stdlib(split="train")()), 256), recipe, Budget(tokens, "tokens"), 0)
    model.save(folder / "model")
    stream = np.concatenate([ids[1:] for ids in batch.encode(reader, Stdlib(split="heldout")())])
    rows = stream[: (ROWS + HELD_OUT) * (LENGTH - 1)].reshape(-1, LENGTH - 1)
    rows = np.concatenate([np.full((len(rows), 1), ends), rows], 1)
    np.savez(folder / "rows.npz", calibration=rows[:ROWS], heldout=rows[ROWS:])


def load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()


def perplexity(network: Any, rows: np.ndarray) -> float:
    import torch

    total = 0.0
    with torch.no_grad():
        for row in torch.from_numpy(rows).split(2):
            logits = network(input_ids=row, use_cache=False).logits[:, :-1].flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(logits, row[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (rows.shape[0] * (rows.shape[1] - 1)))


def etude(method: str, folder: Path, rows: np.ndarray) -> tuple[Callable[[], Any], Any]:
    from etude.methods.compress import gptq, llm_pruner, sparsegpt, wanda
    from etude.values.corpus import Corpus
    from etude.values.model import Model

    module, made = {
        "wanda": (wanda, wanda.Wanda()),
        "sparsegpt": (sparsegpt, sparsegpt.SparseGPT()),
        "gptq": (gptq, gptq.GPTQ(symmetric=True, order="activation", group=64)),
        "structured": (llm_pruner, llm_pruner.LLMPruner(ratio=SHARE, spared_first=0.0, spared_last=0.0)),
    }[method]
    module.sample_rows = lambda *given: list(rows)  # type: ignore[attr-defined]  # the same tokens as the peer's
    model = Model.load(folder / "model")
    model.network  # noqa: B018, loaded before the clock starts
    return lambda: made(model, Corpus(["unread"])).network, model


def torch_pruning(folder: Path, rows: np.ndarray) -> tuple[Callable[[], Any], Any]:
    import torch
    import torch_pruning as tp

    network = load(folder)
    network.config.use_cache = False

    def run() -> Any:
        for row in torch.from_numpy(rows).split(2):
            (network(input_ids=row, labels=row, use_cache=False).loss * (len(row) / len(rows))).backward()
        layers = network.model.layers
        heads = {getattr(layer.self_attn, name): SHAPE["num_attention_heads"] for layer in layers for name in ("q_proj", "k_proj", "v_proj")}
        kept = [network.lm_head, *(one for layer in layers for one in (layer.self_attn.o_proj, layer.mlp.down_proj))]  # what writes to the residual stream
        importance = tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None)
        pruner = tp.pruner.BasePruner(
            network, example_inputs={"input_ids": torch.from_numpy(rows[:1, :16])}, importance=importance, pruning_ratio=SHARE, ignored_layers=kept,
            num_heads=heads, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=SHARE, output_transform=lambda out: out.logits.sum(),
        )  # fmt: skip
        pruner.step()
        return network

    return run, network


def peer(method: str, folder: Path, rows: np.ndarray) -> tuple[Callable[[], Any], Any]:
    if method == "structured":
        return torch_pruning(folder, rows)
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    recipe = {
        "wanda": lambda: WandaPruningModifier(sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["lm_head"]),
        "sparsegpt": lambda: SparseGPTModifier(sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["lm_head"]),
        "gptq": lambda: GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]),
    }[method]()
    network = load(folder)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()})

    def run() -> Any:
        oneshot(model=network, dataset=data, recipe=recipe, max_seq_length=LENGTH, num_calibration_samples=ROWS, log_dir=None)
        return network

    return run, network


def memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) * 1024


def child(who: str, method: str, folder: Path) -> None:
    import torch

    with np.load(folder / "rows.npz") as file:
        calibration, heldout = file["calibration"], file["heldout"]
    if method == "limit":
        network = load(folder)
        start = time.perf_counter()
        with torch.no_grad():
            for row in torch.from_numpy(calibration).split(2):
                network.model(input_ids=row, use_cache=False)
        print("\n" + json.dumps({"seconds": time.perf_counter() - start, "perplexity": perplexity(network, heldout)}))
        return
    run, kept = (etude if who == "etude" else peer)(method, folder, calibration)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    network = run()
    seconds = time.perf_counter() - start
    peak = memory("VmHWM")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print("\n" + json.dumps({"seconds": seconds, "peak_bytes": peak, "more_bytes": peak - before, "perplexity": perplexity(network, heldout), "parameters": parameters}))
    del kept


def started(python: str, who: str, method: str, folder: Path) -> dict[str, float]:
    words = [python, __file__, "--child", who, "--methods", method, "--folder", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "lowest": min(values), "highest": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter of an environment with llm-compressor and torch-pruning")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=250_000, help="on which the checkpoint is trained")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=(*METHODS, "limit"))
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/etude-benchmarks/compression").expanduser())
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.methods[0], arguments.folder)
    if not arguments.peer:
        parser.error("--peer is missing: the interpreter of an environment with llm-compressor and torch-pruning")
    from etude.study.environment import environment

    prepare(arguments.folder, arguments.tokens)
    kept: dict[str, list[dict[str, float]]] = {}
    for turn in range(arguments.rounds):
        kept.setdefault("forward pass", []).append(started(sys.executable, "etude", "limit", arguments.folder))
        for method in arguments.methods:
            for who, python in zip(contestants(method), (sys.executable, arguments.peer), strict=True):
                kept.setdefault(f"{method}, {who}", []).append(started(python, who, method, arguments.folder))
                print(turn, method, who, kept[f"{method}, {who}"][-1], flush=True)
    found: dict[str, Any] = {what: {name: spread([one[name] for one in several]) for name in several[0]} for what, several in kept.items()}
    for method in arguments.methods:
        who = contestants(method)[1]
        ours, theirs = (kept[f"{method}, {one}"] for one in contestants(method))
        for name in ("seconds", "peak_bytes", "more_bytes", "perplexity", "parameters"):
            found[f"{method}, etude / {who}, {name}"] = spread([one[name] / other[name] for one, other in zip(ours, theirs, strict=True)])
        found[f"{method}, etude / forward pass, seconds"] = spread([one["seconds"] / other["seconds"] for one, other in zip(ours, kept["forward pass"], strict=True)])
    print(json.dumps(found, indent=1))
    path = Path(__file__).parent / "results" / "compression.json"
    path.write_text(json.dumps({"found": found, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
