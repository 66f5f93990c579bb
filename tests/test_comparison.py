import json

import numpy as np
import pyarrow as pa
import pytest
import yaml

from cp2image import comparison
from cp2image.command import run_job
from cp2image.comparison import _metric_name, derive
from cp2image.comparison_table import tabulate, to_markdown
from cp2image.config import Config
from cp2image.config_reading import read_config
from cp2image.data.schema import PatchFormat
from cp2image.dataset import Manifest, Part
from cp2image.errors import CheckpointError, ColumnError, ConfigError, EvaluationError

SYSTEMS = {
    "paper": {"train": {"learning_rate": 0.003}},
    "new": {"train": {"preset": "cp2image-s"}},
}


def config(tmp_path, **more):
    return Config.model_validate(
        {
            "run": {"name": "screen", "folder": str(tmp_path)},
            "train": {"input": str(tmp_path / "cells"), "normalisation": "plate_percentile"},
            "compare": {"systems": SYSTEMS, "seeds": [0, 4]} | more,
        }
    ).resolve()


def report(frechet, r, accuracy=0.5):
    distance = {
        "frechet_half": frechet,
        "floor_half": 2.0,
        "kernel": frechet / 10,
        "kernel_floor": 0.01,
        **dict.fromkeys(("precision", "recall", "coverage"), 0.5),
        **dict.fromkeys(("precision_floor", "recall_floor", "coverage_floor"), 0.8),
    }
    return {
        "distances": {"cp": distance},
        "correlation": {
            "model": {"share_above_half": r, "mean_r": r / 2},
            "ceiling": {"share_above_half": 0.9, "mean_r": 0.8},
            "shuffle control": {"share_above_half": 0.0, "mean_r": 0.01},
        },
        "moa": {
            "generated": {"nsc": {"accuracy": accuracy}},
            "real": {"nsc": {"accuracy": 0.75}},
        },
        "protocol": {
            "cells": 1000,
            "wells": 20,
            "plates": ["P1", "P2"],
            "split": "validation",
            "normalisation": "plate_percentile",
            "with_nucleus": {"real": 1.0, "generated": 0.9},
            "system": {"preset": "paper", "sees": ["features"]},
        },
        "training": {"seconds": 3600.0, "cells_seen": 1_000, "steps": 10},
        "shown": [1, 2],
    }


def test_each_run_has_its_folder_seed_and_settings_and_all_one_store(tmp_path):
    whole = config(tmp_path)
    one, other = derive(whole, "paper", 0), derive(whole, "new", 4)
    assert one.train.learning_rate == 0.003
    assert other.train.preset == "cp2image-s"
    assert other.run.seed == 4
    assert one.train.output == f"{tmp_path}/comparison/paper/seed-0/checkpoint"
    assert other.generate.output == f"{tmp_path}/comparison/new/seed-4/screen"
    assert one.evaluate.real == one.generate.input == f"{tmp_path}/cells"
    assert one.train.intensity == other.train.intensity == "plate_percentile"
    assert one.tracking.uri == other.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_change_deep_down_leaves_its_neighbours(tmp_path):
    whole = config(tmp_path)
    train = {"preset": "cp2image-s", "stochastic": {"energy": 0.1}}
    systems = {"new": {"train": {"stochastic": {"regression": 2.0}}}}
    base = whole.model_dump()
    base["train"] |= train
    base["compare"]["systems"] = systems
    found = derive(Config.model_validate(base), "new", 0).train.stochastic
    assert (found.energy, found.regression) == (0.1, 2.0)


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        (
            {"new": {"train": {"preset": "cp2image-s", "gamma": [0, 0, 0, 0]}}},
            "new: .*gamma is not",
        ),
        ({"new": {"train": {"learning_rat": 1}}}, "new: .*learning_rate"),
        ({"new": {"train": 3}}, "expected a section"),
        ({"new": {"trian": {"steps": 3}}}, "new: .*train"),
    ],
)
def test_settings_a_system_cannot_have_are_refused_before_anything_runs(
    tmp_path, monkeypatch, systems, message
):
    monkeypatch.setattr(comparison, "_run", lambda _: pytest.fail("a run was begun"))
    with pytest.raises(ConfigError, match=message):
        comparison.compare(config(tmp_path, systems=SYSTEMS | systems))
    with pytest.raises(ConfigError, match="names no system"):
        comparison.compare(config(tmp_path, systems={}))


