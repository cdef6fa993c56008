"""The products of attention on the CPU, and a panel's softmax, for jitted code; conventions as in `numba_rows`."""

from __future__ import annotations

from typing import Final

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from kernels import numba_ir as code
from kernels.simd import LANES

PART: Final = 256  # keys of a decode's part
KEYS_TOGETHER: Final = 8
_KEYS_IN_REGISTERS = {
    1: 8,
    2: 4,
    3: 2,
    4: 2,
}  # by query heads: at most 8 sums, the rest of 16 registers holds operands
_ACROSS: Final = 3  # vectors
DOWN: Final = (
    4  # rows of a product that are computed together; with `_ACROSS`, 12 sums of 16 registers
)
ROWS: Final = _ACROSS * LANES  # of a panel
STATE: Final = (
    3 * ROWS
)  # float32: maximum, sum and the factor of what was summed before, of each row


@intrinsic(prefer_literal=True)
def score_keys(_typing_context, element, heads, query, query_stride, keys, slots, row, dim, scores):
    """Dot products of `heads` (a literal) queries with `KEYS_TOGETHER` keys, to `scores`, rows of `PART`.

    Queries are rows of `query_stride` float32 as `copy_row` wrote them; keys are those in the int64 `slots`, whose rows
    are `row` elements apart and begin at `keys`.
    """
    num_heads = heads.literal_value

    def generate(context, builder, signature, arguments):
        _, _, query_, stride, keys_, slots_, row_, dim_, scores_ = arguments
        kind = code.element_type(signature.args[0])
        base, queries = code.pointer(builder, keys_, kind), code.pointer(builder, query_)
        found = _rows(builder, base, slots_, row_)
        out = code.pointer(builder, scores_)
        together = _KEYS_IN_REGISTERS[num_heads]
        for first in range(0, KEYS_TOGETHER, together):
            sums = _dot_products(
                builder, (queries, stride, num_heads), found[first : first + together], dim_
            )
            _store_sums(builder, sums, out, num_heads, first)
        return context.get_dummy_value()

    ints = [types.int64] * 7
    return types.void(element, heads, *ints), generate


def _rows(builder, base, slots, row):
    """Pointers to the rows of `KEYS_TOGETHER` slots."""
    places = code.pointer(builder, slots, code.I64)
    found = [
        code.load(builder, places, code.number(index), code.I64) for index in range(KEYS_TOGETHER)
    ]
    return [builder.gep(base, [builder.mul(slot, row)]) for slot in found]


def _dot_products(builder, queries, keys, dim):
    """Vectors whose lanes sum up to the products of each query, by each key."""
    place, stride, num_heads = queries
    offsets = [builder.mul(code.number(head), stride) for head in range(num_heads)]

    def chunk(at, left, sums):
        pairs = [code.load_pair(builder, key, at, left) for key in keys]
        sums = list(sums)
        for side in (0, 1):
            where = builder.add(at, code.number(side * LANES))
            for head, offset in enumerate(offsets):
                query = code.load(builder, place, builder.add(offset, where))
                for index, pair in enumerate(pairs):
                    position = head * len(keys) + index
                    sums[position] = code.fma(builder, query, pair[side], sums[position])
        return sums

    zeros = [code.constant(0.0)] * (num_heads * len(keys))
    return code.over_chunks(builder, dim, zeros, chunk)


def _store_sums(builder, sums, out, num_heads, first_key):
    """Write the sums over lanes, by head and key, to rows of `PART` at `first_key`."""
    together = len(sums) // num_heads
    filled = [*sums, *[sums[0]] * (code.SUMS - len(sums))]
    total = code.horizontal_sums(builder, filled)
    for head in range(num_heads):
        lanes = list(range(head * together, (head + 1) * together))
        picks = ir.Constant(ir.VectorType(code.I32, together), lanes)
        part = builder.shuffle_vector(total, total, picks)
        code.store(builder, part, out, code.number(head * PART + first_key))


@intrinsic(prefer_literal=True)
def add_values(
    _typing_context, element, heads, weights, values, slots, row, dim, total, total_stride
):
    """Add `KEYS_TOGETHER` rows of values to `heads` (a literal) rows at `total`, each times its weight.

    Weights are rows of `PART` float32; totals rows of `total_stride`, their chunks as `numba_ir.load_pair` gives them.
    """
    num_heads = heads.literal_value

    def generate(context, builder, signature, arguments):
        _, _, weights_, values_, slots_, row_, dim_, total_, stride = arguments
        kind = code.element_type(signature.args[0])
        found = _rows(builder, code.pointer(builder, values_, kind), slots_, row_)
        weigh = code.pointer(builder, weights_)
        totals = code.pointer(builder, total_)
        starts = [builder.mul(code.number(head), stride) for head in range(num_heads)]

        def chunk(at, left, _values):
            places = [
                builder.add(builder.add(start, at), code.number(side * LANES))
                for start in starts
                for side in (0, 1)
            ]
            sums = [code.load(builder, totals, place) for place in places]
            for index, value in enumerate(found):
                pair = code.load_pair(builder, value, at, left)
                for head in range(num_heads):
                    offset = code.number(head * PART + index)
                    weight = code.splat(builder, code.load(builder, weigh, offset, code.F32))
                    for side in (0, 1):
                        place = 2 * head + side
                        sums[place] = code.fma(builder, weight, pair[side], sums[place])
            for place, total_sum in zip(places, sums, strict=True):
                code.store(builder, total_sum, totals, place)
            return []

        code.over_chunks(builder, dim_, [], chunk)
        return context.get_dummy_value()

    ints = [types.int64] * 7
    return types.void(element, heads, *ints), generate


