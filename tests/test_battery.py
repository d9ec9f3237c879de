"""What every discovered method must do, whichever it is."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import pkgutil
import subprocess
import sys

import pytest
import torch

import etude
from etude.engine.budget import Budget
from etude.method import discover, dotted_name, find, interface, names
from etude.study.source import code_digest
from etude.values import checkpoint
from etude.values.corpus import Corpus
from etude.values.digest import canonical, digest
from etude.values.errors import InputError
from etude.values.generator import Generator, Policy
from etude.values.measurement import Measurement
from etude.values.model import Model

ROOMS = {(room, name): cls for room in ("methods", "measures", "worlds") for name, cls in discover(room).items()}
IDS = [name for _, name in ROOMS]
CLASSES = list(ROOMS.values())
SMALL = {
    "tokens": 256,
    "length": 64,
    "batch_tokens": 256,
    "window": 64,
    "stride": 63,
    "rounds": 2,
    "prompt": 16,
    "new": 2,
    "vocabulary": 300,
    "hidden_size": 32,
    "blocks": 2,
    "heads": 4,
    "intermediate_size": 48,
    "every": 2,
    "records": 4,
    "repeats": 1,
    "execute": True,
}
"""Fields that only decide how much is computed, made small; shares and rates keep their defaults."""


def quick(cls, tiny):
    """The method with its defaults, but little to do."""
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    task = {"task": str(tiny / "task.yaml")} if cls.__name__ == "Harness" else {}
    return cls(**{name: value for name, value in SMALL.items() if type(fields.get(name)) in (int, bool, type(None)) and name in fields}, **task)


def inputs(cls, tiny, kind="base"):
    """Every input that a method may take, of its kind; models from the folder of this name."""
    kinds = {Model: lambda: Model.load(tiny / kind), Corpus: lambda: Corpus.read(tiny / "text.jsonl"), Generator: lambda: Generator(Model.load(tiny / kind), Policy(temperature=1.0, max_new_tokens=4))}
    face = interface(cls)
    found = {slot.name: [kinds[slot.kind]()] if slot.many else kinds[slot.kind]() for slot in face.inputs}
    if face.seeded:
        found["seed"] = 3
    if face.budgeted:
        found["budget"] = Budget(2, "steps")
    return found


@functools.cache
def suited(cls, tiny):
    """Which of the tiny models a method takes: the first that it does not refuse for its kind."""
    for kind in ("base", "masked", "seq2seq"):
        try:
            quick(cls, tiny)(**inputs(cls, tiny, kind))
            return kind
        except InputError as error:
            if "and this is a" not in str(error):
                raise
    raise AssertionError(f"{dotted_name(cls)} refuses every kind of model")


def content(value) -> str:
    if isinstance(value, tuple):
        return digest([content(item) for item in value])
    if isinstance(value, Measurement):
        return digest(value.as_data())
    if isinstance(value, Model):
        return digest(checkpoint.digest_state(value.network), [repr(edit) for edit in value.edits])
    return value.digest


def clocked(cls) -> bool:
    """Whether a method measures time or the process's memory, and so never gives the same number twice."""
    return dotted_name(cls) in ("latency", "memory", "roofline", "throughput")


def test_something_is_discovered():
    assert {"compress.sleb", "compress.flap", "compress.wanda", "compress.magnitude", "compress.drop_blocks", "adapt.lora", "pretrain.causal_lm"} <= discover("methods").keys()
    assert {"perplexity", "throughput", "size"} <= discover("measures").keys()
    assert {"stdlib", "testbed", "people", "instructions", "sources", "language"} <= discover("worlds").keys()
    assert all(set(names(room)) == discover(room).keys() for room in ("methods", "measures", "worlds"))


@pytest.mark.parametrize("cls", CLASSES, ids=IDS)
def test_it_constructs_with_defaults_and_cannot_change(cls):
    method = cls()
    assert method == cls()
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, None)


@pytest.mark.parametrize("cls", CLASSES, ids=IDS)
def test_its_digest_is_stable_and_follows_every_field(cls):
    assert canonical(cls()) == canonical(cls(**{field.name: field.default for field in dataclasses.fields(cls)}))
    assert len(code_digest(cls.__module__)) == 40


