"""From bytes to numbers: e4m3 codes in registers, on every architecture that Triton compiles for.

Tensor cores take 16-bit factors, in which every code is exact. The bits of a code, moved to their
places in a bf16 or fp16 number, are its value but for the bias of the exponent: one multiplication
by a power of two, which takes subnormal numbers as they are.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl

from stree_kernels.launch import pdl

LEAST_NATIVE = 89
"""The compute capability from which hardware converts e4m3."""

_BF16_ASM = tl.constexpr("""
{
.reg .b32 low, high, sign, power, zero;
mov.b32 power, 0x7B807B80;
mov.b32 zero, 0x80008000;
prmt.b32 low, $2, 0, 0x1404;
prmt.b32 high, $2, 0, 0x3424;
and.b32 sign, low, 0x80008000;
shr.b32 low, low, 4;
and.b32 low, low, 0x07F007F0;
or.b32 low, low, sign;
fma.rn.bf16x2 $0, low, power, zero;
and.b32 sign, high, 0x80008000;
shr.b32 high, high, 4;
and.b32 high, high, 0x07F007F0;
or.b32 high, high, sign;
fma.rn.bf16x2 $1, high, power, zero;
}
""")
_FP16_ASM = tl.constexpr("""
{
.reg .b32 low, high, sign, power;
mov.b32 power, 0x5C005C00;
prmt.b32 low, $2, 0, 0x1404;
prmt.b32 high, $2, 0, 0x3424;
and.b32 sign, low, 0x80008000;
shr.b32 low, low, 1;
and.b32 low, low, 0x3F803F80;
or.b32 low, low, sign;
mul.rn.f16x2 $0, low, power;
and.b32 sign, high, 0x80008000;
shr.b32 high, high, 1;
and.b32 high, high, 0x3F803F80;
or.b32 high, high, sign;
mul.rn.f16x2 $1, high, power;
}
""")
_NATIVE_BF16_ASM = tl.constexpr("""
{
.reg .b16 low, high, a, b, c, d;
.reg .b32 first, second;
.reg .f32 e, f, g, h;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 first, low;
cvt.rn.f16x2.e4m3x2 second, high;
mov.b32 {a, b}, first;
mov.b32 {c, d}, second;
cvt.f32.f16 e, a;
cvt.f32.f16 f, b;
cvt.f32.f16 g, c;
cvt.f32.f16 h, d;
cvt.rn.bf16x2.f32 $0, f, e;
cvt.rn.bf16x2.f32 $1, h, g;
}
""")
_NATIVE_FP16_ASM = tl.constexpr("""
{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}
""")
_TWO_TO_120 = tl.constexpr(2.0**120)


@triton.jit
def code_factors(codes, DTYPE: tl.constexpr):
    """The values of codes (uint8) in DTYPE, in which all are exact."""
    if tl.bfloat16 == DTYPE:
        values = tl.inline_asm_elementwise(
            _BF16_ASM, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    elif tl.float16 == DTYPE:
        values = tl.inline_asm_elementwise(
            _FP16_ASM, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        values = code_values(codes, False)
    return values


@triton.jit
def native_factors(codes, DTYPE: tl.constexpr):
    """The values of codes (uint8) in bf16 or fp16, by hardware: fewer integer instructions."""
    if tl.bfloat16 == DTYPE:
        values = tl.inline_asm_elementwise(
            _NATIVE_BF16_ASM, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        values = tl.inline_asm_elementwise(
            _NATIVE_FP16_ASM, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )
    return values


@triton.jit
def code_values(codes, NATIVE: tl.constexpr):
    """The values of codes (uint8) in fp32; NATIVE lets the hardware convert them."""
    if NATIVE:
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        wide = codes.to(tl.uint32)
        bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
        values = bits.to(tl.float32, bitcast=True) * _TWO_TO_120
    return values


def has_native(device: torch.device) -> bool:
    """Tell whether hardware converts e4m3 on `device`; never where kernels are interpreted."""
    return pdl.capability(device) >= LEAST_NATIVE
