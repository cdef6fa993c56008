"""A few tokens through block tables: the logits must be the model's own, whoever runs beside."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from compute_service.forward import ForwardPass
from compute_service.refusal import ModelRefused
from kernels.batch import PagedBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from kernels.launcher import Kernels
    from quire.pool_layout import LayerGeometry

BLOCK_SIZE = 4
# Largest difference of logits, as a share of the largest logit.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


class PagedProbe:
    """Packed passes over a small pool of its own that holds two sequences of the same tokens.

    Args:
        model: with our attention in place.
        kernels: of the device.
        layers: geometry of each KV layer.
        token_ids: int64 `[T]`, the probe's tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        kernels: Kernels,
        layers: Sequence[LayerGeometry],
        token_ids: Tensor,
    ) -> None:
        self._token_ids = token_ids
        self._dtype = next(model.parameters()).dtype
        num_blocks = -(-len(token_ids) // BLOCK_SIZE)
        tables = torch.arange(2 * num_blocks, dtype=torch.int32, device=token_ids.device)
        self._tables = tables.view(2, -1)
        caches = [self._cache(layer) for layer in layers]
        self._forward = ForwardPass(model, kernels, caches)

    def _cache(self, layer: LayerGeometry) -> tuple[Tensor, Tensor]:
        shape, device = (self._tables.numel(), BLOCK_SIZE, layer.num_kv_heads), self._tables.device
        return (
            torch.zeros(*shape, layer.k_head_dim, dtype=self._dtype, device=device),
            torch.zeros(*shape, layer.v_head_dim, dtype=self._dtype, device=device),
        )

    def check_logits(self, expected: Tensor, cuts: Sequence[tuple[int, int]]) -> None:
        """Both sequences, side by side in chunks `[begin, end)`, against the model's own logits `[T, vocab]`.

        Raises:
            ModelRefused: when they differ by more than rounding.
        """
        chunks = [self._run_chunk(begin, end) for begin, end in cuts]
        for found in zip(*chunks, strict=True):
            difference = self._excess(torch.cat(found), expected)
            if difference is not None:
                raise ModelRefused(
                    f"through block tables its logits differ by {difference:.3g} from its own"
                )

    def check_neighbours(self, max_model_len: int) -> None:
        """Beside a token at the last position that is served, the probe's logits must not change.

        Raises:
            ModelRefused: when they do.
        """
        tokens, count, device = self._token_ids, len(self._token_ids), self._token_ids.device
        positions = torch.arange(count, device=device)
        alone = self._forward(
            tokens, positions, batch_of(self._tables[:1], [(0, count)]), positions
        )
        # Only the position is far away: what it attends to is one slot of its own.
        last = torch.tensor([max_model_len - 1], device=device)
        beside = self._forward(
            torch.cat([tokens[:1], tokens]),
            torch.cat([last, positions]),
            batch_of(self._tables.flip(0), [(0, 1), (0, count)]),
            positions + 1,
        )
        difference = self._excess(beside, alone)
        if difference is not None:
            raise ModelRefused(
                f"its logits change by {difference:.3g} when another sequence of {max_model_len} tokens runs "
                "beside; a shorter --max-model-len may avoid that"
            )

    def _run_chunk(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Logits of `[begin, end)` in both sequences."""
        count, device = end - begin, self._token_ids.device
        positions = torch.arange(begin, end, device=device)
        logits = self._forward(
            self._token_ids[begin:end].repeat(2),
            positions.repeat(2),
            batch_of(self._tables, [(begin, end), (begin, end)]),
            torch.arange(2 * count, device=device),
        )
        return logits[:count], logits[count:]

    def _excess(self, found: Tensor, expected: Tensor) -> float | None:
        """The largest difference when it is more than rounding."""
        difference = float((found - expected).abs().max())
        allowed = _TOLERANCES[self._dtype] * float(expected.abs().max())
        return None if difference <= allowed else difference


def batch_of(tables: Tensor, spans: Sequence[tuple[int, int]]) -> PagedBatch:
    """A batch in which sequences run positions `[begin, end)`; those that run one come first.

    Args:
        tables: int32 `[S, blocks]`, of blocks of `BLOCK_SIZE`.
        spans: S pairs (begin, end).
    """
    device = tables.device
    counts = [end - begin for begin, end in spans]
    slots = [
        table[positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        for table, (begin, end) in zip(tables, spans, strict=True)
        for positions in (torch.arange(begin, end, device=device),)
    ]
    starts = [0, *accumulate(counts)]
    return PagedBatch(
        block_tables=tables,
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor([end for _, end in spans], dtype=torch.int32, device=device),
        slot_mapping=torch.cat(slots),
        num_decodes=sum(count == 1 for count in counts),
        max_query_len=max(counts),
        max_context_len=max(end for _, end in spans),
    )
