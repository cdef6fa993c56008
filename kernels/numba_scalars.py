"""Scalar functions for numba kernels: bfloat16 to float32 and back, and exp as instructions that a loop vectorises.

They are made to be inlined into loops: without a branch, a call or an exception, LLVM turns such a loop into vector code.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from kernels.numba_setup import njit

_SHIFT = 16  # a bfloat16 is the upper half of a float32
_HALF_STEP = np.int32(0x7FFF)
_NOT_A_NUMBER = np.uint16(0x7FC0)
_ONE, _TWO, _HALF = np.float32(1), np.float32(2), np.float32(0.5)
_GELU_FACTOR, _GELU_CUBE = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)

# exp(x) = 2^n exp(r), r = x - n ln 2 with ln 2 in two parts (Cody and Waite, 1980); exp(r) by its Taylor sum to r^7 / 7!,
# whose rest is below 2^-26 for |r| <= ln 2 / 2.
_LOG2_E = np.float32(1 / math.log(2))
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
_TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(8))
_EXP_LOWEST, _EXP_HIGHEST = np.float32(-87.3), np.float32(88.7228)
_LOG2_E_DOUBLE = 1 / math.log(2)
_LN2_HIGH_DOUBLE, _LN2_LOW_DOUBLE = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_TAYLOR_DOUBLE = tuple(1 / math.factorial(n) for n in range(14))
_LOWEST_DOUBLE, _TO_WHOLE = -700.0, 1.5 * 2.0**52
_EXPONENT_BIAS, _MANTISSA_BITS = np.int32(127), np.int32(23)

# numpy's division knows no exception: a branch for one would keep loops from becoming vector code.
OPTIONS: Final = {"error_model": "numpy", "fastmath": {"contract"}}
_inlined = njit(forceinline=True, **OPTIONS)


@intrinsic
def bf16_pointer(_typing_context, address):
    """A pointer to bfloat16 bits."""

    def convert(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(16).as_pointer())

    return types.CPointer(types.uint16)(address), convert  # type: ignore[attr-defined]


@intrinsic
def float_pointer(_typing_context, address):
    """A pointer to float32."""

    def convert(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(address), convert  # type: ignore[attr-defined]


@intrinsic
def as_int(_typing_context, value):
    """The bits of a float32."""

    def convert(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), convert


@intrinsic
def as_float(_typing_context, value):
    """The float32 with these bits."""

    def convert(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), convert


@_inlined
def widen(bits):
    """float32 of a bfloat16."""
    return as_float(np.int32(bits) << np.int32(_SHIFT))


@_inlined
def narrow(value):
    """The nearest bfloat16, ties to even."""
    bits = as_int(value)
    rounded = bits + _HALF_STEP + ((bits >> np.int32(_SHIFT)) & np.int32(1))
    return np.uint16(rounded >> np.int32(_SHIFT)) if value == value else _NOT_A_NUMBER


@_inlined
def to_bf16(value):
    """The nearest bfloat16, as float32."""
    return widen(narrow(value))


@_inlined
def exp(value):
    """The exponential of a float32, to about two units of its last place."""
    x = min(max(value, _EXP_LOWEST), _EXP_HIGHEST)
    n = np.floor(x * _LOG2_E + _HALF)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    total = _TAYLOR[7]
    for power in (6, 5, 4, 3, 2, 1, 0):
        total = total * r + _TAYLOR[power]
    scale = as_float((np.int32(n) + _EXPONENT_BIAS) << _MANTISSA_BITS)
    return total * scale if value <= _EXP_HIGHEST else np.float32(np.inf)


@_inlined
def _sigmoid(value):
    return _ONE / (_ONE + exp(-value))


@intrinsic
def widen_element(_typing_context, element):
    """float32 of an element of an array: a uint16 is the bits of a bfloat16."""

    def shift(_context, builder, _signature, arguments):
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(
            builder.shl(wide, ir.Constant(ir.IntType(32), _SHIFT)), ir.FloatType()
        )

    def keep(_context, _builder, _signature, arguments):
        return arguments[0]

    return types.float32(element), shift if element == types.uint16 else keep


@intrinsic
def as_long(_typing_context, value):
    """The bits of a float64."""

    def convert(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), convert


@intrinsic
def as_double(_typing_context, value):
    """The float64 with these bits."""

    def convert(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), convert


@_inlined
def exp_of_negative(value):
    """The exponential of a float64 that is not above 0, to its last places; 0 below e^-700.

    As `exp`. To add 1.5 * 2^52 leaves the nearest whole number in the lowest bits: AVX2 converts no float64 to int64.
    """
    x = max(value, _LOWEST_DOUBLE)
    shifted = x * _LOG2_E_DOUBLE + _TO_WHOLE
    n = shifted - _TO_WHOLE
    r = (x - n * _LN2_HIGH_DOUBLE) - n * _LN2_LOW_DOUBLE
    total = _TAYLOR_DOUBLE[13]
    for power in (12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0):
        total = total * r + _TAYLOR_DOUBLE[power]
    scale = as_double((as_long(shifted) + 1023) << 52)
    return total * scale if value >= _LOWEST_DOUBLE else 0.0


@_inlined
def order_key(value):
    """An int32 that compares as the float32 does; both zeros are one number."""
    bits = as_int(value)
    key = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return key + np.int32(key == np.int32(-1))


@_inlined
def silu(value):
    """Of a float32: x sigmoid(x)."""
    return value / (_ONE + exp(-value))


@_inlined
def gelu_tanh(value):
    """As x sigmoid(2 u), which is x (1 + tanh u) / 2 without what cancels in that sum."""
    inner = _GELU_FACTOR * (value + _GELU_CUBE * value * value * value)
    return value * _sigmoid(_TWO * inner)
