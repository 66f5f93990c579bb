import json

import numpy as np
import pandas as pd
import pytest

from cp2image.config_train import Scaling as ScalingConfig
from cp2image.data.keyed_sample import MAX_CONTROLS, KeyedSample
from cp2image.data.scaling import Scaling, ScalingFit, is_control
from cp2image.errors import CheckpointError, ColumnError, DatasetError

FEATURES = ("Nuclei_AreaShape_Area", "Cells_AreaShape_Area", "Cells_Intensity_MeanIntensity_DNA")
CONFIG = ScalingConfig(min_controls=10)


def keys_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**63, count).astype(np.uint64)


def plate_values(seed, cells=60, shift=0.0):
    return np.random.default_rng(seed).gamma(2, 1, (cells, 3)) * [100, 1, 1e-3] + shift


def fit(plates, config=CONFIG, others=None, per_plate=True):
    fitted = ScalingFit(FEATURES, config, per_plate=per_plate)
    for plate, controls in plates.items():
        keys = keys_of(len(controls))
        if others is None:
            fitted.add_plate(plate, controls, keys)
        else:
            fitted.add_plate(plate, controls, keys, others[plate], keys_of(len(others[plate]), 1))
    return fitted.finish()


@pytest.mark.filterwarnings("ignore")
def test_scaling_equals_pycytominers_mad_robustize_plate_by_plate():
    pycytominer = pytest.importorskip("pycytominer")
    rng = np.random.default_rng(0)
    tables = []
    for number in range(3):
        values = plate_values(number, cells=151 + number, shift=number)
        values[rng.random(values.shape) < 0.04] = np.nan
        table = pd.DataFrame(values, columns=list(FEATURES))
        table["Metadata_Plate"] = f"P{number}"
        table["Metadata_Compound"] = rng.choice(["DMSO", "taxol"], len(table))
        tables.append(table)
    controls = [t[is_control(t, {"Metadata_Compound": "DMSO"})] for t in tables]
    scaling = fit(
        {t["Metadata_Plate"].iloc[0]: t[list(FEATURES)].to_numpy() for t in controls},
        ScalingConfig(clip=1e9),
    )
    for table in tables:
        expected = pycytominer.normalize(
            table,
            features=list(FEATURES),
            meta_features=["Metadata_Plate", "Metadata_Compound"],
            samples="Metadata_Compound == 'DMSO'",
            method="mad_robustize",
            mad_robustize_epsilon=0,
        )[list(FEATURES)].to_numpy()
        found = scaling.apply(table[list(FEATURES)].to_numpy(), table["Metadata_Plate"].tolist())
        np.testing.assert_allclose(found, np.nan_to_num(expected), rtol=1e-6, atol=1e-6)


