"""Values as integers in the order of the selection.

key     int32 of a value; larger ranks higher. Equal values have one key, and so have -0 and +0,
and NaN of either sign, whose key is the highest.
packed  int64 of key (upper half) and inverted index (lower half): among equal keys the lowest
index is the largest. No two entries of a row are equal, and comparing them as integers
is the whole order of the result.
"""

import triton
import triton.language as tl

# Below the key of every value, -inf included: marks what is not there.
PAD = tl.constexpr(-(2**31))
PACKED_PAD = tl.constexpr(-(2**63))
NAN_KEY = tl.constexpr(0x7FC00000)
LOW_32 = tl.constexpr(0xFFFFFFFF)


@triton.jit
def key_of(value):
    """Fp32 to int32: negative floats order backwards, so their lower 31 bits are inverted."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(value != value, NAN_KEY, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def value_of(key):
    """The inverse of key_of (which is its own inverse on every bit pattern but -0 and NaN)."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(key, index):
    """Key and index to one int64."""
    return (key.to(tl.int64) << 32) | (index.to(tl.int64) ^ LOW_32)


@triton.jit
def key_of_packed(packed):
    """The upper half."""
    return (packed >> 32).to(tl.int32)


@triton.jit
def index_of_packed(packed):
    """The lower half, inverted back."""
    return (packed & LOW_32) ^ LOW_32
