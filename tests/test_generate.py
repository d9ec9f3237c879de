"""The decoding loop against transformers' own, its randomness against probabilities, and endpoints against a server of our own."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from scipy import stats
from texts import END, reader

from etude.engine import batch, cost, decode, generate, progress
from etude.engine.decode import Guide, choose
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.generator import Endpoint, Generator, Policy
from etude.values.model import Model

PROMPTS = ["The tide went", "", "Two crows. Nobody had told the baker", "Rain", "She counted é"]


@pytest.fixture
def token_ids(monkeypatch):
    """Completions in which every letter is a token's id: bytes that are no text would all look alike."""
    monkeypatch.setattr(generate, "_text", lambda model, prompt, new: "".join(map(chr, new)))


def cut(name: str) -> Model:
    model = reader(name)
    model.anatomy.drop([0])
    model.anatomy.drop_channels({1: list(range(8))})
    return model


def theirs(model: Model, prompt: str, new: int, ends: int | None = None) -> str:
    """Greedy tokens by transformers, the prompt alone and not padded."""
    ids = torch.tensor([END, *model.tokenizer(prompt)["input_ids"]])[None] if model.kind == "causal" else torch.tensor(model.tokenizer([prompt])["input_ids"])
    found = model.network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, eos_token_id=ends, pad_token_id=0)[0].tolist()
    found = found[ids.shape[1] :] if model.kind == "causal" else found[1:]
    return "".join(chr(token) for token in found if token != ends)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "gpt_neox", "mamba", "mixtral", "cut llama", "cut gemma2"])
def test_greedy_tokens_are_those_of_transformers(name, token_ids):
    model = (cut if name.startswith("cut") else reader)(name.removeprefix("cut "))
    ours = generate.generate(Generator(model, Policy(max_new_tokens=12)), PROMPTS)
    assert ours == [theirs(model, prompt, 12, END) for prompt in PROMPTS]
    assert len(set(ours)) > 2  # the prompt matters, so that an equal answer says something


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_too(name, token_ids):
    model, prompts = reader(name), [prompt for prompt in PROMPTS if prompt]
    torch.manual_seed(0)
    model.network.lm_head.weight = torch.nn.Parameter(torch.randn(END + 1, 32))  # one tied to the embeddings repeats the last token for ever
    ours = generate.generate(Generator(model, Policy(max_new_tokens=12)), prompts)
    assert ours == [theirs(model, prompt, 12, END) for prompt in prompts]
    assert len(set(ours)) > 1


def test_a_row_ends_where_the_config_says(token_ids):
    model = reader("llama")
    free = generate.generate(Generator(model, Policy(max_new_tokens=10)), PROMPTS)
    end = free[0][4]
    model.base.eos_token_id = [END, ord(end)]
    ended = generate.generate(Generator(model, Policy(max_new_tokens=10)), PROMPTS)
    assert ended == [text.partition(end)[0] for text in free]
    assert len(ended[0]) <= 4
    assert max(map(len, ended)) == 10


def test_a_sample_does_not_depend_on_its_companions(token_ids):
    generator = Generator(reader("gpt2"), Policy(temperature=1.0, top_p=0.9, max_new_tokens=12))
    together = generate.generate(generator, PROMPTS, seed=3)
    assert together == [generate.generate(generator, [prompt], seed=3)[0] for prompt in PROMPTS]
    assert generate.generate(generator, PROMPTS[::-1], seed=3) == together[::-1]
    assert all(one != other for one, other in zip(together, generate.generate(generator, PROMPTS, seed=4), strict=True))
    assert len(set(generate.generate(generator, ["Rain"] * 4, seed=3))) == 4


def test_a_tiny_top_p_is_greedy(token_ids):
    model = reader("llama")
    greedy = generate.generate(Generator(model, Policy(max_new_tokens=12)), PROMPTS)
    assert generate.generate(Generator(model, Policy(temperature=1.0, top_p=1e-9, max_new_tokens=12)), PROMPTS, seed=1) == greedy
    assert generate.generate(Generator(model, Policy(temperature=1e-4, max_new_tokens=12)), PROMPTS, seed=1) == greedy


def test_frequencies_are_the_softmax(token_ids):
    model, draws = reader("llama"), 4000
    ids = torch.tensor([END, *model.tokenizer("Rain")["input_ids"]])[None]
    with torch.no_grad():
        wanted = (model.network(ids).logits[0, -1].double() / 0.5).softmax(-1).numpy() * draws
    counted = Counter(generate.generate(Generator(model, Policy(temperature=0.5, max_new_tokens=1)), ["Rain"] * draws))
    seen = np.array([counted["" if token == END else chr(token)] for token in range(END + 1)])
    often = wanted >= 5
    assert often.sum() > 10
    result = stats.chisquare([*seen[often], seen[~often].sum()], [*wanted[often], wanted[~often].sum()])
    assert result.pvalue > 0.01


