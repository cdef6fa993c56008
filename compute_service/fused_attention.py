"""Attention layers with one product for queries, keys and values, and little between that and our kernels.

A layer's own code says once what it asks of attention: it runs on random input with a recorder in the kernels' place. Its
replacement has to ask the same.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch

from compute_service.equivalence import STEP_OF_BF16, agree, random_rows
from compute_service.joined_linear import join_if
from kernels import numba_small_ops

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from kernels.batch import AttentionParams

    Attention: TypeAlias = Callable[..., tuple[Tensor, None]]

_PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj")
# Of a layer's forward. One that asks for more, as for positions, may compute with it.
_KNOWN_ARGUMENTS: Final = {
    *("hidden_states", "position_embeddings", "attention_mask", "past_key_values"),
    *("cache_position", "kwargs"),
}
_NUM_TOKENS: Final = 2
_FAR_POSITION: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class TokenRotary:
    """A model's rotary function, of queries and keys `[T, heads, head_dim]`."""

    theirs: Callable[..., tuple[Tensor, Tensor]]
    is_fused: bool  # `kernels.numba_small_ops` turns heads as they do

    def __call__(
        self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both, turned."""
        # A model may turn a part of each head alone.
        if self.is_fused and cos.shape[-1] == query.shape[-1] and cos.dtype is torch.bfloat16:
            return numba_small_ops.rotate_tokens(query, key, cos, sin)
        turned = self.theirs(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
        return turned[0][0].transpose(0, 1), turned[1][0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class JoinedAttention:
    """The forward of an attention layer."""

    module: Any  # with `qkv_proj` and `o_proj`
    layer_idx: int
    head_dim: int
    num_heads: tuple[int, int, int]  # of queries, keys and values
    has_norms: bool  # of heads
    rotary: TokenRotary
    params: AttentionParams

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *,
        paged: Any,  # noqa: ANN401 -- a PagedContext or what records
        **_others: object,
    ) -> tuple[Tensor, None]:
        """As theirs, which asks for more than it needs."""
        module = self.module
        heads = module.qkv_proj(hidden_states).view(-1, sum(self.num_heads), self.head_dim)
        query, key, value = heads.split_with_sizes(self.num_heads, 1)
        if self.has_norms:
            query, key = module.q_norm(query), module.k_norm(key)
        query, key = self.rotary(query, key, *position_embeddings)
        output = paged.attend(self.layer_idx, query, key, value, self.params)
        return module.o_proj(output.flatten(1)[None]), None


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
        rows = random_rows(num_heads * value.shape[2])[0, -num_tokens:]
        return rows.view(num_tokens, num_heads, -1)


def fuse_attention(module: Any, rotary: TokenRotary) -> JoinedAttention | None:  # noqa: ANN401 -- nn.Module's attributes have no types
    """A forward in place of a layer's own, whose three projections become one module; None when it differs.

    Args:
        module: the layer, in bfloat16, which calls the attention function that `compute_service.attention` registers.
        rotary: turns queries and keys as the layer does.
    """
    if not set(inspect.signature(module.forward).parameters) <= _KNOWN_ARGUMENTS:
        return None
    theirs, ours = _Recorder(), _Recorder()
    expected = _run(module.forward, module, theirs)
    if theirs.params is None:
        return None
    fused = _joined(module, rotary, theirs.params)

    def is_same() -> bool:
        return agree(_run(fused, module, ours), expected) and _asked_the_same(ours, theirs)

    return fused if join_if(module, _PROJECTIONS, "qkv_proj", is_same) else None


def _joined(module: Any, rotary: TokenRotary, params: AttentionParams) -> JoinedAttention:  # noqa: ANN401 -- as above
    query, key, value = (
        getattr(module, name).out_features // module.head_dim for name in _PROJECTIONS
    )
    return JoinedAttention(
        module,
        layer_idx=int(module.layer_idx),
        head_dim=int(module.head_dim),
        num_heads=(query, key, value),
        has_norms=hasattr(module, "q_norm"),
        rotary=rotary,
        params=params,
    )


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
