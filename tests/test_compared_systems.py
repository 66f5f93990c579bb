"""VAE, VAEplus and LSGAN through training, checkpoint, generation and evaluation."""

import json
from hashlib import sha256

import numpy as np
import pandas as pd
import pytest

import cp2image
from cp2image.config import Config
from cp2image.data.simulate import SimulatedScreen, simulate_screen
from cp2image.dataset import open_dataset
from cp2image.errors import CheckpointError, ConfigError
from cp2image.evaluation import evaluate
from cp2image.generation import generate
from cp2image.measuring import measure_dataset
from cp2image.models.vae_recipe import VaePlusRecipe
from cp2image.preparation import prepare
from cp2image.serving import PatchModel
from tests.training_experiments import assert_same_weights, plan_of, run_loop

SCREEN = SimulatedScreen(
    plates=2, wells_per_plate=6, cells_per_site=8, field_size=176, defect_share=0.0
)
CHANNELS = ("DNA", "Actin", "Tubulin")
PRESETS = ("vae", "vaeplus", "lsgan")
STEPS = {"vae": 12, "vaeplus": 12, "lsgan": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_inline):
    """A measured screen of two plates, and each system trained on it for a few steps."""
    folder = tmp_path_factory.mktemp("experiment")
    simulate_screen(folder, SCREEN)
    with pytest.MonkeyPatch.context() as patch:
        run_inline(patch)
        config = config_of(folder, "vae")
        prepare(config)
        measure_dataset(config)
        for preset in PRESETS:
            run_loop(plan_of(config_of(folder, preset)))
    return folder


def config_of(folder, preset, run="", by=None, **train):
    place = folder / (run or preset)
    raw = {
        "run": {"folder": str(place), "seed": 1},
        "prepare": {
            "tables": [str(folder / "tables")],
            "images": str(folder / "images"),
            "channels": {name: name for name in CHANNELS},
            "patch_size": 36,
            "output": str(folder / "cells"),
        },
        "measure": {
            "input": str(folder / "cells"),
            "output": str(folder / "measured"),
            "families": ["AreaShape", "Intensity"],
        },
        "scaling": {"min_controls": 5},
        "split": {"by": "well", "validation": 0.3, "test": 0},
        "train": {
            "input": str(folder / "measured"),
            "preset": preset,
            "steps": STEPS[preset],
            "batch_size": 8,
            "log_every": 2,
            "validate_every": 6,
            "checkpoint_every": 3,
            **({"gamma_ramp": 4} if preset == "vaeplus" else {}),
            **train,
        },
        "generate": {
            "input": str(folder / "measured"),
            "checkpoint": str(folder / preset / "checkpoint"),
            "by": by,
        },
        "evaluate": {
            "real": str(folder / "measured"),
            "checkpoint": str(folder / preset / "checkpoint"),
            "families": ["AreaShape", "Intensity"],
            "draws": 2,
        },
        "tracking": {"enabled": False},
    }
    return Config.model_validate(raw).resolve()


def images_of(folder, model):
    cells = pd.read_parquet(folder / "measured").head(6)
    form = open_dataset(str(folder / "measured")).patch_format
    pixels = np.stack([np.frombuffer(p, form.dtype).reshape(form.shape) for p in cells.patch])
    plates = cells["plate" if "plate" in cells else "Metadata_Plate"].astype(str).tolist()
    return cells, model.intensity.apply(pixels, plates, form.full_scale)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_checkpoint_says_what_it_holds_and_sees(folder, preset):
    card = cp2image.load(str(folder / preset / "checkpoint")).card
    assert (card.preset, card.steps) == (preset, STEPS[preset])
    assert card.notes["sees"] == (["noise"] if preset == "lsgan" else ["image"])
    assert card.metrics["validation/L_MSE"] > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_the_served_model_draws_from_noise_by_key_and_seed(folder, preset):
    served = PatchModel(cp2image.load(str(folder / preset / "checkpoint")))
    table = pd.read_parquet(folder / "measured").head(6)
    drawn = served.predict(table)
    assert drawn.shape == (6, 3, 36, 36)
    np.testing.assert_array_equal(served.predict(table.iloc[[4, 1]]), drawn[[4, 1]])
    assert (served.predict(table, {"seed": 2}) != drawn).any(axis=(1, 2, 3)).all()


