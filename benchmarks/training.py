"""Training: the loop against transformers.Trainer, packed as its run_clm example packs and padded as most people use it, and against litgpt, on the same data and optimizer.

    python benchmarks/training.py [--rounds 3] [--sizes 3M 25M] [--lengths 256 512] [--steps 12] [--compiled-rounds 1] [--only etude "trainer packed"] [--litgpt ~/litgpt/bin/python]

`--litgpt` is the interpreter of an environment with it (``pip install litgpt``), which demands another huggingface_hub than Étude's; its pretraining always compiles, and computes in float32 here.
Prints and writes benchmarks/results/training.json, where other sizes and lengths stay, and runs with litgpt stand by themselves.  Each contestant runs in a process of its own, in
turn, round by round; ratios are paired within a round.  Real tokens a second, not padding, over all steps after the first, with the first beside it; peak memory of the process; the
matrix products' own rate in the same minute; where the time goes, by torch's profiler: nobody who leaves products and attention as they are can be faster than these
two alone.  The loop keeps documents from seeing one another, which the packed Trainer and litgpt do not.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STEP_TOKENS = 4096
SIZES = {
    "3M": {"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2},
    "25M": {"vocab_size": 8192, "hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 9, "num_attention_heads": 7, "num_key_value_heads": 7},
}
CONTESTANTS = ("etude", "etude compiled", "trainer packed", "trainer padded", "trainer compiled", "etude lora", "trainer lora")
LITGPT = "litgpt compiled"


def network(size: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES[size], max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0))


def documents(path: Path, vocabulary: int) -> list[np.ndarray]:
    """Token ids of uneven documents, median 160: the library's modules cut into pieces, by a tokenizer that is the same for all."""
    if not path.exists():
        from etude.engine.batch import encode
        from etude.worlds.stdlib import Stdlib
        from etude.worlds.testbed import Testbed

        stream = np.concatenate([ids[1:] for ids in encode(Testbed()(), Stdlib()()[:200])]) % vocabulary
        sizes = np.random.default_rng(0).lognormal(np.log(160), 1.0, 4000).astype(int).clip(8, 2000)
        cuts = np.cumsum(sizes[np.cumsum(sizes) < len(stream)])
        np.savez(path, *[np.concatenate([[0], part]) for part in np.split(stream, cuts)[:-1]])
    with np.load(path) as file:
        return [file[name] for name in file.files]


def etude(size: str, length: int, steps: int, texts: list[np.ndarray], mode: str) -> dict[str, Any]:
    from etude.engine import progress, train
    from etude.engine.batch import Listed
    from etude.engine.budget import Budget
    from etude.engine.feed import Packed
    from etude.values.model import Model

    train.COMPILE_FROM = 0 if mode == "compiled" else float("inf")
    model = Model(network(size))
    if mode == "lora":
        from etude.methods.adapt.lora import LoRA

        LoRA(rank=8)._inject(model, 0)
    times, notes = [time.perf_counter()], []

    def hear(report: progress.Progress) -> None:
        times.append(time.perf_counter())
        notes.append(report.note)

    recipe = train.Recipe(learning_rate=1e-3, schedule="constant", warmup=0.0, batch_tokens=STEP_TOKENS, length=length)
    with progress.listening(hear):
        train.train(model, Packed(Listed(texts), length), recipe, Budget(steps, "steps"), 0)
    seconds = np.diff(times)
    return {"seconds": seconds.tolist(), "tokens": [STEP_TOKENS // length * length] * steps, "loss": float(notes[-1].split()[1].rstrip(","))}


def products(size: str) -> float:
    """Floating-point operations of the matrix products with weights for one token, a third of them for the weights' gradients; attention's own are not among them."""
    shape = SIZES[size]
    width, shared = shape["hidden_size"], shape["hidden_size"] * shape["num_key_value_heads"] // shape["num_attention_heads"]
    return 6.0 * (shape["vocab_size"] * width + shape["num_hidden_layers"] * width * (2 * width + 2 * shared + 3 * shape["intermediate_size"]))


def trainer(size: str, length: int, steps: int, texts: list[np.ndarray], mode: str) -> dict[str, Any]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = network(size)
    if mode == "lora":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    random = np.random.default_rng(0)
    order = random.permutation(len(texts))
    if mode == "padded":
        rows = [texts[index][:length].tolist() for index in order]
    else:
        stream = np.concatenate([texts[index] for index in order])
        rows = stream[: len(stream) // length * length].reshape(-1, length).tolist()
    real: list[int] = []

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in batch)
        real.append(sum(len(row["input_ids"]) for row in batch))
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)} if mode == "padded" else {"input_ids": ids, "labels": ids.clone()}

    times, losses = [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **more: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *args: Any, **more: Any) -> None:
            times.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **more: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    from etude.engine.train import multiplies_bfloat16

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=STEP_TOKENS // length, learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.1,
            adam_beta2=0.95, optim="adamw_torch_fused", bf16=multiplies_bfloat16(torch.device("cpu")), use_cpu=True, report_to=[], save_strategy="no",
            logging_steps=1, disable_tqdm=True, torch_compile=mode == "compiled", dataloader_drop_last=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=[{"input_ids": row} for row in rows], data_collator=collate, callbacks=[Clock()]).train()
    return {"seconds": np.diff(times).tolist(), "tokens": real[:steps], "loss": losses[-1]}


