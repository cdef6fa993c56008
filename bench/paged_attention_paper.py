"""What the PagedAttention paper prints (arXiv 2309.06180), by baseline, or by requests; None stands for vLLM."""

from __future__ import annotations

from bench.contiguous_load import Reservation
from bench.length_distributions import ALPACA, FIVE_SHOT, ONE_SHOT, SHAREGPT

# Figure 2: share of the KV memory with token states, percent.
PAPER_POOL_SHARE = {
    Reservation.MAX: 20.4,
    Reservation.POW2: 26.8,
    Reservation.ORACLE: 38.2,
    None: 96.3,  # vLLM
}
# Figure 13: requests in a batch, OPT-13B; ShareGPT at 2 requests a second, Alpaca at 30.
PAPER_AT_ONCE = {
    SHAREGPT.name: dict(zip([*Reservation, None], [7.00, 9.81, 13.62, 30.42], strict=True)),
    ALPACA.name: dict(zip([*Reservation, None], [7.00, 43.24, 72.75, 132.44], strict=True)),
}
# Figure 15 for Alpaca, by number of samples or beams; for ShareGPT section 6.3 gives the ends.
PAPER_SAMPLES = {
    ALPACA.name: {2: 6.09, 4: 8.53, 6: 9.79},
    SHAREGPT.name: {2: 16.2, 6: 30.5},
}
PAPER_BEAMS = {
    ALPACA.name: {2: 37.56, 4: 53.13, 6: 55.16},
    SHAREGPT.name: {2: 44.3, 6: 66.3},
}
# Section 6.4: throughput beside Orca (Oracle).
PAPER_PREFIX = {ONE_SHOT.name: 1.67, FIVE_SHOT.name: 3.58}