def test_top_p_keeps_the_smallest_set():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    draws = (torch.arange(800) + 0.5) / 800

    def shares(top_p: float) -> list[float]:
        chosen = choose(logits.expand(len(draws), -1), Policy(temperature=1.0, top_p=top_p), draws)
        return [round((chosen == token).double().mean().item(), 3) for token in range(4)]

    assert shares(1.0) == [0.15, 0.5, 0.05, 0.3]
    assert shares(0.7) == [0.0, 0.625, 0.0, 0.375]  # 5/8 and 3/8: the second is needed to reach 0.7
    assert shares(0.9) == pytest.approx([3 / 19, 10 / 19, 0.0, 6 / 19], abs=0.002)
    assert shares(0.4) == [0.0, 1.0, 0.0, 0.0]


def test_temperature_divides_logits():
    logits = torch.tensor([[0.0, 1.0]])
    draws = (torch.arange(1000) + 0.5) / 1000
    chosen = choose(logits.expand(len(draws), -1), Policy(temperature=0.5), draws)
    assert chosen.double().mean().item() == pytest.approx(1 / (1 + np.exp(-2.0)), abs=0.002)


def test_stop_strings_cut(token_ids):
    model, short = reader("llama"), Policy(temperature=1.0, max_new_tokens=20)
    whole = generate.generate(Generator(model, short), PROMPTS, seed=2)
    pair, letter = whole[0][2:4], whole[1][6]
    stop = (letter, pair[1], pair)  # two of them are there at once: the one that begins first counts
    expected = [min((text.partition(string)[0] for string in stop), key=len) for text in whole]
    assert generate.generate(Generator(model, replace(short, stop=stop)), PROMPTS, seed=2) == expected
    assert [len(text) for text in expected[:2]] == [2, 6]
    assert max(map(len, expected)) == 20


def test_a_stop_string_ends_the_work(token_ids):
    model, short = reader("llama"), Policy(temperature=1.0, max_new_tokens=20)
    (whole,) = generate.generate(Generator(model, short), ["Rain"], seed=2)
    with cost.metered() as bill:
        generate.generate(Generator(model, replace(short, stop=(whole[:2],))), ["Rain"], seed=2)
    assert bill.tokens == 5 + 1  # the prompt, and the first of the two letters


def test_a_completion_is_the_text_of_its_tokens():
    model = reader("gpt2")
    wanted = [model.tokenizer.decode([ord(letter) for letter in theirs(model, prompt, 12, END)]) for prompt in PROMPTS]
    assert generate.generate(Generator(model, Policy(max_new_tokens=12)), PROMPTS) == wanted


def test_a_completion_keeps_its_first_space():
    model = reader("llama")
    spaced = model.tokenizer("a b")["input_ids"]
    assert generate._text(model, np.array([END, spaced[0]]), spaced[1:]) == " b"


def test_a_saved_generator_completes_alike(tmp_path):
    model = cut("llama").frozen_now()
    generator = Generator(model, Policy(temperature=0.8, top_p=0.9, max_new_tokens=10, stop=("x",)))
    generator.save(tmp_path)
    again = Generator.load(tmp_path)
    assert again.policy == generator.policy
    assert generate.generate(again, PROMPTS, seed=5) == generate.generate(generator, PROMPTS, seed=5)


def test_rows_are_refilled_reported_and_billed(monkeypatch, token_ids):
    monkeypatch.setattr(decode, "ROWS", {"cpu": 2})
    model, reports = reader("llama"), []
    with cost.metered() as bill, progress.listening(reports.append):
        split = generate.generate(Generator(model, Policy(max_new_tokens=4)), PROMPTS)
    assert split == [theirs(model, prompt, 4) for prompt in PROMPTS]
    lengths = sorted(map(len, batch.encode(model, Corpus(PROMPTS))))
    assert bill.tokens == sum(lengths) + 3 * len(PROMPTS)
    assert [(item.done, item.total) for item in reports] == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_uneven_completions_do_not_depend_on_who_is_beside_them(name, temperature, token_ids, monkeypatch):
    model, prompts = reader(name), [f"{word} {place}" for place in range(3) for word in ("Rain", "The tide went out and", "x")]
    one = Generator(model, Policy(temperature=temperature, max_new_tokens=30, stop=("e", "\x07")))
    together = generate.generate(one, prompts, seed=4)
    assert together == [generate.generate(one, [prompt], seed=4)[0] for prompt in prompts]
    monkeypatch.setattr(decode, "ROWS", {"cpu": 2})
    monkeypatch.setattr(decode, "WORTH", 1)
    assert generate.generate(one, prompts, seed=4) == together
    if temperature:
        assert len({len(text) for text in together}) > 2  # rows did end at different times


class Lookup(Guide):
    """Proposes what came after the last token the last time, right or wrong."""

    def propose(self, context: np.ndarray) -> list[int]:
        places = np.flatnonzero(context[:-1] == context[-1])
        return context[places[-1] + 1 : places[-1] + 4].tolist() if len(places) else [7, 8]


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_proposals_change_how_fast_but_not_what(temperature, token_ids, monkeypatch):
    model = reader("llama")
    plain = Generator(model, Policy(temperature=temperature, max_new_tokens=25))
    passes = []
    monkeypatch.setattr(decode.Slots, "begin", lambda slots, width, dtype, begin=decode.Slots.begin: (passes.append(width), begin(slots, width, dtype))[1])
    expected = generate.generate(plain, PROMPTS, seed=1)
    alone = len(passes)
    passes.clear()
    assert generate.generate(plain, PROMPTS, seed=1, guide=Lookup()) == expected
    assert max(passes) > 1
    if temperature == 0:  # a small network repeats itself
        assert len(passes) < alone


