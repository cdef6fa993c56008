"""The operations of `kernels.sampling` on the CPU: a task for each row, compiled by numba.

A row is never sorted. Thresholds are found in a histogram over the upper halves of weights, then among the weights of one
bin; the cumulative distribution is searched by sums of whole runs of tokens first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kernels.numba_scalars import (
    as_double,
    as_int,
    as_long,
    exp_of_negative,
    order_key,
    widen_element,
)
from kernels.numba_setup import njit, prange

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.sampling import Draws

_RUN = 1024  # tokens that are summed before they are searched
_NUM_BINS = 1 << 15
_LOWEST_KEY = np.int32(-(1 << 31))
_INFINITE_KEY = np.int32(0x7F800000)
_MAGNITUDE = np.int32(0x7FFFFFFF)


@njit(cache=True)
def _highest(row, begin, end):
    """The largest key in [begin, end), and the largest without its sign: above infinity's it is of a NaN."""
    highest, largest = _LOWEST_KEY, np.int32(0)
    for i in range(begin, end):
        logit = widen_element(row[i])
        highest = max(highest, order_key(logit))
        largest = max(largest, as_int(logit) & _MAGNITUDE)
    return highest, largest


@njit(cache=True)
def _most_likely_of(row):
    """The first token of the largest logit, and whether there is a NaN."""
    best, first, largest_of_all = _LOWEST_KEY, 0, np.int32(0)
    for begin in range(0, len(row), _RUN):
        highest, largest = _highest(row, begin, min(begin + _RUN, len(row)))
        largest_of_all = max(largest_of_all, largest)
        if highest > best:
            best, first = highest, begin
    while order_key(widen_element(row[first])) < best:
        first += 1
    return first, largest_of_all > _INFINITE_KEY


@njit(parallel=True, cache=True)
def _most_likely(logits, token_ids, is_broken):
    for row in prange(len(logits)):
        token_ids[row], is_broken[row] = _most_likely_of(logits[row])


@njit(error_model="numpy", fastmath={"contract"}, cache=True)
def _weigh(row, highest, temperature, weights):
    for i in range(len(weights)):
        scaled = (np.float64(row[i]) - highest) / temperature
        weights[i] = exp_of_negative(scaled)


@njit(fastmath={"reassoc"}, cache=True)
def _sum(weights, begin, end):
    total = 0.0
    for i in range(begin, end):
        total += weights[i]
    return total


@njit(cache=True)
def _bin(weight):
    """Of a weight in [0, 1]: the upper half of its float32, which falls in order."""
    return np.int64(as_int(np.float32(weight)) >> np.int32(16))


@njit(cache=True)
def _reach(weights, least, by_mass):
    """How many weights are not below `least`, or their mass."""
    total = 0.0
    for weight in weights:
        if weight >= least:
            total += weight if by_mass else 1.0
    return total


@njit(cache=True)
def _least_reaching(weights, floor, wanted, by_mass):
    """The largest number for which the weights not below it reach `wanted`; weights below `floor` do not count."""
    bins = np.zeros(_NUM_BINS)
    for weight in weights:
        if weight >= floor:
            bins[_bin(weight)] += weight if by_mass else 1.0
    above, at = 0.0, _NUM_BINS - 1
    while at > 0 and above + bins[at] < wanted:
        above += bins[at]
        at -= 1
    members, count, low, high = np.empty(len(weights)), 0, 1.0, 0.0
    for weight in weights:
        if weight >= floor and _bin(weight) == at:
            members[count] = weight
            count += 1
            low, high = min(low, weight), max(high, weight)
    # Numbers that are not negative are ordered as their bits: halve those between the two.
    first, last = as_long(low), as_long(high)
    while first < last:
        middle = (first + last + 1) // 2
        if above + _reach(members[:count], as_double(middle), by_mass) >= wanted:
            first = middle
        else:
            last = middle - 1
    return as_double(first)


@njit(cache=True)
def _keep(weights, top_k, top_p, min_p):
    """Make weights 0 that one of the thresholds leaves out."""
    least = 0.0
    # One call in a loop: at each place where it stands the compiler takes all of it apart anew.
    for by_mass in (False, True):
        if top_p < 1 if by_mass else 0 < top_k < len(weights):
            wanted = top_p * _reach(weights, least, True) if by_mass else top_k
            least = _least_reaching(weights, least, wanted, by_mass)
    least = max(least, min_p)
    if least > 0:
        for i in range(len(weights)):
            weights[i] = weights[i] if weights[i] >= least else 0.0


@njit(cache=True)
def _pick(weights, noise):
    """The first token at which the cumulative weight is above the noise's share of all, or the last that can be."""
    num_runs = (len(weights) + _RUN - 1) // _RUN
    sums = np.empty(num_runs)
    for run in range(num_runs):
        sums[run] = _sum(weights, run * _RUN, min((run + 1) * _RUN, len(weights)))
    wanted, before, run = noise * sums.sum(), 0.0, 0
    while run < num_runs - 1 and before + sums[run] <= wanted:
        before += sums[run]
        run += 1
    for i in range(run * _RUN, len(weights)):
        before += weights[i]
        if before > wanted:
            return i
    # Rounding left the number at the very end.
    last = len(weights) - 1
    while weights[last] == 0:
        last -= 1
    return last


@njit(cache=True)
def _highest_logit(row):
    highest = np.float32(-np.inf)
    for i in range(len(row)):
        highest = max(highest, row[i])
    return highest


@njit(cache=True)
def _draw_of(row, settings):
    temperature, top_k, top_p = settings[0], settings[1], settings[2]
    weights = np.empty(len(row))
    _weigh(row, _highest_logit(row), temperature, weights)
    _keep(weights, top_k, top_p, settings[3])
    return _pick(weights, settings[4])


@njit(parallel=True, cache=True)
def _draw(logits, settings, token_ids):
    for row in prange(len(logits)):
        token_ids[row] = _draw_of(logits[row], settings[row])


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.sampling.most_likely`."""
    if logits.dtype == torch.bfloat16:
        elements = logits.contiguous().view(torch.uint16).numpy()
    else:
        elements = logits.float().contiguous().numpy()
    token_ids = np.empty(len(logits), dtype=np.int64)
    is_broken = np.empty(len(logits), dtype=np.bool_)
    _most_likely(elements, token_ids, is_broken)
    return torch.from_numpy(token_ids), torch.from_numpy(is_broken)


def draw(logits: Tensor, draws: Draws) -> Tensor:
    """See `kernels.sampling.draw`."""
    token_ids = np.empty(len(logits), dtype=np.int64)
    settings = (draws.temperatures, draws.top_ks, draws.top_ps, draws.min_ps, draws.noise)
    # One array of float64: the compiler takes a second for each further one.
    _draw(logits.contiguous().numpy(), np.stack(settings, axis=1, dtype=np.float64), token_ids)
    return torch.from_numpy(token_ids)
