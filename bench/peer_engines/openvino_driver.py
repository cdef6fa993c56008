"""OpenVINO GenAI's continuous batching: paged attention, chunked prefill, prefix cache.

python -m bench.peer_engines.openvino_driver FOLDER   # what optimum-cli exported
"""

from __future__ import annotations

import os
import sys
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import openvino
import openvino_genai as genai

from bench.peer_engines.wire import Arrivals, Request, TokenTimes, serve, warm_up_requests

if TYPE_CHECKING:
    from collections.abc import Sequence

CACHE_GIB = 1
MAX_BATCHED_TOKENS, MAX_SEQS = 512, 64  # as Quire's


class OpenVinoEngine:
    """One pipeline, its precisions left to it: those it chooses are its fastest."""

    def __init__(self, folder: str) -> None:
        scheduling = genai.SchedulerConfig()
        scheduling.cache_size = CACHE_GIB
        scheduling.max_num_batched_tokens = MAX_BATCHED_TOKENS
        scheduling.max_num_seqs = MAX_SEQS
        scheduling.enable_prefix_caching = True
        scheduling.dynamic_split_fuse = True
        options = {"INFERENCE_NUM_THREADS": os.cpu_count()}
        self._pipeline = genai.ContinuousBatchingPipeline(folder, scheduling, "CPU", options)
        self._ids = count()

    def about(self) -> dict[str, str]:
        """What the CPU plugin chooses on this machine."""
        core = openvino.Core()
        precision = core.get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
        cache = core.get_property("CPU", "KV_CACHE_PRECISION").to_string()
        return {
            "version": f"OpenVINO GenAI {genai.get_version()}",
            "precision": f"weights f16, computes in {precision}, KV {cache}",
        }

    def run(self, requests: list[Request]) -> list[TokenTimes]:
        """Step until all are answered."""
        times: list[TokenTimes] = [[] for _ in requests]
        handles: dict[int, genai.GenerationHandle] = {}
        arrivals = Arrivals(requests)
        while arrivals or handles:
            handles |= {place: self._add(request) for place, request in arrivals.due()}
            if not handles:
                arrivals.sleep()
                continue
            self._pipeline.step()
            now = arrivals.now()
            for place, handle in handles.items():
                times[place] += [now] * num_new_tokens(handle)
            handles = {place: handle for place, handle in handles.items() if is_running(handle)}
        return times

    def _add(self, request: Request) -> genai.GenerationHandle:
        options = genai.GenerationConfig()
        options.max_new_tokens = options.min_new_tokens = request.num_output
        options.ignore_eos, options.do_sample = True, False
        prompt = openvino.Tensor(np.array([request.prompt], dtype=np.int64))
        return self._pipeline.add_request(next(self._ids), prompt, options)


def num_new_tokens(handle: genai.GenerationHandle) -> int:
    """Those that came since the last call."""
    number = 0
    while handle.can_read():
        number += sum(len(output.generated_ids) for output in handle.read().values())
    return number


def is_running(handle: genai.GenerationHandle) -> bool:
    """Whether more tokens will come."""
    return bool(handle.get_status() == genai.GenerationStatus.RUNNING)


def main(arguments: Sequence[str]) -> None:
    """Load, warm up, serve."""
    engine = OpenVinoEngine(arguments[0])
    engine.run(warm_up_requests())
    serve(engine)


if __name__ == "__main__":
    main(sys.argv[1:])
