"""What attention runs over: the packed batch, and how scores are made."""

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
    # Known to the host, so that a launch never waits for the device:
    max_query_len: int  # most tokens that a sequence runs
    max_context_len: int  # largest of `context_lens`


@dataclass(frozen=True, slots=True)
class KvScales:
    """What an fp8 cache is multiplied by to give keys and values."""

    key: Tensor  # float32 [num_kv_heads]
    value: Tensor  # float32 [num_kv_heads]


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """How a layer scores keys."""

    scale: float  # factor of the dot product
    sliding_window: int = 0  # tokens that a query sees, itself included; 0: all
    soft_cap: float = 0.0  # 0: none
    sinks: Tensor | None = (
        None  # [num_heads] logits that take part in the softmax and weigh nothing
    )
    kv_scales: KvScales | None = None  # with an fp8 cache, and only then