def test_a_system_may_be_another_ones_checkpoint_drawn_differently(tmp_path):
    systems = {
        "vae": {"train": {"preset": "vae", "beta": 0.5}, "evaluate": {"draws": 2}},
        "vae-prior": {"trained_as": "vae", "generate": {"by": "prior"}},
    }
    whole = config(tmp_path, systems=systems)
    vae, prior = derive(whole, "vae", 4), derive(whole, "vae-prior", 4)
    assert prior.train == vae.train
    assert prior.run.seed == vae.run.seed == 4
    assert prior.generate.checkpoint == prior.evaluate.checkpoint == vae.train.output
    assert prior.generate.by == "prior"
    assert vae.generate.by is None
    assert prior.evaluate.draws == 2
    assert prior.generate.output == f"{tmp_path}/comparison/vae-prior/seed-4/screen"
    assert vae.generate.output == f"{tmp_path}/comparison/vae/seed-4/screen"


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ({"trained_as": "vea"}, "trained_as 'vea'"),
        ({"trained_as": "vae", "train": {"steps": 3}}, "train belong to 'vae'"),
        ({"trained_as": "chained"}, "that is trained itself"),
    ],
)
def test_another_ones_checkpoint_has_to_be_there_and_stays_as_it_is(tmp_path, prior, message):
    systems = {"vae": {"train": {"preset": "vae"}}, "chained": {"trained_as": "vae"}}
    with pytest.raises(ConfigError, match=message):
        derive(config(tmp_path, systems=systems | {"prior": prior}), "prior", 0)


def test_given_checkpoints_are_scored_without_training(tmp_path, monkeypatch):
    given = [str(tmp_path / "elsewhere"), "runs:/abc/model"]
    whole = config(tmp_path, systems={"mine": {"checkpoints": given, "evaluate": {"draws": 2}}})
    first, second = derive(whole, "mine", 0), derive(whole, "mine", 4)
    assert [one.generate.checkpoint for one in (first, second)] == given
    assert [one.evaluate.checkpoint for one in (first, second)] == given
    assert first.evaluate.draws == 2
    assert first.train.output not in given
    trained = []
    loaded = []
    monkeypatch.setattr(
        comparison, "_refuse_foreign", lambda one: loaded.append(one.generate.checkpoint)
    )
    monkeypatch.setattr(comparison, "_run", lambda one, trains: trained.append(trains) or {})
    with pytest.raises(KeyError, match="distances"):  # tabulation of the empty reports
        comparison.compare(whole)
    assert trained == [False, False]
    assert loaded == given


def test_a_given_checkpoint_that_is_not_there_is_refused_before_anything_runs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(comparison, "_run", lambda *_, **__: pytest.fail("a run was begun"))
    given = {"mine": {"checkpoints": [str(tmp_path / "nowhere")] * 2}}
    with pytest.raises(CheckpointError, match="nowhere"):
        comparison.compare(config(tmp_path, systems=SYSTEMS | given))