def litgpt(size: str, length: int, steps: int, texts: list[np.ndarray]) -> dict[str, Any]:
    """Its own pretraining loop, on the rows of the packed Trainer."""
    import lightning
    import torch
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.pretrain import fit, initialize_weights
    from litgpt.utils import instantiate_torch_optimizer

    shape, rows = SIZES[size], STEP_TOKENS // length
    fabric = lightning.Fabric(devices=1, accelerator="cpu", precision="32-true")
    config = Config(
        n_layer=shape["num_hidden_layers"], n_embd=shape["hidden_size"], n_head=shape["num_attention_heads"], n_query_groups=shape["num_key_value_heads"],
        intermediate_size=shape["intermediate_size"], vocab_size=shape["vocab_size"], padded_vocab_size=shape["vocab_size"], block_size=1024, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    lightning.seed_everything(0, verbose=False)
    model = GPT(config)
    initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    model.transformer.wte.weight = model.lm_head.weight
    model.max_seq_length = length
    network: Any = fabric.setup(torch.compile(model))
    settings = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}
    optimizer = instantiate_torch_optimizer(settings, network.parameters(), fused=False)
    times, said = [], []
    optimizer.register_step_post_hook(lambda *given: times.append(time.perf_counter()))
    fabric.print = lambda *words, **more: said.append(" ".join(map(str, words)))  # type: ignore[method-assign]
    stream = np.concatenate([texts[index] for index in np.random.default_rng(0).permutation(len(texts))])
    whole = torch.from_numpy(stream[: (len(stream) - 1) // length * length + 1])
    data = torch.stack([whole[at : at + length + 1] for at in range(0, len(whole) - length, length)])
    train = TrainArgs(global_batch_size=rows, micro_batch_size=rows, max_tokens=steps * rows * length, max_seq_length=length, max_norm=1.0, min_lr=1e-3, lr_warmup_steps=0, save_interval=None)
    state = {"model": network, "optimizer": fabric.setup_optimizers(optimizer), "iter_num": 0, "step_count": 0}
    times.append(time.perf_counter())
    batches: Any = list(data.split(rows))[:-1]
    fit(fabric, 1, state, batches, batches[:1], Path(), None, train, EvalArgs(interval=10**6, max_iters=1, initial_validation=False, final_validation=False))
    found = [re.search(r"loss train: ([\d.]+)", line) for line in said]
    return {"seconds": np.diff(times).tolist(), "tokens": [rows * length] * steps, "loss": float([one[1] for one in found if one][-1])}


def contestant(who: str) -> Callable[..., dict[str, Any]]:
    kind, _, mode = who.partition(" ")
    if kind == "litgpt":
        return litgpt
    return lambda size, length, steps, texts: (etude if kind == "etude" else trainer)(size, length, steps, texts, mode)


def shares(run: Callable[[int], dict[str, Any]]) -> dict[str, float]:
    """Where the time of a few steps goes: matrix products, attention's own, and everything else, as torch's profiler has it."""
    from torch.profiler import ProfilerActivity, profile

    run(2)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run(4)
    return kinds(seen)


def kinds(seen: Any) -> dict[str, float]:
    """Shares of a profile's time."""
    found = {"products": 0.0, "attention": 0.0, "else": 0.0}
    for row in seen.key_averages():
        kind = "products" if row.key in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm") else "attention" if "dot_product" in row.key else "else"
        found[kind] += row.self_cpu_time_total
    return {name: value / sum(found.values()) for name, value in found.items()}


def child(who: str, size: str, length: int, steps: int, data: Path, profiled: bool) -> None:
    import torch

    texts = documents(data, SIZES[size]["vocab_size"])
    if profiled:
        print(json.dumps(shares(lambda steps: contestant(who)(size, length, steps, texts))))
        return
    square = torch.randn(2048, 2048)
    square @ square
    start = time.perf_counter()
    for _ in range(5):
        square @ square
    rate = 5 * 2 * 2048**3 / (time.perf_counter() - start)
    found = contestant(who)(size, length, steps, texts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    settled = 1 if "compiled" not in who else steps // 2
    speed = sum(found["tokens"][settled:]) / sum(found["seconds"][settled:])
    found = {"tokens_per_second": speed, "first_steps_seconds": sum(found["seconds"][:settled]), "loss": found["loss"], "peak_bytes": peak}
    print(json.dumps({**found, "matmul_flops_per_second": rate, "share_of_matmul_rate": speed * products(size) * (2 / 3 if "lora" in who else 1) / rate}))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "lowest": min(values), "highest": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compiled-rounds", type=int, default=1, help="rounds in which compiled contestants take part too: compiling takes a minute")
    parser.add_argument("--sizes", nargs="+", default=["3M", "25M"], choices=SIZES)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--litgpt", metavar="PYTHON", help="interpreter of an environment with litgpt, which then takes part where the compiled ones do")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.sizes[0], arguments.lengths[0], arguments.steps, arguments.data, arguments.profile)
    from etude.study.environment import environment

    found, rounds, everybody = {}, [], [*arguments.only, *([LITGPT] if arguments.litgpt else [])]
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            documents(Path(folder) / f"{size}.npz", SIZES[size]["vocab_size"])
            for length in arguments.lengths:
                kept: dict[str, list[dict[str, float]]] = {who: [] for who in everybody}
                for turn in range(arguments.rounds):
                    for who in everybody:
                        if "compiled" in who and turn >= arguments.compiled_rounds:
                            continue
                        kept[who].append(started(arguments.litgpt if who == LITGPT else sys.executable, who, size, length, arguments.steps, folder))
                        rounds.append({"size": size, "length": length, "litgpt": bool(arguments.litgpt), "round": turn, "who": who, **kept[who][-1]})
                        print(rounds[-1], flush=True)
                setting = f"{size}, {length}" + (" with litgpt" if arguments.litgpt else "")
                found[setting] = summary(kept)
                for who in ("etude", "trainer packed"):
                    if who in arguments.only:
                        found[setting][f"{who}, share of the time"] = started(sys.executable, who, size, length, 4, folder, "--profile")
    print(json.dumps(found, indent=1))
    path = Path(__file__).parent / "results" / "training.json"
    before = json.loads(path.read_text()) if path.exists() else {"found": {}, "rounds": []}
    measured = {(row["size"], row["length"], row["litgpt"]) for row in rounds}
    rounds = [row for row in before["rounds"] if (row["size"], row["length"], row["litgpt"]) not in measured] + rounds
    path.write_text(json.dumps({"found": {**before["found"], **found}, "rounds": rounds, "environment": environment()}, indent=1) + "\n")


def started(python: str, who: str, size: str, length: int, steps: int, folder: str, *more: str) -> dict[str, float]:
    """What a contestant says in a process of its own."""
    words = [python, __file__, "--child", who, "--sizes", size, "--lengths", str(length), "--steps", str(steps), "--data", f"{folder}/{size}.npz", *more]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def summary(kept: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of each, and ratios paired within a round."""
    rows: dict[str, Any] = {}
    for who, several in kept.items():
        if not several:
            continue
        rows[who] = {name: spread([one[name] for one in several]) for name in ("tokens_per_second", "share_of_matmul_rate", "first_steps_seconds", "peak_bytes", "loss")}
    for ours, theirs in (
        ("etude", "trainer packed"),
        ("etude", "trainer padded"),
        ("etude", "trainer compiled"),
        ("etude compiled", "trainer packed"),
        ("etude compiled", "trainer compiled"),
        ("etude lora", "trainer lora"),
        ("etude", LITGPT),
        ("etude compiled", LITGPT),
    ):
        if kept.get(ours) and kept.get(theirs):
            for name in ("tokens_per_second", "peak_bytes"):
                rows[f"{ours} / {theirs}, {name}"] = spread([one[name] / other[name] for one, other in zip(kept[ours], kept[theirs], strict=False)])
    return rows


if __name__ == "__main__":
    main()
