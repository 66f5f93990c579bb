"""Metrics on spoilt cells of the simulated screen; the ways to spoil; the judgement itself."""

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

from cp2image import sanity
from cp2image.config import Config
from cp2image.data.simulate import SimulatedScreen, simulate_screen
from cp2image.errors import EvaluationError
from cp2image.metrics.spoiling import WAYS
from cp2image.preparation import prepare
from cp2image.sanity import check_metrics, to_markdown

SCREEN = SimulatedScreen(plates=1, wells_per_plate=16, cells_per_site=25, field_size=352)
CHANNELS = ("DNA", "Actin", "Tubulin")


@pytest.fixture(scope="module")
def config(tmp_path_factory, run_inline):
    folder = tmp_path_factory.mktemp("screen")
    simulate_screen(folder, SCREEN)
    raw = {
        "run": {"folder": str(folder)},
        "prepare": {
            "tables": [str(folder / "tables")],
            "images": str(folder / "images"),
            "channels": {name: name for name in CHANNELS},
        },
        "sanity": {"cells": 400},
        "tracking": {"enabled": False},
    }
    config = Config.model_validate(raw).resolve()
    with pytest.MonkeyPatch.context() as patch:
        run_inline(patch)
        prepare(config)
    return config


@pytest.fixture(scope="module")
def found(config):
    return check_metrics(config)


def test_distances_rise_and_stay_as_they_should(found):
    table = found.table.set_index(["metric", "way"])
    for metric in ("Fréchet, filterbank", "KID, filterbank"):
        for way in WAYS:
            expected = "stays" if way == "features shuffled" else "up"
            assert table.loc[(metric, way), "moved"] == expected, (metric, way)


def test_density_falls_where_one_cell_far_from_all_others_misleads_precision(config, monkeypatch):
    """A cell out of focus has a ball that anything lies in: precision stays, density falls."""
    patches, channels = sanity._real_cells(config.sanity.input, config.sanity.cells)
    far = gaussian_filter(patches[:4], (0, 0, 6, 6))
    planted = np.concatenate([patches[: len(patches) - len(far)], far])
    monkeypatch.setattr(sanity, "_real_cells", lambda *_: (planted, channels))
    table = check_metrics(config).table.set_index(["metric", "way"])
    for way in ("blur", "mean image"):
        precision, density = (
            table.loc[(f"{m}, filterbank", way)] for m in ("precision", "density")
        )
        assert precision["spoilt"] > 0.5
        assert precision["expected"] == "down"
        assert precision["right"] == "no"
        assert (density["moved"], density["right"]) == ("down", "yes")
        assert density["spoilt"] < 0.4 * density["real"]


def test_coverage_falls_and_correlation_tells_a_shuffle(found):
    table = found.table.set_index(["metric", "way"])
    for way in ("blur", "noise", "mean image", "ten cells only", "channels swapped"):
        assert table.loc[("coverage, filterbank", way), "moved"] == "down", way
    assert abs(table.loc[("mean r", "features shuffled"), "spoilt"]) < 0.15
    assert 0.3 < table.loc[("mean r", "blur"), "spoilt"] < 0.99


def test_a_metric_that_does_not_move_as_it_should_is_named(found, tmp_path):
    assert set(found.wrong["right"]) <= {"no"}
    text = str(found)
    assert "moves the wrong way: " in text
    for row in found.wrong.itertuples():
        assert f"{row.metric} on {row.way}: {row.moved}" in text
    assert text.count("✗") == len(found.wrong)


def test_a_blind_metric_is_found_out(config, monkeypatch):
    """Break the code: a distance that always says the same moves nowhere."""
    monkeypatch.setattr(sanity, "frechet_distance", lambda *_, **__: 1.0)
    wrong = check_metrics(config).wrong
    assert (wrong["metric"] == "Fréchet, filterbank").sum() == 5


def test_the_table_has_a_column_for_each_way():
    row = {"metric": "KID, cp", "spoilt": 2.0, "real": 1.0, "right": "no"}
    table = pd.DataFrame([row | {"way": "blur"}, row | {"way": "noise", "right": "yes"}])
    assert "| KID, cp | 1 | 2 ✗ | 2 |" in to_markdown(table)


def test_few_cells_are_refused(config):
    few = config.sanity.model_copy(update={"cells": 200})
    with pytest.raises(EvaluationError, match="200 cells"):
        check_metrics(config.model_copy(update={"sanity": few}))


def test_ways_to_spoil_do_what_they_say():
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (30, 3, 40, 40), dtype=np.uint8)
    spoilt = {way: spoil(patches, np.random.default_rng(1)) for way, spoil in WAYS.items()}
    for one in spoilt.values():
        assert one.shape == patches.shape
        assert one.dtype == np.uint8
    assert spoilt["blur"].std() < 0.5 * patches.std()
    assert (spoilt["noise"] != patches).mean() > 0.9
    assert len(np.unique(spoilt["mean image"].reshape(30, -1), axis=0)) == 1
    assert len(np.unique(spoilt["ten cells only"].reshape(30, -1), axis=0)) <= 10
    np.testing.assert_array_equal(spoilt["channels swapped"][:, 0], patches[:, 1])
    assert sorted(p.tobytes() for p in spoilt["features shuffled"]) == sorted(
        p.tobytes() for p in patches
    )
    assert (spoilt["features shuffled"] != patches).any(axis=(1, 2, 3)).mean() > 0.8
