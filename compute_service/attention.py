"""The attention function that `transformers` models call in place of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from transformers import AttentionInterface

from kernels.batch import AttentionParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from kernels.batch import PagedBatch
    from kernels.launcher import Kernels

NAME: Final = "quire_paged"


@dataclass(frozen=True, slots=True)
class PagedContext:
    """What one forward pass hands through the model to every attention call, as keyword `paged`."""

    kernels: Kernels
    caches: Sequence[tuple[Tensor, Tensor]]  # by layer_idx
    batch: PagedBatch

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """Store the new keys and values of a layer, then attend through the block tables.

        Args:
            layer_idx: names the cache.
            query: `[T, num_heads, k_head_dim]`.
            key: `[T, num_kv_heads, k_head_dim]`.
            value: `[T, num_kv_heads, v_head_dim]`.
            params: how keys are scored.

        Returns:
            `[T, num_heads, v_head_dim]`, of the query's dtype.
        """
        key_cache, value_cache = self.caches[layer_idx]
        dtype = query.dtype
        if dtype is not key_cache.dtype:
            query, key, value = (found.to(key_cache.dtype) for found in (query, key, value))
        self.kernels.store_kv(key, value, key_cache, value_cache, self.batch.slot_mapping)
        output = self.kernels.paged_attention(query, key_cache, value_cache, self.batch, params)
        return output if output.dtype is dtype else output.to(dtype)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 -- transformers looks for a parameter of this name
    *,
    paged: PagedContext,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_others: Any,  # noqa: ANN401 -- whatever else a model passes to its attention
) -> tuple[Tensor, None]:
    """`PagedContext.attend`, as models call attention.

    Args:
        module: the attention layer, with a `layer_idx`.
        query: `[1, num_heads, T, k_head_dim]`.
        key: `[1, num_kv_heads, T, k_head_dim]`.
        value: `[1, num_kv_heads, T, v_head_dim]`.
        attention_mask: None; the batch says who sees what.
        paged: block tables and caches of this pass.
        scaling: factor of the dot product; None: `k_head_dim ** -0.5`.
        sliding_window: tokens that a query sees; None: all.
        softcap: cap of the scores.
        s_aux: sinks, `[num_heads]`.

    Returns:
        `[1, T, num_heads, v_head_dim]` and no weights.
    """
    params = AttentionParams(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window or 0,
        soft_cap=softcap or 0.0,
        sinks=s_aux,
    )
    queries, keys, values = (found[0].transpose(0, 1) for found in (query, key, value))
    output = paged.attend(int(module.layer_idx), queries, keys, values, params)  # type: ignore[arg-type]
    return output.unsqueeze(0), None


def register() -> None:
    """Let models find `attend` under NAME."""
    AttentionInterface.register(NAME, attend)
