"""The packed batch that attention runs over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """T packed tokens of S sequences; sequences that run one token come first.

    Sequence s has the packed tokens `[query_start[s], query_start[s + 1])`, which are the last ones of its first
    `context_lens[s]` tokens. Token p of a sequence lies in slot `block_tables[s, p // block_size] * block_size + p %
    block_size`.
    """

    block_tables: Tensor  # int32 [S, widest table]; 0 behind a table's end
    query_start: Tensor  # int32 [S + 1]
    context_lens: Tensor  # int32 [S], at least the tokens run
    slot_mapping: Tensor  # int64 [T]; -1: nothing is stored
    num_decodes: int  # sequences at the front that run one token
