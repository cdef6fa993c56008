"""What is done to rows and to scores in attention on the CPU, as functions for jitted code.

Addresses are in bytes; nothing checks what lies there. `element` is a number whose type says what caches hold: uint16
stands for bfloat16.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from kernels import numba_ir as code
from kernels.simd import LANES

_LINE = 64  # bytes


@intrinsic
def int32_at(_typing_context, address, index):
    """An int32 of an array, as an int64."""

    def generate(_context, builder, _signature, arguments):
        place = code.pointer(builder, arguments[0], code.I32)
        return builder.sext(builder.load(builder.gep(place, [arguments[1]])), code.I64)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def put_int32(_typing_context, address, index, value):
    """Write an element of an array of int32."""

    def generate(context, builder, _signature, arguments):
        place = code.pointer(builder, arguments[0], code.I32)
        value_ = builder.trunc(arguments[2], code.I32)
        builder.store(value_, builder.gep(place, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def put_int64(_typing_context, address, index, value):
    """Write an element of an array of int64."""

    def generate(context, builder, _signature, arguments):
        place = code.pointer(builder, arguments[0], code.I64)
        builder.store(arguments[2], builder.gep(place, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def int64_at(_typing_context, address, index):
    """An int64 of an array."""

    def generate(_context, builder, _signature, arguments):
        place = code.pointer(builder, arguments[0], code.I64)
        return builder.load(builder.gep(place, [arguments[1]]))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def float_at(_typing_context, address, index):
    """A float32 of an array."""

    def generate(_context, builder, _signature, arguments):
        place = code.pointer(builder, arguments[0])
        return builder.load(builder.gep(place, [arguments[1]]))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def put_float(_typing_context, address, index, value):
    """Write an element of an array of float32."""

    def generate(context, builder, _signature, arguments):
        place = code.pointer(builder, arguments[0])
        builder.store(arguments[2], builder.gep(place, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def touch_rows(_typing_context, base, slots, stride, size, count, sink):
    """Read a byte of each cache line of the `size` bytes of `count` rows, `stride` bytes apart; their sum goes to `sink`.

    Rows are those whose numbers are the int64 at `slots`.
    """

    def generate(context, builder, _signature, arguments):
        base_, slots_, stride_, size_, count_, sink_ = arguments
        places = code.pointer(builder, slots_, code.I64)

        def row(index, values):
            start = builder.add(
                base_, builder.mul(code.load(builder, places, index, code.I64), stride_)
            )

            def line(at, values):
                byte = builder.load(code.pointer(builder, builder.add(start, at), ir.IntType(8)))
                return [builder.add(values[0], builder.zext(byte, code.I64))]

            return code.repeat(builder, (code.number(0), size_, _LINE), list(values), line)

        total = code.repeat(builder, (code.number(0), count_, 1), [code.number(0)], row)
        builder.store(total[0], code.pointer(builder, sink_, code.I64))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def copy_bytes(_typing_context, target, source, count):
    """Copy `count` bytes between places that do not overlap."""

    def generate(context, builder, _signature, arguments):
        byte = ir.IntType(8)
        to, from_ = (code.pointer(builder, address, byte) for address in arguments[:2])
        cgutils.raw_memcpy(builder, to, from_, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def fill(_typing_context, address, count, value):
    """Write `count` equal float32."""

    def generate(context, builder, _signature, arguments):
        place = code.pointer(builder, arguments[0])

        def write(at, _values):
            builder.store(arguments[2], builder.gep(place, [at]))
            return []

        code.repeat(builder, (code.number(0), arguments[1], 1), [], write)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def take(_typing_context, counter):
    """Add one to the int64 at an address and give what was there; who comes later sees all that was written before."""

    def generate(_context, builder, _signature, arguments):
        place = code.pointer(builder, arguments[0], code.I64)
        return builder.atomic_rmw("add", place, code.number(1), "acq_rel")

    return types.int64(types.int64), generate


@intrinsic
def call(_typing_context, function, argument):
    """Call the function at an address, which takes an int64."""

    def generate(context, builder, _signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [code.I64])
        builder.call(code.pointer(builder, arguments[0], kind), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def exp2(_typing_context, _power):
    """2 to the power, as `numba_ir.exp2`."""

    def generate(_context, builder, _signature, arguments):
        powers = code.exp2(builder, code.splat(builder, arguments[0]))
        return builder.extract_element(powers, ir.Constant(code.I32, 0))

    return types.float32(types.float32), generate


@intrinsic
def join_row(_typing_context, total, total_weight, addend, weight, dim):
    """Total = total * total_weight + addend * weight, over whole chunks of float32."""

    def generate(context, builder, _signature, arguments):
        target, source = (code.pointer(builder, arguments[at]) for at in (0, 2))
        kept, added = (code.splat(builder, arguments[at]) for at in (1, 3))

        def step(at, _values):
            before = builder.fmul(code.load(builder, target, at), kept)
            after = code.fma(builder, code.load(builder, source, at), added, before)
            code.store(builder, after, target, at)
            return []

        code.repeat(builder, (code.number(0), arguments[4], LANES), [], step)
        return context.get_dummy_value()

    floats, ints = types.float32, types.int64
    return types.void(ints, floats, ints, floats, ints), generate


@intrinsic(prefer_literal=True)
def copy_row(_typing_context, element, source, target, dim, scale, is_in_order):
    """Write a row, widened to float32 and scaled, to `target`, padded with zeros to whole chunks.

    `is_in_order` is a literal: 0 leaves the elements of a chunk as `numba_ir.load_pair` gives them.
    """
    is_kept = is_in_order.literal_value

    def generate(context, builder, signature, arguments):
        _, source_, target_, dim_, scale_, _ = arguments
        kind = code.element_type(signature.args[0])
        row, copy = code.pointer(builder, source_, kind), code.pointer(builder, target_)
        factor = code.splat(builder, scale_)

        def chunk(at, left, _values):
            pair = code.load_pair(builder, row, at, left)
            if is_kept:
                pair = code.in_order(builder, kind, pair)
            for side, half in enumerate(pair):
                where = builder.add(at, code.number(side * LANES))
                code.store(builder, builder.fmul(half, factor), copy, where)
            return []

        code.over_chunks(builder, dim_, [], chunk)
        return context.get_dummy_value()

    return types.void(
        element, types.int64, types.int64, types.int64, types.float32, is_in_order
    ), generate


@intrinsic(prefer_literal=True)
def write_row(_typing_context, element, source, target, dim, factor, is_in_order):
    """Write `dim` float32 times `factor` as elements of the cache's type: rounded to nearest, ties to even.

    `is_in_order` is a literal: 0 means that chunks are as `numba_ir.load_pair` gives them.
    """
    is_kept = is_in_order.literal_value

    def generate(context, builder, signature, arguments):
        _, source_, target_, dim_, factor_, _ = arguments
        kind = code.element_type(signature.args[0])
        row, out = code.pointer(builder, source_), code.pointer(builder, target_, kind)
        times = code.splat(builder, factor_)
        rest = cgutils.alloca_once(builder, kind, size=code.CHUNK)

        def chunk(at, _left, _values):
            left = builder.sub(dim_, at)
            places = [builder.add(at, code.number(side * LANES)) for side in (0, 1)]
            loaded = [builder.fmul(code.load(builder, row, place), times) for place in places]
            pair = (loaded[0], loaded[1])
            pair = pair if is_kept else code.in_order(builder, kind, pair)
            halves = [code.narrowed(builder, kind, half) for half in pair]
            is_whole = builder.icmp_signed(">=", left, code.number(code.CHUNK))
            place = builder.select(is_whole, builder.gep(out, [at]), rest)
            for side, half in enumerate(halves):
                code.store(builder, half, place, code.number(side * LANES))
            with builder.if_then(builder.not_(is_whole)):
                code.copy(builder, rest, builder.gep(out, [at]), left)
            return []

        code.over_chunks(builder, dim_, [], chunk)
        return context.get_dummy_value()

    ints = [types.int64] * 3
    return types.void(element, *ints, types.float32, is_in_order), generate


@intrinsic
def cap_scores(_typing_context, scores, count, cap):
    """Replace `count` scores, whole vectors, by cap * tanh(score / cap)."""

    def generate(context, builder, _signature, arguments):
        place, limit = code.pointer(builder, arguments[0]), code.splat(builder, arguments[2])

        def cap_vector(at, _values):
            score = code.load(builder, place, at)
            code.store(builder, code.capped(builder, score, limit), place, at)
            return []

        code.repeat(builder, (code.number(0), arguments[1], LANES), [], cap_vector)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def largest(_typing_context, scores, count):
    """The largest of `count` float32, whole vectors, none of which is NaN."""

    def generate(_context, builder, _signature, arguments):
        place = code.pointer(builder, arguments[0])

        def compare(at, values):
            return [code.maximum(builder, values[0], code.load(builder, place, at))]

        least = code.constant(float("-inf"))
        bounds = (code.number(0), arguments[1], LANES)
        (found,) = code.repeat(builder, bounds, [least], compare)
        return code.across(builder, code.maximum, found)

    return types.float32(types.int64, types.int64), generate


@intrinsic
def weigh_scores(_typing_context, scores, count, highest):
    """Replace `count` scores, whole vectors, by 2^(score - highest); gives their sum."""

    def generate(_context, builder, _signature, arguments):
        place, top = code.pointer(builder, arguments[0]), code.splat(builder, arguments[2])

        def weigh(at, values):
            weight = code.exp2(builder, builder.fsub(code.load(builder, place, at), top))
            code.store(builder, weight, place, at)
            return [builder.fadd(values[0], weight)]

        bounds = (code.number(0), arguments[1], LANES)
        (total,) = code.repeat(builder, bounds, [code.constant(0.0)], weigh)
        return code.across(builder, lambda b, left, right: b.fadd(left, right), total)

    return types.float32(types.int64, types.int64, types.float32), generate
