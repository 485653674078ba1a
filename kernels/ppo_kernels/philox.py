"""Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405), which `sample` draws from."""

from __future__ import annotations

from torch import Tensor


def uniform_numbers(seed: int | Tensor, counters: Tensor) -> Tensor:
    """float64 multiples of 2^-32 in [0, 1), one for each of the int64 counters."""
    low = 0xFFFFFFFF
    a, b = counters & low, (counters >> 32) & low
    c, d = a * 0, a * 0
    key_a, key_b = seed & low, (seed >> 32) & low

    def product(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
        """(high, low) words of a 64-bit product, without leaving int64."""
        lower, upper = (x & 0xFFFF) * by, (x >> 16) * by
        middle = upper + (lower >> 16)
        return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)

    for _ in range(10):
        (high_a, low_a), (high_c, low_c) = product(a, 0xD2511F53), product(c, 0xCD9E8D57)
        a, b, c, d = high_c ^ b ^ key_a, low_c, high_a ^ d ^ key_b, low_a
        key_a, key_b = (key_a + 0x9E3779B9) & low, (key_b + 0xBB67AE85) & low
    return a.double() * 2.0**-32
