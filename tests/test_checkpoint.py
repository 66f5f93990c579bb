import json
import os
import shutil

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

import cp2image
from cp2image.checkpoint import (
    FORMAT_VERSION,
    ModelCard,
    load_model,
    load_scaling,
    read_card,
    save_checkpoint,
    save_scaling,
)
from cp2image.columns import IDENTITY, PLATE
from cp2image.config import Config
from cp2image.data.intensity import Intensity
from cp2image.data.scaling import Scaling
from cp2image.data.splits import Splits
from cp2image.errors import CheckpointError, ColumnError
from cp2image.models.cp2image import Discriminator, Generator
from cp2image.tracking import log_model, record

CHANNELS = ("DNA", "Actin")
SIZE = 36
FEATURES = tuple(f"Nuclei_Texture_Contrast_DNA_{i}_00_256" for i in range(1, 7))


def trained_generator(features, channels, size):
    """Weights and batch-norm statistics as training leaves them: images of some contrast."""
    torch.manual_seed(0)
    generator = Generator(features, channels, size)
    for module in generator.modules():
        module.momentum = None  # batch norm then keeps the plain mean over all batches
    with torch.no_grad():
        generator(torch.randn(64, features))
        generator.channel_norm.weight.fill_(0.2)
        generator.channel_norm.bias.fill_(0.4)
    return generator.state_dict()


def save(uri, features=FEATURES, channels=CHANNELS, size=SIZE):
    random = np.random.default_rng(0)
    center = random.normal(size=(3, len(features)))
    scaling = Scaling(features, ("P1", "7"), center, np.full(center.shape, 2.0), clip=5.0)
    save_checkpoint(
        str(uri),
        ModelCard("paper", channels, size, 12, {"validation/L_MSE": 3.5}, {"cells": {"train": 4}}),
        scaling=scaling,
        intensity=Intensity("per_patch_max"),
        splits=Splits("well", 0, {"P1": None}, {"P1": {"train": ["A01"]}}),
        generator=trained_generator(len(features), len(channels), size),
        discriminator=Discriminator(len(channels), size).state_dict(),
        config="run: {name: x}\n",
    )
    return str(uri)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("checkpoint") / "one")