def test_a_given_checkpoint_of_other_channels_or_columns_is_refused_before_anything_runs(
    tmp_path, monkeypatch
):
    class Drawer:
        channels, features = ("DNA", "Actin"), ("Nuclei_AreaShape_Area",)

    class Cells:
        uri = "cells"
        schema = pa.schema({"Nuclei_AreaShape_Area": pa.float32()})
        patch_format = PatchFormat(("DNA", "Tubulin"), 68, "uint8", 8, "none")

    monkeypatch.setattr(comparison, "_run", lambda *_, **__: pytest.fail("a run was begun"))
    monkeypatch.setattr(comparison, "load_model", lambda *_, **__: Drawer)
    monkeypatch.setattr(comparison, "open_dataset", lambda _: Cells)
    whole = config(tmp_path, systems=SYSTEMS | {"mine": {"checkpoints": ["a", "b"]}})
    with pytest.raises(ConfigError, match="a draws DNA, Actin; cells has DNA, Tubulin"):
        comparison.compare(whole)
    Drawer.features = ("Nuclei_AreaShape_Perimeter",)
    with pytest.raises(ColumnError, match="Nuclei_AreaShape_Perimeter"):
        comparison.compare(whole)


def test_too_few_held_out_cells_for_inception_are_refused_before_anything_runs(
    tmp_path, monkeypatch
):
    keys = {"train": np.arange(9_000), "test": np.arange(4_000), "validation": np.arange(50)}
    monkeypatch.setattr(comparison, "check_weights", lambda _: None)
    monkeypatch.setattr(comparison, "open_dataset", lambda _: None)
    monkeypatch.setattr(comparison, "split_cells", lambda *_: (None, None, keys))
    monkeypatch.setattr(comparison, "_run", lambda *_, **__: pytest.fail("a run was begun"))
    evaluate = {"embeddings": ["inception"], "inception_weights": "here", "split": "test"}
    systems = {"paper": {"evaluate": evaluate}}
    with pytest.raises(EvaluationError, match=r"4,000 cells for the 2,048"):
        comparison.compare(config(tmp_path, systems=systems))
    few = {"paper": {"evaluate": evaluate | {"split": "train", "cells": 4_000}}}
    with pytest.raises(EvaluationError, match=r"4,000 cells for the 2,048"):
        comparison.compare(config(tmp_path, systems=few))
    enough = {"paper": {"evaluate": evaluate | {"split": "train"}}}
    with pytest.raises(pytest.fail.Exception, match="a run was begun"):
        comparison.compare(config(tmp_path, systems=enough))


def test_inception_weights_that_are_not_there_are_refused_before_anything_runs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(comparison, "_run", lambda *_, **__: pytest.fail("a run was begun"))
    evaluate = {"embeddings": ["cp", "inception"], "inception_weights": str(tmp_path / "no.pth")}
    systems = SYSTEMS | {"new": SYSTEMS["new"] | {"evaluate": evaluate}}
    with pytest.raises(EvaluationError, match=r"evaluate\.inception_weights: .*no\.pth"):
        comparison.compare(config(tmp_path, systems=systems))


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ({"foo": None}, r"systems\.foo = null: expected the sections"),
        ({"../up": {}}, r"systems\.\.\./up = .*: a system's name is the name of its folder"),
        ({"table": {}}, r"systems\.table = .*choose another name"),
        ({"mine": {"trained_as": ["a"]}}, r"systems\.mine: trained_as: expected a system's name"),
        ({"mine": {"checkpoints": "one"}}, r"systems\.mine: checkpoints: expected a list"),
        ({"mine": {"checkpoints": [3, 4]}}, r"systems\.mine: checkpoints: expected a list"),
    ],
)
def test_systems_that_are_no_systems_are_refused_in_words(systems, message, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"compare": {"systems": systems}}))
    with pytest.raises(ConfigError, match=message):
        read_config(str(tmp_path / "c.yaml"))


def test_a_dry_run_shows_given_checkpoints(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    given = [str(tmp_path / "there"), str(tmp_path / "gone"), "runs:/abc/model"]
    systems = {"paper": {}, "mine": {"checkpoints": given}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"compare": {"systems": systems}}))
    argv = ["--dry-run", "--config", str(tmp_path / "c.yaml")]
    reads = ["compare.systems.*.checkpoints"]
    assert run_job("Compare.", lambda _: pytest.fail("ran"), argv, reads=reads) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    key = "# reads compare.systems.mine.checkpoints:"
    assert told == [
        f"{key} {tmp_path}/there (found)",
        f"{key} {tmp_path}/gone (not there)",
        f"{key} runs:/abc/model (of MLflow)",
    ]


