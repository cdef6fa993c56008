"""One packed forward pass of an unchanged `transformers` model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compute_service.attention import PagedContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from kernels.batch import PagedBatch
    from kernels.launcher import Kernels


class ForwardPass:
    """Runs T packed tokens as one row; only the positions asked for meet the LM head."""

    def __init__(
        self, model: nn.Module, kernels: Kernels, caches: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._caches = caches

    @torch.inference_mode()
    def __call__(
        self, token_ids: Tensor, position_ids: Tensor, batch: PagedBatch, output_rows: Tensor
    ) -> Tensor:
        """Logits `[n, vocab]`, of the model's dtype, of the packed positions `output_rows` (int64 `[n]`).

        Args:
            token_ids: int64 `[T]`.
            position_ids: int64 `[T]`, each within its own sequence.
            batch: block tables and slots of the tokens.
            output_rows: may be empty.
        """
        output = self._model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            logits_to_keep=output_rows,
            paged=PagedContext(self._kernels, self._caches, batch),
        )
        logits: Tensor = output.logits[0]
        return logits
