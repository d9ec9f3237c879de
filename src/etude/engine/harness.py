"""The engine as a model of EleutherAI's lm-eval, so that its tasks run on it.

How texts become tokens, what is cut off and what is taken for an answer stays lm-eval's own (`HFLM`); what is computed is the engine's.  Needs the extra ``harness``.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from etude.engine import generate, score
from etude.values.generator import Policy
from etude.values.model import Model

ALL = 1 << 30
"""As a batch size: whatever is asked, at once; the engine makes its own batches."""
AT_ONCE = 8
"""Rows of a batch that lm-eval computes itself."""
TAKEN = {"do_sample", "temperature", "top_p", "until", "max_gen_toks"}
"""Settings of generation that the engine has; with others, lm-eval generates itself."""


class Harnessed(HFLM):  # type: ignore[misc]
    """A model as lm-eval sees it."""

    def __init__(self, model: Model, seed: int = 0):
        backend = "seq2seq" if model.kind == "seq2seq" else "causal"
        super().__init__(pretrained=model.network, tokenizer=copy.deepcopy(model.tokenizer), backend=backend, batch_size=ALL, device=str(model.network.device))
        self.value, self.seed = model, seed

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: int | None = None) -> list[tuple[float, bool]]:
        if self.backend != "causal":
            self.batch_size_per_gpu = AT_ONCE
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs and AT_ONCE)  # type: ignore[no-any-return]
        texts = [np.array((context + continuation)[-(self.max_length + 1) :], np.int64) for _, context, continuation in requests]
        given = [len(text) - len(continuation) for text, (_, _, continuation) in zip(texts, requests, strict=True)]
        answers = [(float(found.logs.sum()), bool(np.all(found.greedy))) for found in score.likelihoods(self.value, texts, given, greedy=True, note="answering")]
        for (asked, _, _), answer in zip(requests, answers, strict=True):
            if asked is not None:  # a window of a longer text has no name in lm-eval's cache
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        settings = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        if self.backend != "causal" or any(set(one) - TAKEN or one.get("temperature", 0.0) < 0 for one in settings):
            self.batch_size_per_gpu = AT_ONCE
            return super().generate_until(requests, disable_tqdm)  # type: ignore[no-any-return]
        found = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: repr(sorted(settings[index].items())))
        for _, group in itertools.groupby(order, key=lambda index: repr(sorted(settings[index].items()))):
            chosen = list(group)
            for index, text in zip(chosen, self._continued([requests[index].args[0] for index in chosen], dict(settings[chosen[0]])), strict=True):
                found[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return found

    def _continued(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        """What follows contexts that share their settings."""
        until = handle_stop_sequences(settings["until"], eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False))
        room = self.max_length - settings["max_gen_toks"]
        assert room > 0, f"max_gen_toks {settings['max_gen_toks']} is no less than the {self.max_length} tokens that the model reads"
        prompts = [np.array(self.tok_encode(context, left_truncate_len=room), np.int64) for context in contexts]
        policy = Policy(
            temperature=settings.get("temperature", 0.0) if settings["do_sample"] else 0.0,
            top_p=settings.get("top_p", 1.0), max_new_tokens=settings["max_gen_toks"], stop=tuple(text for text in until if text),
        )  # fmt: skip
        new = generate.complete(self.value, policy, prompts, [self.seed + index for index in range(len(prompts))])
        return [postprocess_generated_text(self.tok_decode(ids), stop=until, think_end_token=None) for ids in new]
