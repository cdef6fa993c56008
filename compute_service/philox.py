"""Noise without state: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_MASK: Final = 0xFFFFFFFF
_ROUNDS: Final = 10
_MANTISSA_BITS: Final = 53


_Word = TypeVar("_Word", int, "NDArray[Any]")


def philox_4x32(
    counter: tuple[_Word, _Word, _Word, _Word], key: tuple[_Word, _Word]
) -> tuple[_Word, ...]:
    """Four random words of 32 bits, a pure function of counter and key (words of 32 bits each, or arrays of them)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> 32) ^ c1 ^ k0,
            second & _MASK,
            (first >> 32) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(
    seeds: Sequence[int], sample_indexes: Sequence[int], positions: Sequence[int]
) -> NDArray[np.float64]:
    """Numbers in [0, 1), one for each token: seed of 64 bits, which sample of its request, position in its sequence."""
    seed, sample_index, position = (
        np.array(found, dtype=np.uint64) for found in (seeds, sample_indexes, positions)
    )
    nothing = np.zeros_like(seed)
    words = philox_4x32((position, sample_index, nothing, nothing), (seed & _MASK, seed >> 32))
    bits = ((words[0] << 32) | words[1]) >> (64 - _MANTISSA_BITS)
    numbers: NDArray[np.float64] = bits / float(1 << _MANTISSA_BITS)
    return numbers
