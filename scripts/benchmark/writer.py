"""A language model in a process of its own, as `worker.py` is of an encoder: the same kinds of questions and answers.

{"do": "write", "ids": [..], "count": n} tells tokens and tokens a second, {"do": "read", "ids": [..]} prompt tokens a second,
{"do": "score", "windows": [[..], ..]} the negative log-likelihoods of each token but the first, summed a window.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from worker import loaded, resident, serve

Told = dict[str, Any]


class LlamaCpp:
    """llama.cpp on a GGUF file; its server listens on loopback and is asked in the process."""

    def __init__(self, path: str, threads: int, how: Told) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = path, 512, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity, params.n_gpu_layers, params.port, params.hostnames = -1, 0, 0, ["127.0.0.1"]
        self._server = xllamacpp.Server(params)
        self.bytes = Path(path).stat().st_size

    def _asked(self, ids: list[int], count: int, **how: Any) -> Told:
        told = self._server.handle_completions(
            {"prompt": ids, "max_tokens": count, "temperature": 0, "ignore_eos": True, "logprobs": 1, **how}
        )
        said: Told = json.loads(told) if isinstance(told, str) else told
        return said

    def write(self, ids: list[int], count: int) -> Told:
        """By llama.cpp's own clock."""
        told = self._asked(ids, count, cache_prompt=False)
        tokens = [one["id"] for one in told["choices"][0]["logprobs"]["content"]]
        return {"tokens": tokens, "a_second": float(told["timings"]["predicted_per_second"])}

    def read(self, ids: list[int]) -> Told:
        return {"a_second": float(self._asked(ids, 1, cache_prompt=False)["timings"]["prompt_per_second"])}

    def score(self, window: list[int]) -> float:
        """It tells the probability of what it writes alone, so it is made to write the text: each token by a bias that leaves
        the probabilities that are told as they are."""
        nll = 0.0
        for end in range(1, len(window)):
            told = self._asked(window[:end], 1, cache_prompt=True, ignore_eos=False, logit_bias=[[window[end], 1000.0]])
            said = told["choices"][0]["logprobs"]["content"][0]
            assert said["id"] == window[end], "it wrote another token than it was made to"
            nll -= said["logprob"]
        return nll


class Transformers:
    """A folder in transformers, as `worker.loaded` opens it."""

    def __init__(self, path: str, threads: int, how: Told) -> None:
        import torch

        self._torch = torch
        self._model, self.bytes = loaded(path, threads, how)

    def write(self, ids: list[int], count: int) -> Told:
        """The prompt is read before the clock starts, as llama.cpp counts."""
        torch = self._torch
        given = torch.tensor([ids])
        with torch.no_grad():
            said = self._model(given, use_cache=True)
            tokens = [int(said.logits[0, -1].argmax())]
            began = time.perf_counter()
            while len(tokens) < count:
                said = self._model(torch.tensor([tokens[-1:]]), past_key_values=said.past_key_values, use_cache=True)
                tokens.append(int(said.logits[0, -1].argmax()))
        return {"tokens": tokens, "a_second": (count - 1) / (time.perf_counter() - began)}

    def read(self, ids: list[int]) -> Told:
        began = time.perf_counter()
        with self._torch.no_grad():
            self._model(self._torch.tensor([ids]), logits_to_keep=1)
        return {"a_second": len(ids) / (time.perf_counter() - began)}

    def score(self, window: list[int]) -> float:
        ids = self._torch.tensor([window])
        with self._torch.no_grad():
            said = self._model(ids).logits[0, :-1].float().log_softmax(-1)
        return -float(said.gather(1, ids[0, 1:, None]).sum())


KINDS: dict[str, Any] = {"llama.cpp": LlamaCpp, "transformers": Transformers}


def answer(opened: Any, asked: Told) -> Told:
    """What a question is answered with."""
    if asked["do"] == "write":
        return dict(opened.write(asked["ids"], asked["count"]))
    if asked["do"] == "read":
        return dict(opened.read(asked["ids"]))
    if asked["do"] == "score":
        return {"nll": [opened.score(window) for window in asked["windows"]]}
    if asked["do"] == "weigh":
        return {"bytes": opened.bytes}
    return {"resident": resident()}


if __name__ == "__main__":
    serve(KINDS, answer)
