"""Name cells and treatments for good. Floor 1: numpy and pandas; no Ray, torch or network.

A cell's key is a hash of its names alone, and everything random about the cell is a hash of its
key: row order, batch size, number of workers and retries change nothing.
"""

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.columns import COMPOUND, CONCENTRATION, IDENTITY, PLATE, WELL, require_columns

Words = NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
"""Step of the splitmix64 counter: 2⁶⁴ divided by the golden ratio, odd."""
_SEPARATOR = "\x1f"
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+(\.0*)?")
_MASK = 2**64 - 1


def cell_keys(frame: pd.DataFrame) -> Words:
    r"""Return one 64-bit key per cell: the same in every version, on every platform.

    The key is BLAKE2b (digest of 8 bytes, read as a little-endian integer) of the five texts
    plate, well, site, image number and object number in UTF-8, with ``\x1f`` between them.
    Plate and well are taken verbatim; a plate that is an integer or a float without fraction is
    written as an integer. In the other three, a text that is a whole number is written as one
    too, so that ``7``, ``7.0``, ``"7"`` and ``"07"`` are the same site. Missing values are
    empty texts.

    Parameters
    ----------
    frame
        One row per cell, with the columns `cp2image.columns.IDENTITY`; others are ignored.

    Returns
    -------
    NDArray[np.uint64]
        Shape (N,).

    Raises
    ------
    ColumnError
        If a column of the identity is missing.
    """
    require_columns(list(frame.columns), IDENTITY, "identity of the cells")
    return text_keys([_column_texts(frame[name]) for name in IDENTITY])


def text_keys(columns: Sequence[NDArray[np.object_]]) -> Words:
    r"""Return the BLAKE2b keys of rows of texts, joined by ``\x1f``; see `cell_keys`.

    Parameters
    ----------
    columns
        Arrays of texts, each of shape (N,).

    Returns
    -------
    NDArray[np.uint64]
        Shape (N,).
    """
    join = _SEPARATOR.join
    rows = zip(*columns, strict=True)
    digests = [blake2b(join(row).encode(), digest_size=8).digest() for row in rows]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def texts(values: "pd.Series[Any]", whole_numbers: bool = False) -> NDArray[np.object_]:
    """Write names as texts in one way, whatever type they were read as.

    Integers, and floats without a fraction, are written as integers, missing values as empty
    texts, and texts are kept.

    Parameters
    ----------
    values
        Names of any type, length N.
    whole_numbers
        True: texts that are whole numbers (``"07"``, ``"7.0"``) are written as integers too.

    Returns
    -------
    NDArray[np.object_]
        ``str`` objects, shape (N,).
    """
    codes, distinct = pd.factorize(values)
    written = [_text(value, whole_numbers) for value in distinct]
    return np.array([*written, ""], dtype=object)[codes]


def treatment_names(frame: pd.DataFrame) -> NDArray[np.object_]:
    """Return each row's treatment: compound and concentration, as ``taxol 0.3``.

    Concentrations are compared at six significant digits. Without a column for the compound or
    the concentration, the treatment is named by the other; without both it is empty everywhere.

    Parameters
    ----------
    frame
        Rows of cells, wells or groups; N of them.

    Returns
    -------
    NDArray[np.object_]
        ``str`` objects, shape (N,).
    """
    empty = np.full(len(frame), "", dtype=object)
    compounds = texts(frame[COMPOUND]) if COMPOUND in frame else empty
    if CONCENTRATION not in frame:
        return compounds
    codes, distinct = pd.factorize(frame[CONCENTRATION])
    amounts = np.array([*map(_amount, distinct), ""], dtype=object)[codes]
    pairs = pd.MultiIndex.from_arrays([compounds, amounts])
    codes, distinct_pairs = pairs.factorize()
    return np.array([" ".join(filter(None, pair)) for pair in distinct_pairs], dtype=object)[codes]


def cell_seeds(keys: Words, seed: int) -> Words:
    """Mix the user's seed into the keys: one independent 64-bit seed per cell.

    Parameters
    ----------
    keys
        From `cell_keys`, shape (N,).
    seed
        Any integer; its lowest 64 bits count.

    Returns
    -------
    NDArray[np.uint64]
        Shape (N,). Different keys give different seeds.
    """
    return scramble(keys ^ scramble(np.array([(seed + GOLDEN) & _MASK], dtype=np.uint64)))


def noise(keys: Words, seed: int, dimension: int) -> NDArray[np.float32]:
    """Return standard normal noise that depends on each cell's key and the seed alone.

    Word k of a cell is splitmix64 (Steele, Lea & Flood, OOPSLA 2014) at position k of the
    stream that starts at its seed; each word gives two normals by Box and Muller (1958). A
    smaller ``dimension`` gives the first columns of a larger one. No |value| exceeds 6.8.

    Parameters
    ----------
    keys
        From `cell_keys`, shape (N,).
    seed
        The user's.
    dimension
        Number of values per cell.

    Returns
    -------
    NDArray[np.float32]
        Shape (N, dimension). Equal on all platforms up to the last bit of the sine and logarithm.
    """
    pairs = (dimension + 1) // 2
    steps = np.arange(1, pairs + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    words = scramble(cell_seeds(keys, seed)[:, None] + steps)
    uniform = ((words >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
    angle = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0**-32 * 2 * np.pi)
    radius = np.sqrt(-2 * np.log(uniform))
    normals = np.empty((len(keys), pairs, 2), dtype=np.float32)
    normals[..., 0] = radius * np.cos(angle)
    normals[..., 1] = radius * np.sin(angle)
    return normals.reshape(len(keys), 2 * pairs)[:, :dimension]


def scramble(words: Words) -> Words:
    """Return the splitmix64 output function of every word: a bijection that looks random."""
    mixed = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _column_texts(column: "pd.Series[Any]") -> NDArray[np.object_]:
    return texts(column, whole_numbers=column.name not in (PLATE, WELL))


def _text(value: object, whole_numbers: bool) -> str:
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating):
        number = float(value)
        return str(int(number)) if number.is_integer() else repr(number)
    text = str(value)
    if whole_numbers and _WHOLE_NUMBER.fullmatch(text.strip()):
        return str(int(text.strip().partition(".")[0]))
    return text


def _amount(value: object) -> str:
    try:
        return f"{float(value):.6g}"  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return str(value)