def test_images_are_for_models_that_see_them(folder):
    model = cp2image.load(str(folder / "vae" / "checkpoint"))
    cells, images = images_of(folder, model)
    drawn = model.generate(cells, images=images)
    np.testing.assert_array_equal(model.generate(cells, seed=9, images=images), drawn)
    assert (model.generate(cells) != drawn).any()
    other = images[::-1]
    np.testing.assert_array_equal(model.generate(cells, images=other)[::-1], drawn)
    with pytest.raises(CheckpointError, match=r"takes \(6, 3, 36, 36\)"):
        model.generate(cells, images=images[:, :2])
    blind = cp2image.load(str(folder / "lsgan" / "checkpoint"))
    with pytest.raises(CheckpointError, match="'lsgan' takes none"):
        blind.generate(cells, images=images)


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("preset", ["vae", "vaeplus"])
def test_a_screen_is_drawn_from_the_cells_own_images_or_from_noise(folder, tmp_path, preset):
    model = cp2image.load(str(folder / preset / "checkpoint"))
    cells, images = images_of(folder, model)
    keys = ["Metadata_Plate", "Metadata_Well", "Metadata_ObjectNumber"]
    expected = {None: model.generate(cells, 1, images), "prior": model.generate(cells, 1)}
    expected["reconstruction"] = expected[None]
    for by, patches in expected.items():
        config = config_of(folder, preset, by=by)
        output = str(tmp_path / str(by))
        generate(
            config.model_copy(
                update={"generate": config.generate.model_copy(update={"output": output})}
            )
        )
        screen = pd.read_parquet(output).astype(dict.fromkeys(keys, str)).set_index(keys)
        wanted = [tuple(map(str, row)) for row in cells[keys].to_numpy()]
        for key, patch in zip(wanted, patches, strict=True):
            assert screen.loc[key, "patch"] == patch.tobytes()


@pytest.mark.usefixtures("inline")
def test_ways_to_draw_that_are_not_there_are_refused(folder):
    with pytest.raises(ConfigError, match="'lsgan' has one way to draw"):
        generate(config_of(folder, "lsgan", run="refused", by="prior"))
    config = config_of(folder, "vae", run="refused")
    table = config.generate.model_copy(update={"input": str(folder / "tables")})
    with pytest.raises(ConfigError, match=r"a table without patches.*generate\.by=prior"):
        generate(config.model_copy(update={"generate": table}))


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize(("preset", "by"), [("vae", None), ("vae", "prior"), ("lsgan", None)])
def test_a_report_says_what_the_system_saw_and_has_the_controls_that_apply(folder, preset, by):
    config = config_of(folder, preset, run=f"{preset}-{by}", by=by)
    generate(config)
    # Only the screen knows how it was drawn: the evaluation's own setting does not count.
    plain = config.generate.model_copy(update={"by": None})
    report = evaluate(config.model_copy(update={"generate": plain}))
    assert "filterbank" in report.distances  # 36 px and a few steps: hardly a nucleus is drawn
    noisy = preset == "lsgan" or by == "prior"
    assert report.protocol["system"] == {
        "preset": preset,
        "sees": ["noise"] if noisy else ["image"],
    }
    assert "shuffle control" not in report.correlation
    assert ("consistency" in report.beside) == noisy
    text = (folder / f"{preset}-{by}" / "report" / "report.json").read_text()
    assert json.loads(text)["protocol"]["system"]["preset"] == preset


def test_an_interrupted_training_ends_as_an_undisturbed_one(folder, monkeypatch):
    config = config_of(folder, "vaeplus", run="interrupted")
    step = VaePlusRecipe.step

    def dying(self, batch, number, average):
        if number == 8:
            raise InterruptedError
        return step(self, batch, number, average)

    with monkeypatch.context() as patched:
        patched.setattr(VaePlusRecipe, "step", dying)
        with pytest.raises(InterruptedError):
            run_loop(plan_of(config))
    run_loop(plan_of(config))
    assert_same_weights(config, config_of(folder, "vaeplus"))


def test_a_setting_that_came_later_counts_only_where_it_is_set():
    """What was made before there were other systems stays valid."""
    config = Config()
    known = config.model_dump(mode="json", include={"train"})
    for name in (
        "beta",
        "input",
        "output",
        "turned",
        "stochastic",
    ):  # the last belongs to another preset
        del known["train"][name]
    text = json.dumps([known, []], sort_keys=True)
    assert config.fingerprint("train") == sha256(text.encode()).hexdigest()[:16]
    changed = Config.model_validate({"train": {"preset": "vae", "beta": 1.0}})
    plain = Config.model_validate({"train": {"preset": "vae"}})
    assert changed.fingerprint("train") != plain.fingerprint("train")


@pytest.mark.parametrize(
    ("train", "name"),
    [
        ({"preset": "lsgan", "gamma_ramp": 5}, "gamma_ramp"),
        ({"preset": "lsgan", "optimiser": "as_named"}, "optimiser"),
        ({"preset": "vae", "gamma": (0, 1, 1, 1)}, "gamma"),
        ({"preset": "paper", "beta": 1.0}, "beta"),
        ({"preset": "vae", "stochastic": {"energy": 0.1}}, "stochastic"),
    ],
)
def test_settings_of_other_systems_are_refused(train, name):
    with pytest.raises(ValueError, match=f"{name} is not a setting of the preset"):
        Config.model_validate({"train": train})
