"""Pieces of LLVM code from which the attention kernels' inner loops are put together.

A function here appends instructions to a builder, while a kernel is compiled. Pointers are to float32 unless said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

from llvmlite import ir
from numba.core import types

from kernels.simd import LANES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VECTOR = ir.VectorType(F32, LANES)
INTEGERS = ir.VectorType(I32, LANES)
SUMS: Final = 8  # vectors that are summed up together
CHUNK: Final = 2 * LANES  # elements of a row that are read together

# 2^f for |f| <= 1/2: least squares over Chebyshev's nodes, reweighted until the largest relative error was least; it is
# 2e-9, so that rounding is all that is felt.
_EXP2 = (
    1.0,
    0.6931471824645996,
    0.24022646248340607,
    0.05550328642129898,
    0.009618489071726799,
    0.0013399930903688073,
    0.0001534581242594868,
)
_EXP2_LOWEST, _EXP2_HIGHEST = -126.0, 127.0  # exponents of normal numbers
_MANTISSA_BITS = 23
_BF16_SHIFT, _BF16_HALF_STEP, _BF16_NAN = 16, 0x7FFF, 0x7FC0
_TWO_LOG2_E = 2.8853900817779268

Value: TypeAlias = Any  # llvmlite brings no types


def number(value: int) -> Value:
    """An int64."""
    return ir.Constant(I64, value)


def splat(builder: ir.IRBuilder, scalar: Value, kind: ir.VectorType = VECTOR) -> Value:
    """A vector with the same element in each lane."""
    zero = ir.Constant(I32, 0)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, zero)
    lanes = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, first, lanes)


def constant(value: float) -> Value:
    """A vector of one float32."""
    return ir.Constant(VECTOR, [value] * LANES)


def pointer(builder: ir.IRBuilder, address: Value, kind: ir.Type = F32) -> Value:
    """An address as a pointer."""
    return builder.inttoptr(address, kind.as_pointer())


def load(builder: ir.IRBuilder, place: Value, offset: Value, kind: ir.Type = VECTOR) -> Value:
    """`kind` from `offset` elements behind `place`."""
    at = builder.bitcast(builder.gep(place, [offset]), kind.as_pointer())
    return builder.load(at, align=2 if place.type.pointee == I16 else 4)


def store(builder: ir.IRBuilder, value: Value, place: Value, offset: Value) -> None:
    """Write `value` to `offset` elements behind `place`."""
    at = builder.bitcast(builder.gep(place, [offset]), value.type.as_pointer())
    builder.store(value, at, align=2 if place.type.pointee == I16 else 4)


def repeat(
    builder: ir.IRBuilder,
    bounds: tuple[Value, Value, int],
    carried: Sequence[Value],
    body: Callable[[Value, Sequence[Value]], Sequence[Value]],
) -> list[Value]:
    """A loop over `range(*bounds)`; `body` maps the index and the values carried to the values carried on."""
    start, stop, step = bounds
    before = builder.block
    inside, behind = builder.append_basic_block("inside"), builder.append_basic_block("behind")
    builder.cbranch(builder.icmp_signed("<", start, stop), inside, behind)
    builder.position_at_end(inside)
    index = builder.phi(I64)
    values = [builder.phi(value.type) for value in carried]
    results = list(body(index, values))
    following = builder.add(index, number(step))
    last = builder.block
    builder.cbranch(builder.icmp_signed("<", following, stop), inside, behind)
    for phi, first, next_ in zip(
        [index, *values], [start, *carried], [following, *results], strict=True
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(next_, last)
    builder.position_at_end(behind)
    ends = [builder.phi(value.type) for value in carried]
    for phi, first, result in zip(ends, carried, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(result, last)
    return ends


def over_chunks(
    builder: ir.IRBuilder,
    dim: Value,
    carried: Sequence[Value],
    body: Callable[[Value, Value, Sequence[Value]], Sequence[Value]],
) -> list[Value]:
    """A loop over the chunks of a row; `body` gets the offset, what `load_pair` is told is left, and the values carried.

    That is a number in every lane of a vector: to count it down there takes one instruction, to spread it takes several.
    """
    step = ir.Constant(INTEGERS, [CHUNK] * LANES)

    def chunk(at: Value, values: Sequence[Value]) -> Sequence[Value]:
        left, *others = values
        return [builder.sub(left, step), *body(at, left, others)]

    left = splat(builder, builder.trunc(dim, I32), INTEGERS)
    return repeat(builder, (number(0), dim, CHUNK), [left, *carried], chunk)[1:]


def element_type(witness: types.Type) -> ir.Type:
    """What lies in a cache whose elements numba calls so: bfloat16 are uint16 to it."""
    return I16 if witness == types.uint16 else F32


def load_pair(
    builder: ir.IRBuilder, place: Value, offset: Value, left: Value
) -> tuple[Value, Value]:
    """A chunk of a row as two vectors of float32: of bfloat16 the even and the odd elements, else the halves.

    Only `left` elements are read, and zeros stand for the others: behind a row may lie anything, and masks cost less than
    the second copy of each loop that a remainder would need.
    """
    if place.type.pointee == I16:
        pairs = _load_some(
            builder, place, offset, INTEGERS, _before(builder, left, range(0, CHUNK, 2))
        )
        shift = ir.Constant(INTEGERS, [_BF16_SHIFT] * LANES)
        mask = ir.Constant(INTEGERS, [0xFFFF0000] * LANES)
        even, odd = builder.shl(pairs, shift), builder.and_(pairs, mask)
        return builder.bitcast(even, VECTOR), builder.bitcast(odd, VECTOR)
    second = builder.add(offset, number(LANES))
    return (
        _load_some(builder, place, offset, VECTOR, _before(builder, left, range(LANES))),
        _load_some(builder, place, second, VECTOR, _before(builder, left, range(LANES, CHUNK))),
    )


def _before(builder: ir.IRBuilder, left: Value, elements: range) -> Value:
    """Which of these elements of a chunk there are."""
    return builder.icmp_signed("<", ir.Constant(INTEGERS, list(elements)), left)


def in_order(
    builder: ir.IRBuilder, element: ir.Type, pair: tuple[Value, Value]
) -> tuple[Value, Value]:
    """The two halves of a chunk of such elements, from what `load_pair` gave."""
    if element != I16:
        return pair
    lanes = [lane // 2 + LANES * (lane % 2) for lane in range(CHUNK)]
    halves = (ir.Constant(INTEGERS, lanes[:LANES]), ir.Constant(INTEGERS, lanes[LANES:]))
    low, high = (builder.shuffle_vector(*pair, half) for half in halves)
    return low, high


def _load_some(
    builder: ir.IRBuilder, place: Value, offset: Value, kind: ir.VectorType, mask: Value
) -> Value:
    at = builder.bitcast(builder.gep(place, [offset]), kind.as_pointer())
    name = f"llvm.masked.load.v{LANES}{'i32' if kind == INTEGERS else 'f32'}.p0"
    signature = ir.FunctionType(kind, [at.type, I32, mask.type, kind])
    function = _declared(builder, name, signature)
    return builder.call(function, [at, ir.Constant(I32, 4), mask, ir.Constant(kind, None)])


def fma(builder: ir.IRBuilder, left: Value, right: Value, addend: Value) -> Value:
    """Left * right + addend for vectors, rounded once."""
    signature = ir.FunctionType(VECTOR, [VECTOR] * 3)
    function = _declared(builder, f"llvm.fma.v{LANES}f32", signature)
    return builder.call(function, [left, right, addend])


def narrowed(builder: ir.IRBuilder, element: ir.Type, vector: Value) -> Value:
    """A vector of float32 as elements of a cache: rounded to the nearest bfloat16, ties to even, or as it is."""
    if element != I16:
        return vector
    bits = builder.bitcast(vector, INTEGERS)
    one, shift = (ir.Constant(INTEGERS, [value] * LANES) for value in (1, _BF16_SHIFT))
    tie = builder.and_(builder.lshr(bits, shift), one)
    half_step = ir.Constant(INTEGERS, [_BF16_HALF_STEP] * LANES)
    upper = builder.lshr(builder.add(bits, builder.add(tie, half_step)), shift)
    is_number = builder.fcmp_ordered("ord", vector, vector)
    nan = ir.Constant(INTEGERS, [_BF16_NAN] * LANES)
    return builder.trunc(builder.select(is_number, upper, nan), ir.VectorType(I16, LANES))


def copy(builder: ir.IRBuilder, source: Value, target: Value, count: Value) -> None:
    """Copy elements, one after another."""

    def element(at: Value, _values: Sequence[Value]) -> Sequence[Value]:
        builder.store(builder.load(builder.gep(source, [at])), builder.gep(target, [at]))
        return []

    repeat(builder, (number(0), count, 1), [], element)


def maximum(builder: ir.IRBuilder, left: Value, right: Value) -> Value:
    """The larger in each lane; NaN where `right` is."""
    return builder.select(builder.fcmp_ordered(">", left, right), left, right)


def exp2(builder: ir.IRBuilder, power: Value) -> Value:
    """2 to the power, for a vector: 0 below the least normal number, its largest power of two above 127, NaN for NaN."""
    lowest, highest = constant(_EXP2_LOWEST), constant(_EXP2_HIGHEST)
    is_low = builder.fcmp_ordered("<", power, lowest)
    power = builder.select(is_low, lowest, power)
    power = builder.select(builder.fcmp_ordered(">", power, highest), highest, power)
    signature = ir.FunctionType(VECTOR, [VECTOR])
    whole = builder.call(_declared(builder, f"llvm.rint.v{LANES}f32", signature), [power])
    fraction = builder.fsub(power, whole)
    result = constant(_EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        result = fma(builder, result, fraction, constant(coefficient))
    shift = ir.Constant(INTEGERS, [_MANTISSA_BITS] * LANES)
    exponent = builder.shl(builder.fptosi(whole, INTEGERS), shift)
    scaled = builder.bitcast(builder.add(builder.bitcast(result, INTEGERS), exponent), VECTOR)
    return builder.select(is_low, constant(0.0), scaled)


def capped(builder: ir.IRBuilder, score: Value, cap: Value) -> Value:
    """Cap * tanh(score / cap), for vectors, by tanh(x) = 1 - 2 / (exp(2 x) + 1)."""
    power = builder.fmul(builder.fdiv(score, cap), constant(_TWO_LOG2_E))
    below = builder.fadd(exp2(builder, power), constant(1.0))
    tanh = builder.fsub(constant(1.0), builder.fdiv(constant(2.0), below))
    return builder.fmul(cap, tanh)


def across(
    builder: ir.IRBuilder, combine: Callable[[ir.IRBuilder, Value, Value], Value], vector: Value
) -> Value:
    """The lanes of a vector combined to one, in halves."""
    while vector.type.count > 1:
        half = vector.type.count // 2
        low, high = (_lanes(builder, vector, at, half) for at in (0, half))
        vector = combine(builder, low, high)
    return builder.extract_element(vector, ir.Constant(I32, 0))


def _lanes(builder: ir.IRBuilder, vector: Value, first: int, count: int) -> Value:
    picks = ir.Constant(ir.VectorType(I32, count), list(range(first, first + count)))
    return builder.shuffle_vector(vector, vector, picks)


def horizontal_sums(builder: ir.IRBuilder, vectors: Sequence[Value]) -> Value:
    """The sums over the lanes of `SUMS` vectors, in a vector of as many.

    Pairs are added up crosswise, so that each step halves the number of vectors and of lanes that belong to one sum.
    """
    while vectors[0].type.count > SUMS:
        vectors = [_folded(builder, vector) for vector in vectors]
    lanes = vectors[0].type.count
    parts = [_crosswise(builder, vectors[at : at + lanes]) for at in range(0, SUMS, lanes)]
    if len(parts) == 1:
        return parts[0]
    both = ir.Constant(ir.VectorType(I32, SUMS), list(range(SUMS)))
    return builder.shuffle_vector(*parts, both)


def _crosswise(builder: ir.IRBuilder, vectors: Sequence[Value]) -> Value:
    """The sums of n vectors of n lanes."""
    count = len(vectors)
    digits = count.bit_length() - 1
    reversed_ = [int(f"{index:0{digits}b}"[::-1], 2) for index in range(count)]
    level, distance = [vectors[index] for index in reversed_], count // 2
    while distance:
        level = [
            _added_across(builder, level[at], level[at + 1], distance)
            for at in range(0, len(level), 2)
        ]
        distance //= 2
    return level[0]


def _added_across(builder: ir.IRBuilder, left: Value, right: Value, distance: int) -> Value:
    """Lanes without the bit `distance` take `left`'s sums of two lanes that differ in it, those with it `right`'s."""
    count = left.type.count
    picks = [(lane & ~distance) + (count if lane & distance else 0) for lane in range(count)]
    kind = ir.VectorType(I32, count)
    low = builder.shuffle_vector(left, right, ir.Constant(kind, picks))
    high = builder.shuffle_vector(left, right, ir.Constant(kind, [p + distance for p in picks]))
    return builder.fadd(low, high)


def _folded(builder: ir.IRBuilder, vector: Value) -> Value:
    half = vector.type.count // 2
    return builder.fadd(_lanes(builder, vector, 0, half), _lanes(builder, vector, half, half))


def _declared(builder: ir.IRBuilder, name: str, signature: ir.FunctionType) -> Value:
    found = builder.module.globals.get(name)
    return ir.Function(builder.module, signature, name) if found is None else found