@pytest.mark.parametrize("more", [{"checkpoints": ["one"]}, {"train": {"steps": 3}}])
def test_given_checkpoints_are_one_for_each_seed_and_bring_their_training(tmp_path, more):
    mine = {"checkpoints": ["one", "two"]} | more
    with pytest.raises(ConfigError, match=r"mine: checkpoints names one .*seeds \(2\)"):
        derive(config(tmp_path, systems={"mine": mine}), "mine", 0)


def test_table_says_when_systems_were_scored_on_other_cells():
    other = report(5, 0.6)
    other["protocol"]["plates"] = ["P3"]
    same = {("paper", 0): report(70, 0.2), ("new", 0): report(5, 0.6)}
    apart = same | {("new", 0): other}
    assert "same cells" not in to_markdown(tabulate(same, ["paper", "new"]), same)
    text = to_markdown(tabulate(apart, ["paper", "new"]), apart)
    assert "**Not all were scored on the same cells**" in text
    assert "1,000 cells: paper, seed 0; 1,000 cells: new, seed 0" in text


def test_seeds_stand_once(tmp_path):
    with pytest.raises(ValueError, match="a seed stands twice"):
        config(tmp_path, seeds=[1, 1])


def test_table_has_mean_spread_floor_and_excess():
    reports = {
        ("paper", 0): report(70, 0.2),
        ("paper", 1): report(74, 0.3),
        ("new", 0): report(5, 0.6),
        ("new", 1): report(7, 0.8),
    }
    table = tabulate(reports, ["paper", "new"]).set_index(["metric", "system"])
    row = table.loc[("Fréchet, cp", "new")]
    assert (row["mean"], row["floor"], row["excess"], row["seeds"]) == (6, 2, 4, 2)
    assert row["sd"] == pytest.approx(np.sqrt(2))
    assert bool(row["lower"])
    assert table.loc[("features with r > 0.5", "paper"), "mean"] == pytest.approx(0.25)
    assert table.loc[("mean r", "paper"), "floor"] == pytest.approx(0.8)
    assert table.loc[("mean r, shuffled (control)", "new"), "mean"] == pytest.approx(0.01)
    assert table.loc[("NSC", "new"), "floor"] == 0.75
    text = to_markdown(tabulate(reports, ["paper", "new"]), reports)
    assert "| Fréchet, cp ↓ | 72 ± 2.8 | 6 ± 1.4 | 2 |" in text
    assert "| sees | features | features | |" in text.splitlines()[2]
    assert "over 2 seeds; 1,000 cells of 20 wells on 2 plates" in text
    assert "paper: 60 minutes" in text


def test_mlflow_takes_every_heading_and_no_two_become_one():
    from mlflow.utils.validation import _validate_metric_name

    table = tabulate({("paper", 0): report(70, 0.2)}, ["paper"])
    names = [_metric_name(heading) for heading in table["metric"]]
    for name in names:
        _validate_metric_name(f"paper/{name}")
    assert len(set(names)) == len(set(table["metric"]))
    assert "Fréchet cp limit" in names


def test_a_system_without_nuclei_leaves_its_cells_of_the_table_empty():
    blind = report(70, 0.2)
    del blind["distances"]["cp"], blind["moa"], blind["correlation"]["shuffle control"]
    blind["protocol"]["with_nucleus"]["generated"] = 0.01
    reports = {("blind", 0): blind, ("new", 0): report(5, 0.6)}
    table = tabulate(reports, ["blind", "new"])
    text = to_markdown(table, reports)
    assert "| Fréchet, cp ↓ | — | 5 | 2 |" in text
    assert "| cells with a nucleus ↑ | 0.01 | 0.9 | 1 |" in text
    assert "| NSC ↑ | — | 0.5 | 0.75 |" in text