class Only(Guide):
    """Nothing but a few letters, of which one never twice."""

    def adjust(self, logits: torch.Tensor, context: np.ndarray) -> torch.Tensor:
        kept = torch.full_like(logits, -np.inf)
        kept[[10, 11, 12]] = logits[[10, 11, 12]]
        return kept

    def forbidden(self, context: np.ndarray) -> list[int]:
        return [int(context[-1])]


@pytest.mark.parametrize("name", ["llama", "mamba", "t5"])
def test_a_guide_rules(name, token_ids):
    model = reader(name)
    for temperature in (0.0, 1.0):
        for text in generate.generate(Generator(model, Policy(temperature=temperature, max_new_tokens=12)), ["Rain", "The tide"], guide=Only()):
            assert set(map(ord, text)) <= {10, 11, 12}
            assert len(text) == 12
            assert all(one != other for one, other in itertools.pairwise(text))


def test_what_cannot_be_completed():
    assert generate.generate(Generator(reader("llama")), []) == []
    with pytest.raises(InputError, match="reads 64 tokens"):
        generate.generate(Generator(reader("gpt2"), Policy(max_new_tokens=40)), ["a" * 25])
    generate.generate(Generator(reader("gpt2"), Policy(max_new_tokens=40)), ["a" * 24])
    with pytest.raises(InputError, match="masked"):
        generate.generate(Generator(reader("bert")), ["a"])


# Endpoints.


class Server(BaseHTTPRequestHandler):
    """Answers with what the test put there, and keeps what it was asked."""

    asked: list[tuple[str, dict[str, str], dict]] = []  # noqa: RUF012
    status, answer, location, wait = 200, "", "", threading.Event()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append((self.path, dict(self.headers), body))
        if self.answer == "wait":
            self.wait.wait(5)
        self.send_response(self.status)
        if self.location:
            self.send_header("Location", self.location)
        self.end_headers()
        text = json.dumps({"choices": [{"text": body["prompt"].upper() + " END more"}], "usage": {"total_tokens": 7}})
        self.wfile.write((self.answer or text).encode())

    do_GET = do_POST  # noqa: N815

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch):
    for name, value in {"asked": [], "status": 200, "answer": "", "location": "", "wait": threading.Event()}.items():
        monkeypatch.setattr(Server, name, value)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there: loopback must not go through it
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1/", "tiny", "ETUDE_TEST_KEY")
    Server.wait.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endpoint_is_asked_for_every_prompt(endpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("ETUDE_TEST_KEY", "secret")
    Generator(endpoint, Policy(temperature=0.7, top_p=0.9, max_new_tokens=9, stop=(" END",))).save(tmp_path)
    with cost.metered() as bill:
        assert generate.generate(Generator.load(tmp_path), ["one", "two", "one"], seed=1) == ["ONE", "TWO", "ONE"]
    assert bill.tokens == 21
    assert {path for path, _, _ in Server.asked} == {"/v1/completions"}
    assert {headers["Authorization"] for _, headers, _ in Server.asked} == {"Bearer secret"}
    seeds = [body.pop("seed") for _, _, body in Server.asked]
    assert len(set(seeds)) == 3
    assert Server.asked[0][2] == {"model": "tiny", "prompt": "one", "max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "stop": [" END"]}


def test_without_a_key_none_is_sent(endpoint, monkeypatch):
    monkeypatch.delenv("ETUDE_TEST_KEY", raising=False)
    assert generate.generate(Generator(endpoint), ["one"]) == ["ONE END more"]
    assert "Authorization" not in Server.asked[0][1]
    assert "stop" not in Server.asked[0][2]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"status": 401, "answer": "bad key"}, "answered 401 Unauthorized: bad key"),
        ({"status": 500, "answer": "on fire"}, "answered 500 .*on fire"),
        ({"status": 302, "location": "/elsewhere"}, "answered 302"),
        ({"answer": "not json"}, "no completion: not json"),
        ({"answer": '{"choices": []}'}, "no completion"),
        ({"answer": "wait"}, "did not answer within 0.2 seconds"),
    ],
)
def test_a_server_that_refuses(endpoint, monkeypatch, fields, match):
    monkeypatch.setattr("etude.engine.endpoint.TIMEOUT", 0.2)
    for name, value in fields.items():
        monkeypatch.setattr(Server, name, value)
    with pytest.raises(InputError, match=match):
        generate.generate(Generator(endpoint), ["one"])
    assert len(Server.asked) == 1


def test_no_server_at_all():
    with pytest.raises(InputError, match="cannot be reached"):
        generate.generate(Generator(Endpoint("http://127.0.0.1:9", "tiny")), ["one"])
    with pytest.raises(InputError, match="begins with http"):
        generate.generate(Generator(Endpoint("file:///etc", "tiny")), ["one"])