@pytest.fixture(scope="module")
def model(saved):
    return cp2image.load(saved)


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def profiles(count=5, seed=1):
    random = np.random.default_rng(seed)
    frame = pd.DataFrame(random.normal(size=(count, len(FEATURES))) * 3, columns=list(FEATURES))
    frame[PLATE] = ["P1", "7"] * (count // 2) + ["P1"] * (count % 2)
    return frame


def rewrite(folder, **changes):
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def test_loaded_model_says_what_was_saved(model):
    assert model.features == FEATURES
    assert model.channels == CHANNELS
    assert model.patch_format.shape == (2, SIZE, SIZE)
    assert model.patch_format.normalisation == "per_patch_max"
    assert model.card.steps == 12
    assert model.card.metrics == {"validation/L_MSE": 3.5}
    assert model.splits.wells == {"P1": {"train": ["A01"]}}
    assert model.config == "run: {name: x}\n"


def test_card_can_be_read_alone(saved, model):
    assert read_card(saved) == model.card


def test_patches_are_the_generators_on_features_scaled_by_plate(saved, model):
    frame = profiles()
    generator = Generator(6, 2, SIZE).eval()
    generator.load_state_dict(load_file(f"{saved}/weights.safetensors"))
    rows = [model.scaling.plates.index(plate) for plate in frame[PLATE]]
    scaled = (frame[list(FEATURES)].to_numpy() - model.scaling.center[rows]) / 2.0
    with torch.no_grad():
        drawn = generator(torch.tensor(scaled.clip(-5, 5), dtype=torch.float32))
    expected = np.rint(drawn.clamp(0, 1).numpy() * 255)
    found = model.generate(frame)
    assert found.dtype == np.uint8
    assert found.shape == (5, 2, SIZE, SIZE)
    assert np.abs(found - expected).max() <= 1
    assert (found == expected).mean() > 0.999
    assert found.std() > 10


def test_columns_may_come_in_any_order_among_others(model):
    frame = profiles()
    expected = model.generate(frame)
    mixed = frame[list(frame.columns[::-1])].assign(Cells_AreaShape_Area=1.0, note="x")
    np.testing.assert_array_equal(model.generate(mixed), expected)


def test_arrays_are_scaled_by_the_global_row(model):
    frame = profiles().drop(columns=PLATE)
    found = model.generate(frame[list(FEATURES)].to_numpy())
    np.testing.assert_array_equal(found, model.generate(frame))
    unknown = frame.assign(**{PLATE: "never seen"})
    np.testing.assert_array_equal(found, model.generate(unknown))


@pytest.mark.parametrize("plate", [7, 7.0, "7"])
def test_plate_is_known_whatever_type_its_name_was_read_as(model, plate):
    frame = profiles().assign(**{PLATE: plate})
    np.testing.assert_array_equal(
        model.generate(frame), model.generate(frame.assign(**{PLATE: "7"}))
    )


def test_missing_and_infinite_features_count_as_the_controls_median(model):
    frame = profiles()
    rows = [model.scaling.plates.index(plate) for plate in frame[PLATE]]
    expected = frame.copy()
    for row, column, value in ((0, 0, np.nan), (1, 2, np.inf), (2, 5, -np.inf)):
        frame.iloc[row, column] = value
        expected.iloc[row, column] = model.scaling.center[rows[row], column]
    np.testing.assert_array_equal(model.generate(frame), model.generate(expected))


def test_no_cells_give_no_patches(model):
    assert model.generate(profiles()[:0]).shape == (0, 2, SIZE, SIZE)
    with_identity = profiles()[:0].reindex(columns=[*FEATURES, *IDENTITY])
    assert model.generate(with_identity).shape == (0, 2, SIZE, SIZE)


def test_missing_and_misspelled_columns_are_named_with_the_nearest(model):
    frame = profiles().rename(columns={FEATURES[3]: "Nuclei_Texture_Contrst_DNA_4_00_256"})
    frame = frame.drop(columns=FEATURES[5])
    with pytest.raises(ColumnError) as caught:
        model.generate(frame)
    message = str(caught.value)
    assert "2 column(s) missing" in message
    assert FEATURES[3] in message
    assert "Nuclei_Texture_Contrst_DNA_4_00_256" in message
    assert FEATURES[5] in message


def test_doubled_columns_are_refused(model):
    frame = profiles()
    with pytest.raises(ColumnError, match="more than once"):
        model.generate(pd.concat([frame, frame[[FEATURES[0]]]], axis=1))


def test_text_among_the_numbers_is_refused_with_column_row_and_value(model):
    frame = profiles().astype({FEATURES[2]: object})
    frame.loc[3, FEATURES[2]] = "1,5"
    with pytest.raises(ColumnError, match=rf"column '{FEATURES[2]}' holds '1,5' in row 3"):
        model.generate(frame)
    numbers = profiles().astype({FEATURES[2]: str})
    np.testing.assert_array_equal(model.generate(numbers), model.generate(profiles()))


def test_array_of_another_width_is_refused_with_both_shapes(model):
    with pytest.raises(CheckpointError, match=r"shape \(3, 5\), the model takes \(N, 6\)"):
        model.generate(np.zeros((3, 5)))
    with pytest.raises(CheckpointError, match=r"shape \(6,\)"):
        model.generate(np.zeros(6))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    names = tuple(f"Cells_Granularity_{i}_DNA" for i in range(453))
    uri = tmp_path_factory.mktemp("large") / "checkpoint"
    return load_model(save(uri, names, ("DNA", "Actin", "Tubulin"), 68))


def test_neighbours_and_batch_size_do_not_change_a_cells_pixels(large):
    """Forward passes have one size, so pixels are equal to the last bit.

    In passes of fewer than 16 cells they would differ by 1e-6, hence now and then by a grey level.
    """
    values = np.random.default_rng(2).normal(size=(230, 453))
    together = large.generate(values)
    assert together.std() > 10
    order = np.random.default_rng(3).permutation(230)
    np.testing.assert_array_equal(large.generate(values[order]), together[order])
    for start, stop in ((0, 1), (9, 10), (40, 42), (77, 78), (226, 229), (103, 230)):
        alone = large.generate(values[start:stop])
        np.testing.assert_array_equal(alone, together[start:stop])


def test_every_forward_pass_has_the_same_size(large, monkeypatch):
    sizes, drawer = set(), large._drawer

    def draw(features, keys, seed, images):
        sizes.add((len(features), len(keys)))
        return drawer(features, keys, seed, images)

    monkeypatch.setattr(large, "_drawer", draw)
    for cells in (1, 3, 104, 130):
        large.generate(np.zeros((cells, 453)))
    assert len(sizes) == 1


def test_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is missing.*jobs/train\.py"):
        load_model(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["weights.safetensors", "scaling.safetensors", "config.yaml"])
def test_changed_file_is_refused_by_its_hash(copied, name):
    data = bytearray((copied / name).read_bytes())
    data[-1] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} is not the file that was saved"):
        load_model(str(copied))


@pytest.mark.parametrize("name", ["weights.safetensors", "scaling.safetensors", "config.yaml"])
def test_missing_file_is_refused_by_its_name(copied, name):
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_model(str(copied))


