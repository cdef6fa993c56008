"""llama.cpp with continuous batching: decodes and chunks of prompts together in batches of 512 tokens.

    python -m bench.peer_engines.llama_cpp_driver FILE.gguf

Its own server does this loop over one slot a sequence; here it is written on the library, so that nothing but the library
takes time. What prompts that arrive together have in common is computed once and copied, which the server would not do.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import llama_cpp as api
import numpy as np

from bench.peer_engines.wire import Arrivals, Request, TokenTimes, serve, warm_up_requests

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_BATCHED_TOKENS = 512  # as Quire's
CONTEXT_STEP = 256  # contexts are multiples of it
LEAST_SHARED = 32  # tokens from which sharing pays


@dataclass(slots=True)
class Running:
    """A request that has arrived and not ended; its sequence id is its place."""

    request: Request
    known: list[int]  # prompt and output
    times: TokenTimes
    num_computed: int = 0

    @property
    def is_running(self) -> bool:
        """Whether tokens are still owed."""
        return len(self.times) < self.request.num_output


class Context:
    """Keys and values for some sequences, and the batch that is filled for each step."""

    def __init__(self, model: Any, num_seqs: int, num_tokens: int) -> None:  # noqa: ANN401 -- a pointer
        options = api.llama_context_default_params()
        options.n_seq_max = num_seqs
        options.n_ctx = num_seqs * (-(-num_tokens // CONTEXT_STEP) * CONTEXT_STEP)
        options.n_batch = options.n_ubatch = MAX_BATCHED_TOKENS
        options.n_threads = options.n_threads_batch = os.cpu_count() or 1
        options.kv_unified = False  # a sequence looks only through its own keys
        self._context = api.llama_init_from_model(model, options)
        self._num_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_batch_init(MAX_BATCHED_TOKENS, 0, 1)

    def close(self) -> None:
        """Free it."""
        api.llama_batch_free(self._batch)
        api.llama_free(self._context)

    def step(self, running: dict[int, Running]) -> list[int]:
        """Run what fits into one batch; the places of sequences whose next token is known now, appended to `known`."""
        batch, ends = self._batch, {}
        batch.n_tokens = 0
        # One token is owed by each that decodes; they come first.
        for place, found in sorted(running.items(), key=lambda item: left_to_run(item[1])):
            num_tokens = min(left_to_run(found), MAX_BATCHED_TOKENS - batch.n_tokens)
            self._add(place, found, num_tokens)
            if num_tokens and not left_to_run(found):
                batch.logits[batch.n_tokens - 1] = 1
                ends[place] = batch.n_tokens - 1
        self._decode()
        for place, index in ends.items():
            running[place].known.append(self._best_token(index))
        return list(ends)

    def share(self, prompt: list[int], places: Sequence[int]) -> None:
        """Compute the leading tokens `prompt` in the first sequence of `places` and copy them into the others."""
        found = Running(Request(0.0, prompt, 0), prompt, [])
        while left_to_run(found):
            self._batch.n_tokens = 0
            self._add(places[0], found, min(left_to_run(found), MAX_BATCHED_TOKENS))
            self._decode()
        memory = api.llama_get_memory(self._context)
        for place in places[1:]:
            api.llama_memory_seq_cp(memory, places[0], place, -1, -1)

    def _add(self, place: int, found: Running, num_tokens: int) -> None:
        batch = self._batch
        for position in range(found.num_computed, found.num_computed + num_tokens):
            at = batch.n_tokens
            batch.token[at], batch.pos[at] = found.known[position], position
            batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, place, 0
            batch.n_tokens += 1
        found.num_computed += num_tokens

    def _decode(self) -> None:
        if code := api.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode answered {code}; 1 means that the context is full")

    def _best_token(self, index: int) -> int:
        logits = api.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, (self._num_vocab,)).argmax())


def left_to_run(found: Running) -> int:
    """Tokens that are known and not computed."""
    return len(found.known) - found.num_computed


class LlamaCppEngine:
    """One model; each run has a context of its own, sized for its requests and made before its clock starts."""

    def __init__(self, path: str) -> None:
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(
            path.encode(), api.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}; its log says why")

    def about(self) -> dict[str, str]:
        """Of the library's defaults."""
        name = f"llama.cpp of llama-cpp-python {version('llama-cpp-python')}"
        return {
            "version": name,
            "precision": "weights and inputs of products bfloat16, KV f16",
        }

    def run(self, requests: list[Request]) -> list[TokenTimes]:
        """Step until all are answered."""
        times: list[TokenTimes] = [[] for _ in requests]
        running: dict[int, Running] = {}
        with self._context_for(requests) as context:
            arrivals = Arrivals(requests)
            while arrivals or running:
                if arrived := dict(arrivals.due()):
                    running |= begin(context, arrived, times)
                if not running:
                    arrivals.sleep()
                    continue
                for place in context.step(running):
                    times[place].append(arrivals.now())
                running = {place: found for place, found in running.items() if found.is_running}
        return times

    @contextmanager
    def _context_for(self, requests: list[Request]) -> Iterator[Context]:
        longest = max(len(request.prompt) + request.num_output for request in requests)
        context = Context(self._model, len(requests), longest)
        yield context
        context.close()


def begin(
    context: Context, arrived: dict[int, Request], times: list[TokenTimes]
) -> dict[int, Running]:
    """Those that arrived together, with what they share computed."""
    running = {
        place: Running(request, list(request.prompt), times[place])
        for place, request in arrived.items()
    }
    shared = common_prefix([request.prompt for request in arrived.values()])
    if len(arrived) > 1 and len(shared) >= LEAST_SHARED:
        context.share(shared, list(arrived))
        for found in running.values():
            found.num_computed = len(shared)
    return running


def common_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """The leading tokens that all of them have."""
    columns = zip(*prompts, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def log_warnings(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """Its log tells of every tensor; what matters is a warning (3) or an error (4)."""
    if level in {3, 4}:
        sys.stderr.write(text.decode(errors="replace"))


def main(arguments: Sequence[str]) -> None:
    """Load, warm up, serve."""
    callback = api.llama_log_callback(log_warnings)  # kept alive as long as the library is used
    api.llama_log_set(callback, ctypes.c_void_p(0))
    engine = LlamaCppEngine(arguments[0])
    engine.run(warm_up_requests())
    serve(engine)


if __name__ == "__main__":
    main(sys.argv[1:])
