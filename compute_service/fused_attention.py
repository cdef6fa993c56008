"""Attention layers with one product for queries, keys and values, and little between that and our kernels.

A layer's own code says once what it asks of attention: it runs on random input with a recorder in the kernels' place. Its
replacement has to ask the same.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch

from compute_service.equivalence import STEP_OF_BF16, agree, random_rows
from compute_service.joined_linear import join_if

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from kernels.batch import AttentionParams

    Rotary: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    Attention: TypeAlias = Callable[..., tuple[Tensor, None]]

_PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj")
# Of a layer's forward. One that asks for more, as for positions, may compute with it.
_KNOWN_ARGUMENTS: Final = {
    *("hidden_states", "position_embeddings", "attention_mask", "past_key_values"),
    *("cache_position", "kwargs"),
}
_NUM_TOKENS: Final = 2
_FAR_POSITION: Final = 1 << 20


class _Recorder:
    """In place of a `PagedContext`: keeps what it is asked, and answers with numbers of its own."""

    def __init__(self) -> None:
        self.asked: tuple[Tensor, ...] = ()
        self.params: AttentionParams | None = None

    def attend(
        self, _layer_idx: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """As `PagedContext.attend`."""
        self.asked, self.params = (query, key, value), params
        num_tokens, num_heads, _ = query.shape
        return random_rows(num_heads * value.shape[2])[0, -num_tokens:].unflatten(
            -1, (num_heads, -1)
        )


def fuse_attention(module: Any, rotary: Rotary) -> Attention | None:  # noqa: ANN401 -- nn.Module's attributes have no types
    """A forward in place of a layer's own, whose three projections become one module; None when it differs.

    Args:
        module: the layer, in bfloat16, which calls the attention function that `compute_service.attention` registers.
        rotary: turns queries and keys, `[T, heads, head_dim]`, as the layer does.
    """
    if not set(inspect.signature(module.forward).parameters) <= _KNOWN_ARGUMENTS:
        return None
    theirs, ours = _Recorder(), _Recorder()
    expected = _run(module.forward, module, theirs)
    if theirs.params is None:
        return None
    num_heads = [getattr(module, name).out_features // module.head_dim for name in _PROJECTIONS]
    forward = _joined_forward(module, num_heads, rotary, theirs.params)

    def is_same() -> bool:
        return agree(_run(forward, module, ours), expected) and _asked_the_same(ours, theirs)

    return forward if join_if(module, _PROJECTIONS, "qkv_proj", is_same) else None


def _joined_forward(
    module: Any,  # noqa: ANN401 -- as above
    num_heads: list[int],
    rotary: Rotary,
    params: AttentionParams,
) -> Attention:
    layer_idx, head_dim, num_all_heads = int(module.layer_idx), int(module.head_dim), sum(num_heads)
    has_norms = hasattr(module, "q_norm")

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *,
        paged: Any,  # noqa: ANN401 -- a PagedContext or what records
        **_others: object,
    ) -> tuple[Tensor, None]:
        heads = module.qkv_proj(hidden_states).view(-1, num_all_heads, head_dim)
        query, key, value = heads.split_with_sizes(num_heads, 1)
        if has_norms:
            query, key = module.q_norm(query), module.k_norm(key)
        query, key = rotary(query, key, *position_embeddings)
        output = paged.attend(layer_idx, query, key, value, params)
        return module.o_proj(output.flatten(1)[None]), None

    return forward


def _run(forward: Attention, module: Any, recorder: _Recorder) -> Tensor:  # noqa: ANN401 -- as above
    """What the layer gives for two tokens at far positions."""
    generator = torch.Generator().manual_seed(1)
    angles = torch.randn(1, _NUM_TOKENS, module.head_dim, generator=generator)
    output: Tensor = forward(
        hidden_states=random_rows(module.q_proj.in_features)[:, -_NUM_TOKENS:],
        position_embeddings=(angles.cos().bfloat16(), angles.sin().bfloat16()),
        attention_mask=None,
        position_ids=torch.arange(_FAR_POSITION, _FAR_POSITION + _NUM_TOKENS)[None],
        paged=recorder,
    )[0]
    return output


def _asked_the_same(ours: _Recorder, theirs: _Recorder) -> bool:
    # A rotation may cancel all but the rounding of what is rotated.
    pairs = zip(ours.asked, theirs.asked, strict=True)
    return all(agree(our, their, STEP_OF_BF16 * float(their.abs().max())) for our, their in pairs)