@intrinsic(prefer_literal=True)
def multiply(
    _typing_context, left, left_row, left_step, right, count, product, factors, has_factors
):
    """`DOWN` rows of product = left @ right, plus what was there times `factors` if `has_factors` (a literal) is 1.

    `left[row, k]` is at `left + row * left_row + k * left_step`, in float32 elements; right and product are `[.., ROWS]`.
    """
    is_added = has_factors.literal_value

    def generate(context, builder, _signature, arguments):
        left_, left_row_, left_step_, right_, count_, product_, factors_, _ = arguments
        columns, out = code.pointer(builder, right_), code.pointer(builder, product_)
        starts = [
            builder.gep(code.pointer(builder, left_), [builder.mul(code.number(row), left_row_)])
            for row in range(DOWN)
        ]
        sums = [code.constant(0.0)] * (DOWN * _ACROSS)
        if is_added:
            sums = _faded(builder, out, code.pointer(builder, factors_))

        def step(k, sums):
            vectors = _vectors(builder, columns, builder.mul(k, code.number(ROWS)))
            at, sums = builder.mul(k, left_step_), list(sums)
            for row, start in enumerate(starts):
                factor = code.splat(builder, code.load(builder, start, at, code.F32))
                for index, vector in enumerate(vectors):
                    place = row * _ACROSS + index
                    sums[place] = code.fma(builder, factor, vector, sums[place])
            return sums

        sums = code.repeat(builder, (code.number(0), count_, 1), sums, step)
        for place, total in enumerate(sums):
            code.store(builder, total, out, code.number(place * LANES))
        return context.get_dummy_value()

    ints = [types.int64] * 7
    return types.void(*ints, has_factors), generate


def _vectors(builder, place, offset):
    return [
        code.load(builder, place, builder.add(offset, code.number(index * LANES)))
        for index in range(_ACROSS)
    ]


def _faded(builder, out, factors):
    """What `DOWN` rows at `out` hold, times the factor of their column."""
    fades = _vectors(builder, factors, code.number(0))
    return [
        builder.fmul(vector, fade)
        for row in range(DOWN)
        for vector, fade in zip(_vectors(builder, out, code.number(row * ROWS)), fades, strict=True)
    ]


@intrinsic
def weigh_panel(_typing_context, scores, count, first_key, positions, window, state):
    """Turn scores `[count, ROWS]` of the keys from position `first_key` on into weights, and bring `state` up to date.

    A row at position p (int32) sees the keys in `(p - window, p]`; weights are relative to the largest score so far.
    """

    def generate(context, builder, _signature, arguments):
        scores_, count_, first_key_, positions_, window_, state_ = arguments
        place, at_state = code.pointer(builder, scores_), code.pointer(builder, state_)
        rows = _sights(builder, positions_, window_)
        highest, total = (_vectors(builder, at_state, code.number(at * ROWS)) for at in (0, 1))
        bounds = (code.number(0), count_, 1)

        def hide(key, tops):
            offset = builder.mul(key, code.number(ROWS))
            position = builder.trunc(builder.add(first_key_, key), code.I32)
            seen = [
                _seen(builder, score, position, row)
                for score, row in zip(_vectors(builder, place, offset), rows, strict=True)
            ]
            _put(builder, seen, place, offset)
            return [
                code.maximum(builder, top, score) for top, score in zip(tops, seen, strict=True)
            ]

        tops = code.repeat(builder, bounds, highest, hide)
        # Where no key was seen yet, any finite number does in place of the maximum.
        nothing = code.constant(float("-inf"))
        finite = [
            builder.select(builder.fcmp_ordered("==", top, nothing), code.constant(0.0), top)
            for top in tops
        ]

        def weigh(key, sums):
            offset = builder.mul(key, code.number(ROWS))
            weights = [
                code.exp2(builder, builder.fsub(score, top))
                for score, top in zip(_vectors(builder, place, offset), finite, strict=True)
            ]
            _put(builder, weights, place, offset)
            return [builder.fadd(sum_, weight) for sum_, weight in zip(sums, weights, strict=True)]

        fades = [
            code.exp2(builder, builder.fsub(old, top))
            for old, top in zip(highest, finite, strict=True)
        ]
        kept = [builder.fmul(sum_, fade) for sum_, fade in zip(total, fades, strict=True)]
        sums = code.repeat(builder, bounds, kept, weigh)
        for index, vectors in enumerate((tops, sums, fades)):
            _put(builder, vectors, at_state, code.number(index * ROWS))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


def _sights(builder, positions, window):
    """Of each vector of rows the last position that they see, and the one before the first."""
    place = code.pointer(builder, positions, code.I32)
    width = code.splat(builder, builder.trunc(window, code.I32), code.INTEGERS)
    lasts = [
        code.load(builder, place, code.number(index * LANES), code.INTEGERS)
        for index in range(_ACROSS)
    ]
    return [(last, builder.sub(last, width)) for last in lasts]


def _seen(builder, score, position, row):
    """Scores of the key at `position`, -inf for rows that do not see it."""
    last, before = row
    key = code.splat(builder, position, code.INTEGERS)
    is_seen = builder.and_(
        builder.icmp_signed("<=", key, last), builder.icmp_signed(">", key, before)
    )
    return builder.select(is_seen, score, code.constant(float("-inf")))


def _put(builder, vectors, place, offset):
    for index, vector in enumerate(vectors):
        code.store(builder, vector, place, builder.add(offset, code.number(index * LANES)))
