"""The estimator against all subsets, and programs of a generator that is a server of canned completions."""

from __future__ import annotations

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import texts

from etude.engine import sandbox
from etude.engine.sandbox import Protection
from etude.measures import pass_at_k
from etude.measures.pass_at_k import PROTECTIONS, PassAtK
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.generator import Endpoint, Generator, Policy

ADD, TWICE = "def add(a, b):\n", "def twice(a):\n"
TASKS = Corpus([
    {"task_id": "add", "prompt": ADD, "test": "def check(f):\n    assert f(1, 2) == 3\n    assert f(-1, 1) == 0", "entry_point": "add"},
    {"task_id": "twice", "prompt": TWICE, "test": "assert twice(3) == 6", "entry_point": None},
])  # fmt: skip
COMPLETIONS = {
    ADD: ["    return a + b\n", "    return 3\n", "    return a - -b\n", "    import os; os._exit(0)\n"],
    TWICE: ["    return 2 * a", "    raise SystemExit", "    return a +", "    print('passed')"],
}
"""Of add the first and third are right, of twice the first."""


@pytest.fixture
def server():
    """Answers each prompt with its completions in turn, and remembers what it was asked."""
    asked, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                place = sum(prompt == data["prompt"] for prompt, _ in asked)
                asked.append((data["prompt"], data["seed"]))
            body = json.dumps({"choices": [{"text": COMPLETIONS[data["prompt"]][place % 4]}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        one.asked = asked
        yield one
        one.shutdown()


def writer(server, temperature: float = 0.8) -> Generator:
    return Generator(Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "canned"), Policy(temperature=temperature))


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_the_estimator_is_the_share_of_subsets_with_one_that_passed(samples):
    for passed in range(samples + 1):
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations([place < passed for place in range(samples)], k))
            assert pass_at_k.pass_at_k(samples, passed, k) == pytest.approx(np.mean([any(subset) for subset in subsets]))


def test_programs_are_executed_and_counted(server):
    try:
        one, two, four, protection = PassAtK(execute=True, ks=(1, 2, 4), samples=4)(writer(server), TASKS)
    except InputError as error:
        pytest.skip(str(error))
    assert one.items.tolist() == pytest.approx([2 / 4, 1 / 4])
    assert two.items.tolist() == pytest.approx([1 - 1 / 6, 1 / 2])
    assert four.items.tolist() == [1, 1]
    assert [part.name for part in (one, two, four)] == ["pass_at_1", "pass_at_2", "pass_at_4"]
    assert {(part.item_names, part.better) for part in (one, two, four)} == {(("add", "twice"), "higher")}
    assert (protection.name, protection.exact, protection.item_names) == ("protection", True, PROTECTIONS)
    assert Protection(*(bool(value) for value in protection.items)) == sandbox.run("", allow_network=True, allow_writes=True).protection
    assert [prompt for prompt, _ in server.asked] == [ADD] * 4 + [TWICE] * 4
    assert len(set(server.asked)) == 8, "every sample has a seed of its own"


def test_the_seed_and_the_number_of_records_are_followed(server, monkeypatch):
    ran = []
    monkeypatch.setattr(sandbox, "run", lambda text, *rest, **named: ran.append((text, rest, named)) or sandbox.Outcome("passed", "", Protection(True, True, True)))
    method = PassAtK(execute=True, ks=(1,), samples=1, records=1, seconds=2.0, memory=100, allow_network=True)
    for seed in (0, 1):
        (found, protection) = PassAtK(**{**vars(method), "seed": seed})(writer(server, 0.0), TASKS.select([0]).renamed({"task_id": "other"}))
    assert (found.items.tolist(), found.item_names) == ([1], ("0",))
    assert protection.items.tolist() == [1, 1, 1]
    assert server.asked[0][1] != server.asked[1][1]
    assert ran[0][0] == "", "what protects is known before anything is generated"
    assert ran[1][0] == "def add(a, b):\n    return a + b\n\ndef check(f):\n    assert f(1, 2) == 3\n    assert f(-1, 1) == 0\ncheck(add)\n"
    assert {(rest[0].seconds, rest[0].memory_bytes, named["allow_network"], named["allow_writes"]) for _, rest, named in ran} == {(2.0, 100 << 20, True, False)}


def test_equal_programs_are_executed_once(server, monkeypatch):
    ran = []
    monkeypatch.setattr(sandbox, "run", lambda text, *rest, **named: ran.append(text) or sandbox.Outcome("passed", "", Protection(True, True, True)))
    (found, _) = PassAtK(execute=True, ks=(1,), samples=8)(writer(server), TASKS)
    assert len(server.asked) == 16
    assert len(ran) == 1 + 8
    assert found.items.tolist() == [1, 1]


def test_nothing_is_executed_unless_it_is_said(server, monkeypatch):
    monkeypatch.setattr(sandbox, "run", lambda *rest, **named: pytest.fail("it ran"))
    with pytest.raises(InputError, match="execute up to 40 Python programs on this machine") as caught:
        PassAtK()(writer(server), TASKS)
    assert "execute: true" in caught.value.remedy
    assert server.asked == []


def test_an_unprotected_machine_is_refused_before_anything_is_generated(server, monkeypatch):
    def refuse(text, limits, *, allow_network, allow_writes):
        Protection(False, False, False).check(allow_network, allow_writes)

    monkeypatch.setattr(sandbox, "run", refuse)
    with pytest.raises(InputError, match="could reach the network"):
        PassAtK(execute=True)(writer(server), TASKS)
    assert server.asked == []


def test_what_cannot_be_measured_is_refused(server):
    with pytest.raises(InputError, match="at temperature 0 all 20 samples of a prompt are one"):
        PassAtK(execute=True)(writer(server, 0.0), TASKS)
    with pytest.raises(InputError, match="no column 'test'"):
        PassAtK(execute=True)(writer(server), Corpus([{"prompt": "a"}]))
    with pytest.raises(InputError, match="empty"):
        PassAtK(execute=True)(writer(server), TASKS.select([]))
    with pytest.raises(TypeError, match="takes a Generator"):
        PassAtK(execute=True)(texts.reader("llama"), TASKS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"ks": ()}, "ks"), ({"ks": (0,)}, "ks"), ({"ks": (1, 1)}, "ks"), ({"samples": 9}, "samples"), ({"records": 0}, "records"), ({"seconds": 0.0}, "limits"), ({"memory": 1}, "limits")],
)
def test_wrong_fields_are_refused_at_once(wrong, message):
    with pytest.raises(ValueError, match=message):
        PassAtK(**wrong)