def test_checkpoint_of_a_later_version_is_refused(copied):
    uri = rewrite(copied, format_version=FORMAT_VERSION + 1)
    with pytest.raises(CheckpointError, match=f"format {FORMAT_VERSION + 1}.*update cp2image"):
        load_model(uri)


def test_checkpoint_of_an_unknown_network_is_refused(copied):
    with pytest.raises(CheckpointError, match="preset 'transformer', this program knows paper"):
        load_model(rewrite(copied, preset="transformer"))


def test_weights_of_another_network_are_refused(copied):
    rewrite(copied, preset="cp2image-s")
    with pytest.raises(CheckpointError, match="do not fit StochasticGenerator as this version"):
        load_model(str(copied))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}'])
def test_damaged_description_is_refused(copied, text):
    (copied / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is damaged"):
        load_model(str(copied))


def test_scaling_alone_comes_back(model, tmp_path):
    scaling = model.scaling.with_plate("P9", np.random.default_rng(0).normal(size=(30, 6)))
    save_scaling(str(tmp_path / "scaling.safetensors"), scaling)
    found = load_scaling(str(tmp_path / "scaling.safetensors"))
    assert found.describe() == scaling.describe()
    np.testing.assert_array_equal(found.center, scaling.center)
    np.testing.assert_array_equal(found.scale, scaling.scale)


@pytest.fixture(scope="module")
def registered(tmp_path_factory, saved):
    """The checkpoint logged to a new MLflow store, registered and given an alias."""
    config = Config.model_validate(
        {
            "run": {"folder": str(tmp_path_factory.mktemp("run"))},
            "train": {"output": saved},
            "tracking": {"register_as": "cells"},
        }
    )
    model = load_model(saved)
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        with record(config, "train") as recorder:
            log_model(recorder, config, model.features, model.patch_format)
        assert "MLFLOW_TRACKING_URI" not in os.environ
        client = MlflowClient(recorder.tracking_uri)
        client.set_registered_model_alias("cells", "champion", 1)
        mlflow.set_tracking_uri(recorder.tracking_uri)
        yield "models:/cells@champion", client, recorder
        mlflow.set_tracking_uri(None)


def test_registered_model_is_loaded_by_its_alias_and_draws_the_same(registered, model, tmp_path):
    uri, client, recorder = registered
    frame = profiles()
    expected = model.generate(frame)
    np.testing.assert_array_equal(cp2image.load(uri).generate(frame), expected)

    served = mlflow.pyfunc.load_model(uri)
    found = served.predict(frame)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    without_plate = frame.drop(columns=PLATE)
    np.testing.assert_array_equal(served.predict(without_plate), model.generate(without_plate))

    assert [column.name for column in served.metadata.signature.inputs] == [*FEATURES, PLATE]
    assert served.metadata.signature.outputs.inputs[0].shape == (-1, 2, SIZE, SIZE)
    assert client.get_run(recorder.run_id).info.status == "FINISHED"


def test_logged_model_holds_no_pickle(registered, tmp_path):
    uri, *_ = registered
    folder = mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "model"))
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".yaml", ".txt", ""}
    assert "checkpoint.json" in {path.name for path in files}
    for path in files:
        assert not path.read_bytes().startswith((b"\x80\x04", b"\x80\x05", b"PK\x03\x04")), path
    described = (tmp_path / "model" / "MLmodel").read_text()
    assert "loader_module: cp2image.serving" in described
    assert "python_model" not in described
    assert folder


def test_unknown_registered_model_is_refused(registered):
    with pytest.raises(CheckpointError, match="models:/cells@absent: MLflow has no such model"):
        load_model("models:/cells@absent")


def test_a_store_that_is_not_there_is_not_made_by_looking_into_it(tmp_path):
    with pytest.raises(CheckpointError, match="there is no MLflow store at"):
        load_model("models:/cells@absent", store=f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())


def test_registered_model_is_found_in_the_store_that_is_named(registered, model, tmp_path):
    uri, _, recorder = registered
    other = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(other)
    try:
        found = load_model(uri, store=recorder.tracking_uri)
        assert mlflow.get_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] == other
    finally:
        mlflow.set_tracking_uri(recorder.tracking_uri)
    np.testing.assert_array_equal(found.generate(profiles()), model.generate(profiles()))


def test_a_scaling_of_chosen_columns_survives_storage(tmp_path):
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(3, 7)), rng.uniform(1, 2, size=(3, 7))
    center, scale = (values[:, [6, 2, 4]] for values in wide)  # numpy leaves these in column order
    scaling = Scaling(("a", "b", "c"), ("P1", "P2"), center, scale, 5.0)
    save_scaling(str(tmp_path / "scaling.safetensors"), scaling)
    found = load_scaling(str(tmp_path / "scaling.safetensors"))
    np.testing.assert_array_equal(found.center, center)
    np.testing.assert_array_equal(found.scale, scale)
