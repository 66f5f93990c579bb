"""Numbers and names as figures, tables and findings write them. Pure: the standard library."""

import re

_FLAT = 0.1
"""Slope up to which a mean hardly moves, though it may rise with every step."""


def format_number(value: float) -> str:
    """Write a value short: three significant digits, no exponent where it can be helped."""
    if value == 0 or 0.001 <= abs(value) < 1e6:
        return signed(f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}")
    return signed(f"{value:.2e}")


def signed(text: str) -> str:
    """Write the hyphens before digits as minus signs."""
    return re.sub(r"(?<![\w.])-(?=\d)|(?<=e)-(?=\d)", "−", text)


def count(number: int, what: str) -> str:
    """Write a number of things: ``1 cell``, ``2,000 cells``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def shorten(text: str, length: int) -> str:
    """Cut a text, but not the numbers and units at its end: two doses stay two names."""
    if len(text) <= length:
        return text
    dose = re.search(r"(?: [\d.,e+−-]+(?: ?[^\s\d]{1,4})?)$", text)
    tail = dose.group() if dose else ""
    return text[: max(1, length - 1 - len(tail))].rstrip() + "…" + tail


def course(slope: float, rises: bool, directed: bool, same_scale: bool) -> str:
    """Say in a few words how the mean of what was measured goes with what was requested."""
    if not directed:
        return "no mean: single cells, whose angles have no common direction or are too few"
    if same_scale and abs(slope) < _FLAT:
        return f"slope {slope:.2f}: hardly moves"
    return f"slope {slope:.2f}, {'rises' if rises else 'does not rise'} with every step"