@pytest.mark.parametrize("cls", CLASSES, ids=IDS)
def test_everything_is_documented(cls):
    face = interface(cls)
    assert cls.__doc__
    assert face.summary.endswith((".", ":", ")"))
    assert "Cost" in face.documentation or not face.inputs or face.output is Measurement
    for parameter in face.parameters:
        assert parameter.documentation, f"{face.name}: {parameter.name} has no line beneath it"
    assert face.cls.paper is None or isinstance(face.cls.paper, str)
    json.dumps(face.as_data())


@pytest.mark.parametrize("cls", CLASSES, ids=IDS)
def test_its_file_is_named_after_it(cls):
    assert cls.__module__.rpartition(".")[2].replace("_", "") == cls.__name__.lower()


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if interface(cls).inputs], ids=[name for (_, name), cls in ROOMS.items() if interface(cls).inputs])
def test_it_leaves_inputs_alone_repeats_itself_and_survives_saving(cls, tiny, tmp_path):
    kind = suited(cls, tiny)
    given = inputs(cls, tiny, kind)
    flat = [item for value in given.values() for item in (value if isinstance(value, list) else [value]) if isinstance(item, (Model, Corpus))]
    before = [content(item) for item in flat]
    method = quick(cls, tiny)
    made = method(**given)
    assert [content(item) for item in flat] == before, "an input was changed"
    assert all(not parameter.is_meta for item in flat if isinstance(item, Model) for parameter in item.network.parameters())
    if not clocked(cls):
        torch.manual_seed(12345)  # the global state of the random numbers must not matter
        assert content(method(**inputs(cls, tiny, kind))) == content(made), "the same seed gave other bits"
    for place, item in enumerate(made if isinstance(made, tuple) else (made,)):
        item.save(tmp_path / str(place))
        again = type(item).load(tmp_path / str(place))
        if isinstance(item, Model):  # its edits may have been folded into the config
            assert checkpoint.digest_state(again.network) == checkpoint.digest_state(item.network), "what was loaded is not what was saved"
        else:
            assert content(again) == content(item), "what was loaded is not what was saved"
        if isinstance(item, Model):
            assert item.frozen


@pytest.mark.parametrize("name", ["compress.drop_blocks", "pretrain.causal_lm", "pretrain.denoise", "adapt.lora", "pretrain.initialize"])
def test_another_seed_gives_another_result(name, tiny):
    cls = find("methods", name)
    method = cls(choose="random", blocks=0.34) if name == "compress.drop_blocks" else quick(cls, tiny)
    found = {content(method(**{**inputs(cls, tiny, suited(cls, tiny)), "seed": seed})) for seed in range(6)}
    assert len(found) > 1


PLUGIN = '''"""A method of another package."""
from dataclasses import dataclass
from etude.method import Method
from etude.values.model import Model


@dataclass(frozen=True)
class Nothing(Method):
    """Leave the model as it is."""

    def apply(self, model: Model) -> Model:
        return model
'''


def test_another_package_adds_methods_by_its_entry_point(tmp_path):
    """In a process of its own, with a package that is installed as far as Python's metadata goes."""
    folder = tmp_path / "quill" / "methods" / "compress"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").write_text("")
    (folder / "nothing.py").write_text(PLUGIN)
    metadata = tmp_path / "quill-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: quill\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[etude.methods]\nquill = quill.methods\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "etude", "show", "compress.nothing", "--json"], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout)["inputs"] == {"model": "model"}
    listed = subprocess.run([sys.executable, "-m", "etude", "methods", "compress", "--json"], capture_output=True, text=True, env=environment, check=True)
    assert {"compress.nothing", "compress.sleb"} <= {row["name"] for row in json.loads(listed.stdout)}


def test_a_wrong_kind_of_input_is_refused(tiny):
    from etude.methods.compress.magnitude import Magnitude

    with pytest.raises(TypeError, match="takes a Model as model, got Corpus"):
        Magnitude()(Corpus(["a"]))


def test_every_module_can_be_imported():
    for info in pkgutil.walk_packages(etude.__path__, "etude."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)


def test_help_imports_nothing_heavy():
    script = """
import sys
sys.argv = ["etude", "--help"]
try:
    from etude.cli import main
    main()
except SystemExit:
    pass
print(sorted({"torch", "transformers", "pyarrow", "pydantic", "numpy", "scipy"} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "run" in done.stdout