def test_a_table_of_checkpoints_from_elsewhere_says_what_is_not_known():
    mine = report(5, 0.6)
    mine["training"] = {"steps": 10, "preset": "paper", "seconds": None, "cells_seen": None}
    reports = {("mine", 0): mine, ("mine", 1): mine | {"training": {"preset": "paper"}}}
    text = to_markdown(tabulate(reports, ["mine"]), reports)
    assert "Training: mine: time not recorded, cells seen not recorded, steps not recorded." in text


def test_a_table_says_when_a_covariance_is_singular():
    few = report(5, 0.6)
    few["distances"]["cp"]["singular"] = True
    reports = {("paper", 0): report(70, 0.2), ("new", 0): few}
    text = to_markdown(tabulate(reports, ["paper", "new"]), reports)
    assert "**cp: no more cells in a half than dimensions**" in text
    del reports["new", 0]
    assert "no more cells" not in to_markdown(tabulate(reports, ["paper"]), reports)


def test_a_finished_evaluation_is_not_repeated_unless_cells_weights_or_settings_changed(
    tmp_path, monkeypatch
):
    one = derive(config(tmp_path), "paper", 0)
    calls = []

    class Card:
        steps, preset, notes = 10, "paper", {"seconds": 1.0, "cells_seen": 5}

    class Weights:
        hash, card = "a", Card

    def evaluate(run):
        calls.append(run)
        folder = tmp_path / "comparison/paper/seed-0/report"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(report(1, 1)))

    monkeypatch.setattr(comparison, "train", lambda _: "trained")
    monkeypatch.setattr(comparison, "generate", lambda _: "generated")
    monkeypatch.setattr(comparison, "evaluate", evaluate)
    monkeypatch.setattr(comparison, "load_model", lambda *_, **__: Weights)
    parts = {uri: (Part("a.parquet", 5, 1),) for uri in (one.evaluate.real, one.evaluate.generated)}

    class Cells:
        def __init__(self, uri):
            self.manifests = {"P1": Manifest("P1", "settings", parts[uri])}

    monkeypatch.setattr(comparison, "open_dataset", Cells)
    weights = tmp_path / "inception.pth"
    weights.write_bytes(b"one")
    inception = {"embeddings": ["cp", "inception"], "inception_weights": str(weights)}
    one = one.model_copy(update={"evaluate": one.evaluate.model_copy(update=inception)})
    for _ in range(2):
        found = comparison._run(one)
    assert len(calls) == 1
    assert found["training"]["seconds"] == 1.0
    Weights.hash = "b"
    comparison._run(one)
    assert len(calls) == 2
    changed = one.model_copy(update={"evaluate": one.evaluate.model_copy(update={"cells": 7})})
    comparison._run(changed)
    assert len(calls) == 3

    def done_again(run):
        before = len(calls)
        comparison._run(run)
        comparison._run(run)
        return len(calls) - before

    for uri in parts:  # drawn or prepared anew
        parts[uri] = (Part("b.parquet", 5, 1),)
        assert done_again(changed) == 1
    weights.write_bytes(b"other")
    assert done_again(changed) == 1
    monkeypatch.setattr(comparison, "SPLITS", 3)  # of a version that scored otherwise
    assert done_again(changed) == 1
    measure = changed.measure.model_copy(update={"compartments": ["Nuclei"]})
    assert done_again(changed.model_copy(update={"measure": measure})) == 1
    assert done_again(changed) == 1
    place = tmp_path / "comparison/paper/seed-0/report/report.json"
    place.write_text(json.dumps(report(9, 9)))  # of an evaluation that ended before its mark
    assert done_again(changed) == 1
    place.write_text("{")
    assert done_again(changed) == 1
    place.unlink()
    assert done_again(changed) == 1
