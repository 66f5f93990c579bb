import hashlib
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cp2image.columns import IDENTITY
from cp2image.data.identity import (
    GOLDEN,
    cell_keys,
    cell_seeds,
    noise,
    scramble,
    texts,
    treatment_names,
)
from cp2image.errors import ColumnError

CELLS = [
    ("Week4_27861", "B02", "s1", 1, 7),
    ("24278", "C11", 2, 3, 12),
    ("pläte", "A01", None, 5, 1),
]
MASK = 2**64 - 1


def frame(rows):
    return pd.DataFrame(rows, columns=list(IDENTITY))


def many(count):
    rows = [(f"P{i % 7}", f"W{i % 83:02d}", i % 4, i // 50, i) for i in range(count)]
    return cell_keys(frame(rows))


def splitmix(state):
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_keys_of_three_cells_are_what_they_always_were():
    known = [11386401312043439886, 15961491046704091996, 4551761316870412633]
    assert cell_keys(frame(CELLS)).tolist() == known


def test_key_is_the_documented_hash_of_the_documented_text():
    written = b"24278\x1fC11\x1f2\x1f3\x1f12"
    digest = hashlib.blake2b(written, digest_size=8).digest()
    assert cell_keys(frame(CELLS))[1] == int.from_bytes(digest, "little")


@pytest.mark.parametrize(
    "kind", ["int64", "int16", "float32", "float64", "str", "category", object]
)
def test_type_of_site_image_and_object_numbers_does_not_change_the_key(kind):
    plain = frame([("P1", "B02", i, 2 * i, 3 * i) for i in range(20)])
    typed = plain.astype(dict.fromkeys(IDENTITY[2:], kind))
    np.testing.assert_array_equal(cell_keys(typed), cell_keys(plain))


def test_padded_and_float_texts_are_the_same_numbers():
    padded = frame([("P1", "B02", "007", "2.0", " 3 ")])
    assert cell_keys(padded) == cell_keys(frame([("P1", "B02", 7, 2, 3)]))


def test_plate_read_as_a_number_keeps_its_key_and_a_padded_plate_is_another():
    as_text, as_number, padded = (
        cell_keys(frame([(plate, "B02", 1, 1, 1)])) for plate in ("24278", 24278, "024278")
    )
    assert as_text == as_number
    assert as_text != padded


def test_missing_names_are_empty_texts_whatever_stands_for_them():
    keys = {
        int(cell_keys(frame([("P1", well, None, 1, 1)]))[0]) for well in (None, np.nan, pd.NA, "")
    }
    assert len(keys) == 1


def test_row_order_and_index_do_not_change_a_cells_key():
    cells = frame([(f"P{i % 3}", "B02", 1, i // 10, i) for i in range(100)])
    shuffled = cells.sample(frac=1, random_state=0)
    np.testing.assert_array_equal(cell_keys(shuffled), cell_keys(cells)[shuffled.index])


def test_every_part_of_the_identity_changes_the_key():
    base = ("P1", "B02", 1, 1, 1)
    rows = [base] + [(*base[:i], 2, *base[i + 1 :]) for i in range(5)]
    assert len(set(cell_keys(frame(rows)).tolist())) == 6


def test_hundred_thousand_cells_have_as_many_keys():
    assert len(np.unique(many(100_000))) == 100_000


def test_missing_identity_column_is_refused_by_name():
    with pytest.raises(ColumnError, match="Metadata_Site"):
        cell_keys(frame(CELLS).drop(columns="Metadata_Site"))


def test_an_empty_table_has_no_keys():
    assert cell_keys(frame([])).shape == (0,)


def test_scramble_gives_the_published_splitmix64_sequence():
    states = np.array([k * GOLDEN & MASK for k in (1, 2, 3)], dtype=np.uint64)
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert scramble(states).tolist() == known


def test_seeds_equal_the_plain_integer_formula():
    keys = many(50)
    expected = [splitmix(int(key) ^ splitmix(42 + GOLDEN)) for key in keys]
    assert cell_seeds(keys, 42).tolist() == expected


def test_noise_equals_box_muller_on_plain_splitmix_words():
    keys = many(5)
    values = noise(keys, 42, 4)
    for row, seed in zip(values, cell_seeds(keys, 42).tolist(), strict=True):
        expected = []
        for k in (1, 2):
            word = splitmix(seed + k * GOLDEN)
            radius = math.sqrt(-2 * math.log(((word >> 32) + 0.5) / 2**32))
            angle = 2 * math.pi * (word & 0xFFFFFFFF) / 2**32
            expected += [radius * math.cos(angle), radius * math.sin(angle)]
        np.testing.assert_allclose(row, expected, rtol=1e-6, atol=1e-7)


def test_noise_of_a_cell_does_not_depend_on_its_batch():
    keys = many(40)
    whole = noise(keys, 1, 9)
    parts = [noise(part, 1, 9) for part in (keys[:1], keys[1:17], keys[17:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert whole.dtype == np.float32


def test_smaller_noise_is_the_beginning_of_a_larger_one():
    keys = many(10)
    np.testing.assert_array_equal(noise(keys, 1, 3), noise(keys, 1, 8)[:, :3])


def test_noise_is_standard_normal_and_uncorrelated():
    values = noise(many(20_000), 7, 6).astype(float)
    assert stats.kstest(values.ravel(), "norm").pvalue > 0.001
    off_diagonal = np.corrcoef(values.T) - np.eye(6)
    assert np.abs(off_diagonal).max() < 4 / np.sqrt(len(values))


def test_other_seeds_give_independent_noise():
    keys = many(20_000)
    one, other = noise(keys, 0, 2), noise(keys, 1, 2)
    assert abs(np.corrcoef(one[:, 0], other[:, 0])[0, 1]) < 4 / np.sqrt(len(keys))


def test_treatment_is_named_alike_from_floats_integers_and_texts():
    named = [
        treatment_names(
            pd.DataFrame({"Metadata_Compound": ["taxol"], "Metadata_Concentration": [value]})
        )[0]
        for value in (3, 3.0, "3", "3.0", np.float32(3), "3.00")
    ]
    assert set(named) == {"taxol 3"}


def test_treatments_without_columns_are_one_and_missing_values_are_left_out():
    assert treatment_names(pd.DataFrame({"x": [1, 2]})).tolist() == ["", ""]
    table = pd.DataFrame(
        {"Metadata_Compound": ["DMSO", None, "A"], "Metadata_Concentration": [np.nan, 0.1, 0.30]}
    )
    assert treatment_names(table).tolist() == ["DMSO", "0.1", "A 0.3"]


def test_texts_of_names_keep_padding_unless_numbers_are_wanted():
    assert texts(pd.Series(["B02", "02", 2.0, 2.5])).tolist() == ["B02", "02", "2", "2.5"]
    assert texts(pd.Series(["B02", "02"]), whole_numbers=True).tolist() == ["B02", "2"]
