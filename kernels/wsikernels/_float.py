"""float32 arithmetic that vectorises and gives the same bits in every loop: fused multiply-add, bit casts, roots.

Library ``pow`` and tables keep a loop scalar; a power by exponent arithmetic with one polynomial correction does not.
Every operation is IEEE-exact as written, so a pixel's value does not depend on its place in the vector.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from wsikernels._jit import JIT_OFF, jit

if JIT_OFF:

    def fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))

    def bits_of(value: np.float32) -> np.int32:
        return np.float32(value).view(np.int32)

    def float_of(bits: np.int32) -> np.float32:
        return np.int32(bits).view(np.float32)

    def half_bits(value: np.float32) -> np.uint16:
        with np.errstate(over="ignore"):
            return np.float16(value).view(np.uint16)

else:

    @intrinsic
    def fma(typing_context, a, b, c):  # type: ignore[no-untyped-def]  # numba's protocol, here and below
        """a · b + c, rounded once."""

        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.fma(*arguments)

        return types.float32(types.float32, types.float32, types.float32), emit

    @intrinsic
    def bits_of(typing_context, value):  # type: ignore[no-untyped-def]
        """The bits of a float32, as int32."""

        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.bitcast(arguments[0], ir.IntType(32))

        return types.int32(types.float32), emit

    @intrinsic
    def float_of(typing_context, bits):  # type: ignore[no-untyped-def]
        """The float32 of these bits."""

        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.bitcast(arguments[0], ir.FloatType())

        return types.float32(types.int32), emit

    @intrinsic
    def _half_by_instruction(typing_context, value):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

        return types.uint16(types.float32), emit

    @jit(inline=True)
    def _half_by_integers(value):
        bits = bits_of(value)
        size = bits & np.int32(0x7FFFFFFF)
        usual = (size - np.int32(0x37FFF001) + ((size >> np.int32(13)) & np.int32(1))) >> np.int32(13)
        tiny = bits_of(float_of(size) + np.float32(0.5)) - np.int32(0x3F000000)  # the sum rounds to 2⁻²⁴, as subnormals
        half = tiny if size < np.int32(0x38800000) else usual
        half = half if size < np.int32(0x47800000) else np.int32(0x7C00)
        return np.uint16(half | ((bits >> np.int32(16)) & np.int32(0x8000)))

    def _has_half_instruction() -> bool:
        """Whether the CPU that numba compiles for rounds to float16 itself: else LLVM would call a missing function."""
        triple, _, features = cpu_target.target_context.codegen().magic_tuple()
        return "+f16c" in features.split(",") or triple.startswith(("aarch64", "arm64"))

    # the bits of a float32 (no NaN) rounded to float16, nearest even, as uint16
    half_bits = _half_by_instruction if _has_half_instruction() else _half_by_integers  # type: ignore[assignment]


# A power t^p starts as p · bits(t) + magic read as a float (within 4 %); what is missing is r^p with r = t · y^(-1/p)
# near 1, for which a short polynomial suffices (minimax over the range of r, fitted by Lawson's iteration).
_THIRD, _THIRD_MAGIC = np.float32(-1 / 3), np.float32(1.4199254e9)
_C0, _C1, _C2, _C3 = (np.float32(v) for v in (1.7284013, -1.2947859, 0.7377074, -0.17132477))  # 2e-6
_TWELFTH, _TWELFTH_MAGIC = np.float32(-1 / 12), np.float32(1.1537155e9)
_G0, _G1, _G2, _G3, _G4 = (np.float32(v) for v in (1.1842072, -0.36202988, 0.27610528, -0.11971027, 0.02142345))  # 7e-6


@jit(inline=True)
def cube_root(t):
    """t^(1/3) for t ≥ 0, relative error below 4e-6."""
    y = float_of(np.int32(fma(np.float32(bits_of(t)), _THIRD, _THIRD_MAGIC)))
    r = t * y * (y * y)
    y = y * fma(fma(fma(_C3, r, _C2), r, _C1), r, _C0)
    return t * (y * y)


@jit(inline=True)
def power_5_12(t):
    """t^(5/12) for t ≥ 0, relative error below 6e-5: sRGB's 1 / 2.4."""
    y = float_of(np.int32(fma(np.float32(bits_of(t)), _TWELFTH, _TWELFTH_MAGIC)))
    y3 = y * (y * y)
    y6 = y3 * y3
    r = t * (y6 * y6)
    y = y * fma(fma(fma(fma(_G4, r, _G3), r, _G2), r, _G1), r, _G0)
    y2 = y * y
    return t * (y2 * y2) * (y2 * y)