def test_controls_of_a_plate_become_median_0_and_mad_1():
    scaling = fit({"A": plate_values(1), "B": plate_values(2, shift=50)})
    scaled = scaling.apply(plate_values(2, shift=50), ["B"] * 60)
    np.testing.assert_allclose(np.median(scaled, axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.median(np.abs(scaled), axis=0) * 1.4826, 1, rtol=1e-6)
    assert scaled.dtype == np.float32


def test_missing_and_infinite_values_become_zero_and_the_rest_is_clipped():
    scaling = fit({"A": plate_values(1)})
    values = np.array([[np.nan, np.inf, -np.inf], [1e9, -1e9, 1e9]])
    np.testing.assert_array_equal(scaling.apply(values, ["A", "A"]), [[0, 0, 0], [5, -5, 5]])


@pytest.mark.parametrize("cells", [1, 2_064, 2_065])
def test_more_cells_and_features_than_are_scaled_at_a_time(cells):
    names = tuple(f"Nuclei_{k}" for k in range(65))
    rng = np.random.default_rng(cells)
    center, scale = rng.normal(size=(2, 65)), rng.uniform(0.5, 2, size=(2, 65))
    scaling = Scaling(names, ("A",), center, scale, clip=5.0)
    values = (3 * rng.normal(size=(cells, 65))).astype(np.float32)
    plain = np.clip((values - center[0]) / scale[0], -5, 5).astype(np.float32)
    np.testing.assert_array_equal(scaling.apply(values, ["A"] * cells), plain)
    columns = [np.ascontiguousarray(column) for column in values.T]
    np.testing.assert_array_equal(scaling.apply_columns(columns, ["A"] * cells), plain)


def test_columns_that_do_not_fit_are_refused():
    scaling = fit({"A": plate_values(1)})
    with pytest.raises(DatasetError, match="2 columns for 3 cells"):
        scaling.apply_columns([np.zeros(3), np.zeros(3)], ["A"] * 3)
    with pytest.raises(DatasetError, match="a value for each cell"):
        scaling.apply_columns([np.zeros(2)] * len(scaling.features), ["A"] * 3)


def test_cells_of_mixed_plates_are_scaled_each_by_its_own():
    scaling = fit({"A": plate_values(1), "B": plate_values(2, shift=50)})
    values, plates = plate_values(3), ["A", "B", "new"] * 20
    mixed = scaling.apply(values, plates)
    for row, plate in enumerate(plates):
        index = {"A": 0, "B": 1, "new": 2}[plate]
        plain = np.clip((values[row] - scaling.center[index]) / scaling.scale[index], -5, 5)
        np.testing.assert_allclose(mixed[row], plain, rtol=1e-5, atol=1e-6)


def test_global_row_comes_from_the_controls_of_all_plates():
    plates = {"A": plate_values(1), "B": plate_values(2, shift=50)}
    together = np.concatenate(list(plates.values()))
    center = np.median(together, axis=0)
    scaling = fit(plates)
    np.testing.assert_allclose(scaling.center[-1], center, rtol=1e-12)
    mad = 1.4826 * np.median(np.abs(together - center), axis=0)
    np.testing.assert_allclose(scaling.scale[-1], mad, rtol=1e-12)


def test_a_screen_is_scaled_alike_by_all_plates_controls():
    plates = {"A": plate_values(1), "B": plate_values(2, shift=50)}
    screen, own = fit(plates, per_plate=False), fit(plates)
    assert screen.plates == ()
    np.testing.assert_array_equal(screen.center, own.center[-1:])
    np.testing.assert_array_equal(screen.scale, own.scale[-1:])
    values = plate_values(3)
    np.testing.assert_array_equal(
        screen.apply(values, ["A", "B", "new"] * 20), own.apply(values, ["new"] * 60)
    )
    assert own.takes(10)
    assert not own.takes(9)
    assert not screen.takes(1_000)
    with pytest.raises(DatasetError, match="whole screen's"):
        screen.with_plate("C", plate_values(3))
    again = Scaling.from_tensors(screen.to_tensors(), screen.describe())
    assert not again.per_plate
    older = {k: v for k, v in own.describe().items() if k != "per_plate"}
    assert Scaling.from_tensors(own.to_tensors(), older).per_plate


def test_plate_with_few_controls_uses_the_global_row_and_says_so():
    scaling = fit({"A": plate_values(1), "B": plate_values(2, cells=9)})
    np.testing.assert_array_equal(scaling.center[1], scaling.center[-1])
    np.testing.assert_array_equal(scaling.scale[1], scaling.scale[-1])
    assert any("plate B: 9 control cells, fewer than 10" in note for note in scaling.notes)


def test_screen_without_controls_is_scaled_by_all_training_cells_and_says_so():
    none = np.empty((0, 3))
    others = {"A": plate_values(1), "B": plate_values(2)}
    scaling = fit({"A": none, "B": none}, others=others)
    together = np.concatenate(list(others.values()))
    np.testing.assert_allclose(scaling.center[-1], np.median(together, axis=0), rtol=1e-12)
    assert "all training cells" in scaling.notes[0]


def test_no_cells_at_all_are_refused():
    with pytest.raises(DatasetError, match="no cells to fit"):
        fit({"A": np.empty((0, 3))})


def test_feature_without_spread_on_a_plate_keeps_its_median_and_the_global_scale():
    flat = plate_values(2)
    flat[:, 1] = 7
    scaling = fit({"A": plate_values(1), "B": flat, "C": plate_values(3)})
    assert scaling.center[1, 1] == 7
    assert scaling.scale[1, 1] == scaling.scale[-1, 1] > 0
    assert scaling.scale[1, 0] != scaling.scale[-1, 0]


def test_spread_of_float32_rounding_counts_as_none():
    flat = plate_values(2)
    flat[:, 1] = 1e5 + 1e-3 * np.random.default_rng(5).random(len(flat))
    scaling = fit({"A": plate_values(1), "B": flat, "C": plate_values(3)})
    assert scaling.scale[1, 1] == scaling.scale[-1, 1] > 0.1


def test_feature_without_global_mad_uses_the_standard_deviation():
    values = plate_values(1)
    values[:, 1] = 0
    values[:9, 1] = 3
    assert fit({"A": values}).scale[-1, 1] == pytest.approx(values[:, 1].std())


def test_feature_that_only_treated_cells_vary_in_uses_their_deviation():
    values, treated = plate_values(1), plate_values(2)
    values[:, 1] = 0
    scaling = fit({"A": values}, others={"A": treated})
    together = np.concatenate([values, treated])[:, 1]
    assert scaling.scale[0, 1] == pytest.approx(together.std())


def test_constant_feature_has_scale_one_and_a_note():
    values = plate_values(1)
    values[:, 1] = np.float32(0.1)
    scaling = fit({"A": values})
    assert (scaling.scale[:, 1] == 1).all()
    assert any(FEATURES[1] in note and "scale 1" in note for note in scaling.notes)


def test_feature_missing_on_a_plate_uses_the_global_row():
    values = plate_values(2)
    values[5:, 1] = np.nan
    scaling = fit({"A": plate_values(1), "B": values})
    assert scaling.center[1, 1] == scaling.center[-1, 1]
    assert scaling.center[1, 0] == np.median(values[:, 0])


def test_order_of_plates_and_cells_changes_nothing():
    plates = {name: (plate_values(i, 300), keys_of(300, i)) for i, name in enumerate("ABC")}
    results = []
    for names, step in (("ABC", 1), ("CAB", -1)):
        fitted = ScalingFit(FEATURES, CONFIG)
        for name in names:
            values, keys = plates[name]
            fitted.add_plate(name, values[::step], keys[::step])
        results.append(fitted.finish())
    np.testing.assert_array_equal(results[0].center, results[1].center)
    np.testing.assert_array_equal(results[0].scale, results[1].scale)
    assert results[0].plates == results[1].plates == ("A", "B", "C")


def test_large_plate_is_scaled_by_the_controls_with_the_smallest_keys():
    count = MAX_CONTROLS + 1000
    values, keys = plate_values(1, count), keys_of(count)
    fitted = ScalingFit(FEATURES, CONFIG)
    fitted.add_plate("A", values, keys)
    chosen = values[np.argsort(keys)[:MAX_CONTROLS]]
    np.testing.assert_allclose(fitted.finish().center[0], np.median(chosen, axis=0), rtol=1e-12)


def test_keyed_sample_does_not_depend_on_blocks_and_stays_small():
    values, keys = plate_values(1, 5000), keys_of(5000)
    whole, blocks = KeyedSample(3, 100), KeyedSample(3, 100)
    whole.add(keys, values)
    for part in np.array_split(np.random.default_rng(0).permutation(5000), 37):
        blocks.add(keys[part], values[part])
        assert len(blocks.keys) <= 100
    np.testing.assert_array_equal(blocks.values, whole.values)
    np.testing.assert_array_equal(whole.values, values[np.argsort(keys)[:100]])
    assert blocks.seen == 5000


def test_plate_added_for_generation_is_scaled_as_if_it_had_been_trained_on():
    both = fit({"A": plate_values(1), "B": plate_values(2, shift=9)})
    added = fit({"A": plate_values(1)}).with_plate("B", plate_values(2, shift=9))
    np.testing.assert_array_equal(added.center[:2], both.center[:2])
    np.testing.assert_array_equal(added.scale[:2], both.scale[:2])
    assert added.plates == ("A", "B")


def test_plate_added_with_few_controls_takes_the_global_row():
    scaling = fit({"A": plate_values(1)})
    added = scaling.with_plate("B", plate_values(2, cells=3))
    np.testing.assert_array_equal(added.center[1], scaling.center[-1])
    assert "plate B" in added.notes[-1]


def test_known_plate_cannot_be_added_again():
    with pytest.raises(DatasetError, match="'A' has a scaling already"):
        fit({"A": plate_values(1)}).with_plate("A", plate_values(2))


def test_scaling_survives_tensors_and_json():
    scaling = fit({"A": plate_values(1), "B": plate_values(2, cells=3)})
    description = json.loads(json.dumps(scaling.describe()))
    again = Scaling.from_tensors(scaling.to_tensors(), description)
    np.testing.assert_array_equal(again.center, scaling.center)
    np.testing.assert_array_equal(again.scale, scaling.scale)
    assert again.describe() == scaling.describe()


def test_damaged_tensors_are_refused():
    scaling = fit({"A": plate_values(1)})
    with pytest.raises(CheckpointError, match="scale"):
        Scaling.from_tensors({"center": scaling.center}, scaling.describe())
    with pytest.raises(CheckpointError, match=r"\(2, 3\)"):
        Scaling.from_tensors(
            {"center": scaling.center[:1], "scale": scaling.scale}, scaling.describe()
        )
    with pytest.raises(CheckpointError, match="not positive"):
        Scaling.from_tensors(
            {"center": scaling.center, "scale": 0 * scaling.scale}, scaling.describe()
        )


@pytest.mark.parametrize("shape", [(2, 4), (3, 3)])
def test_values_of_another_shape_are_refused(shape):
    with pytest.raises(DatasetError, match="expected 3 features"):
        fit({"A": plate_values(1)}).apply(np.zeros(shape), ["A", "A"])


def test_controls_are_found_by_all_named_columns():
    cells = pd.DataFrame(
        {
            "Metadata_Compound": ["DMSO", "DMSO", "taxol", None],
            "Metadata_Concentration": [0.0, 1.0, 0.0, 0.0],
        }
    )
    wish = {"Metadata_Compound": "DMSO", "Metadata_Concentration": "0"}
    assert is_control(cells, wish).tolist() == [True, False, False, False]


def test_table_without_compounds_has_no_controls_but_a_misspelt_column_is_refused():
    cells = pd.DataFrame({"Metadata_Well": ["A01"], "Metadata_Compound_Name": ["DMSO"]})
    assert not is_control(cells, {"Metadata_Compound": "DMSO"}).any()
    with pytest.raises(ColumnError, match=r"'Metadata_Wel'.*'Metadata_Well'"):
        is_control(cells, {"Metadata_Wel": "A01"})


def test_centre_and_scale_lead_from_scaled_values_back_to_the_features_own_units():
    scaling = Scaling(
        ("a", "b"), ("P1",), np.array([[1.0, 2], [3, 4]]), np.array([[2.0, 5], [1, 10]]), 5.0
    )
    values = np.array([[2.0, 7], [3.5, -6], [1, 2]])
    plates = ["P1", "unknown", "P1"]
    center, scale = scaling.center_and_scale(plates)
    back = center + scale * scaling.apply(values, plates)
    np.testing.assert_allclose(back, values, atol=1e-5)
