"""Standard normal noise that a cell's key and a seed decide, on any device. Pure torch.

A cell gets the same noise whatever batch, worker or device draws it. Counters are mixed by
SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, the finaliser's constants) and become normal by
Box and Muller's transform.
"""

import math

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 24
"""Bits of a uniform number: what a float32 holds exactly."""


def keyed_normal(keys: Tensor, count: int, seed: int) -> Tensor:
    """Return standard normal numbers, (N, count) float32.

    Parameters
    ----------
    keys
        One int64 per cell, any values, shape (N,); the bits of an unsigned key will do.
    count
        Numbers per cell.
    seed
        Another seed gives other numbers, unrelated to the first.
    """
    half = (count + 1) // 2
    start = _mix(keys ^ _signed(_scramble(seed)))
    counters = torch.arange(2 * half, device=keys.device, dtype=torch.int64)
    bits = _mix(start[:, None] + (counters + 1) * _signed(_STEP))
    uniform = (_shift(bits, 64 - _BITS).float() + 0.5) * 2.0**-_BITS
    radius = torch.sqrt(-2.0 * torch.log(uniform[:, :half]))
    angle = (2.0 * math.pi) * uniform[:, half:]
    both = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return both[:, :count]


def _mix(word: Tensor) -> Tensor:
    word = (word ^ _shift(word, 30)) * _signed(_FIRST)
    word = (word ^ _shift(word, 27)) * _signed(_SECOND)
    return word ^ _shift(word, 31)


def _shift(word: Tensor, bits: int) -> Tensor:
    """Shift right without the sign, which torch's int64 would carry along."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _scramble(seed: int) -> int:
    """Mix a Python integer as `_mix` does, so that neighbouring seeds share nothing."""
    word = (seed + 1) * _STEP % 2**64
    word = (word ^ (word >> 30)) * _FIRST % 2**64
    word = (word ^ (word >> 27)) * _SECOND % 2**64
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """Return the int64 of the same bits."""
    return word - 2**64 if word >= 2**63 else word
