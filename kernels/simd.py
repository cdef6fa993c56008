"""Tiles of vectors for numba: of a loop over arrays LLVM alone makes no product whose sums stay in registers.

A `Tile` of n is n vectors of `LANES` float32, spelled out when it is compiled, in variables of jitted functions alone.
Addresses are integers, in bytes; nothing checks what lies there, and nothing needs to be aligned.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model


def _count_lanes() -> int:
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx2") else 4


LANES: Final = _count_lanes()
"""How many float32 a register of this host holds."""

_Value: TypeAlias = Any  # llvmlite brings no types

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
_VECTOR, _INTEGERS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_HALVES = ir.VectorType(_I16, LANES)
_BF16_BYTES, _F32_BYTES = 2, 4


class Tile(types.Type):
    """`count` vectors."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(name=f"Tile({count} x {LANES})")


@register_model(Tile)
class _TileModel(models.PrimitiveModel):  # type: ignore[misc]  # numba brings no types
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, ir.ArrayType(_VECTOR, kind.count))


@intrinsic(prefer_literal=True)
def zero_tile(_typing_context, count):
    """A tile of `count` (a literal) vectors of zeros."""
    kind = Tile(count.literal_value)

    def generate(_context, _builder, _signature, _arguments):
        return ir.Constant(ir.ArrayType(_VECTOR, kind.count), None)

    return kind(count), generate


@intrinsic
def add_outer_product(_typing_context, tile, x_at, x_stride, w_at):
    """Add x w^T to a tile of rows of two vectors: x a float32 a row, w the 2 `LANES` bfloat16 at `w_at`.

    Row r takes the float32 at `x_at + r * x_stride`. Of w the even elements are one vector, the odd ones another:
    bfloat16 is a float32's upper half, so that an instruction widens as many as a register holds.
    """

    def generate(_context, builder, _signature, arguments):
        sums, x_address, stride, w_address = arguments
        pairs = _load(builder, w_address, _INTEGERS)
        even = builder.shl(pairs, _each(16))
        odd = builder.and_(pairs, _each(0xFFFF0000))
        columns = [builder.bitcast(part, _VECTOR) for part in (even, odd)]
        for row in range(tile.count // len(columns)):
            number = _broadcast(builder, _load(builder, x_address, _F32))
            for side, column in enumerate(columns):
                index = len(columns) * row + side
                total = _fma(builder, number, column, builder.extract_value(sums, index))
                sums = builder.insert_value(sums, total, index)
            x_address = builder.add(x_address, stride)
        return sums

    return tile(tile, x_at, x_stride, w_at), generate


@intrinsic
def prefetch(_typing_context, address):
    """Ask for the line at an address, which need not exist, to be brought into the second cache."""

    def generate(context, builder, _signature, arguments):
        pointer = _pointer(builder, arguments[0], ir.IntType(8))
        # Of the three levels of locality that LLVM knows, beside none, the middle one is the second cache.
        read, second_cache, data = (ir.Constant(_I32, value) for value in (0, 2, 1))
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, read, second_cache, data])
        return context.get_dummy_value()

    return types.void(address), generate


@intrinsic
def add_tile_to(_typing_context, tile, sums_at, stride):
    """Add a tile of rows of two vectors to float32 sums; row r lies at `sums_at + r * stride`."""

    def generate(context, builder, _signature, arguments):
        vectors, address, row_stride = arguments
        for row in range(tile.count // 2):
            for side in range(2):
                pointer = _pointer(builder, _plus(builder, address, side), _VECTOR)
                vector = builder.extract_value(vectors, 2 * row + side)
                total = builder.fadd(builder.load(pointer, align=_F32_BYTES), vector)
                builder.store(total, pointer, align=_F32_BYTES)
            address = builder.add(address, row_stride)
        return context.get_dummy_value()

    return types.void(tile, sums_at, stride), generate


@intrinsic
def store_bf16_sum(_typing_context, left_at, right_at, out_at):
    """Write left + right, vectors of float32, as bfloat16: rounded to nearest, ties to even."""

    def generate(context, builder, _signature, arguments):
        left, right = (_load(builder, address, _VECTOR) for address in arguments[:2])
        total = builder.fadd(left, right)
        pointer = _pointer(builder, arguments[2], _HALVES)
        builder.store(_round_to_bf16(builder, total), pointer, align=_BF16_BYTES)
        return context.get_dummy_value()

    return types.void(left_at, right_at, out_at), generate


def _round_to_bf16(builder: ir.IRBuilder, vector: _Value) -> _Value:
    bits = builder.bitcast(vector, _INTEGERS)
    last_kept_bit = builder.and_(builder.lshr(bits, _each(16)), _each(1))
    rounded = builder.add(bits, builder.add(last_kept_bit, _each(0x7FFF)))
    # To round could carry what is no number over into a number.
    is_number = builder.fcmp_ordered("ord", vector, vector)
    upper = builder.lshr(builder.select(is_number, rounded, _each(0x7FC00000)), _each(16))
    return builder.trunc(upper, _HALVES)


def _load(builder: ir.IRBuilder, address: _Value, kind: ir.Type) -> _Value:
    return builder.load(_pointer(builder, address, kind), align=_F32_BYTES)


def _pointer(builder: ir.IRBuilder, address: _Value, kind: ir.Type) -> _Value:
    return builder.inttoptr(address, kind.as_pointer())


def _plus(builder: ir.IRBuilder, address: _Value, num_vectors: int) -> _Value:
    return builder.add(address, ir.Constant(address.type, num_vectors * LANES * _F32_BYTES))


def _each(value: int) -> _Value:
    return ir.Constant(_INTEGERS, [value] * LANES)


def _broadcast(builder: ir.IRBuilder, number: _Value) -> _Value:
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, first, _each(0))


def _fma(builder: ir.IRBuilder, *operands: _Value) -> _Value:
    # llvmlite's own `fma` takes scalars alone.
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    return builder.call(function, operands)
