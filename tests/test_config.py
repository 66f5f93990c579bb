import pickle
import subprocess
import sys
from dataclasses import asdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cp2image import errors
from cp2image.config import Config, local_folder
from cp2image.config_reading import read_config
from cp2image.errors import ConfigError, Cp2ImageError, StorageError
from cp2image.models.stochastic_setting import StochasticSetting

PLATES = ["20585", "0123", "NO", "on", "null", "~", "1e3", "1_000", "0x1F", "12:30", "2024-01-01"]


@pytest.fixture
def read(tmp_path):
    def read(text, *overrides):
        path = tmp_path / "experiment.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_config(str(path), list(overrides))

    return read


def refusal(read, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    message = str(caught.value)
    assert "pydantic" not in message
    assert "Traceback" not in message
    return message.replace("\n", " ")


def test_without_a_file_the_defaults_hold_and_outputs_lie_below_the_run():
    config = read_config(None)
    assert config.prepare.output == "runs/cp2image/cells"
    assert config.train.input == "runs/cp2image/measured"  # no tables: patches are measured
    assert config.generate.checkpoint == config.train.output == "runs/cp2image/checkpoint"


def test_the_steps_of_one_experiment_find_each_other(read):
    config = read(
        "run: {folder: s3://lab/run1/}\nprepare: {tables: [a.csv]}\ntrain: {output: ck}\n"
    )
    assert (
        config.prepare.output == config.train.input == config.evaluate.real == "s3://lab/run1/cells"
    )
    assert config.evaluate.generated == config.generate.output == "s3://lab/run1/screen"
    assert config.train.output == "ck"
    assert config.resolve() == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trian: {}", "unknown key 'trian' (did you mean 'train'?)"),
        ("train: {stpes: 5}", "unknown key 'train.stpes' (did you mean 'steps'?)"),
        ("train: {Steps: 5}", "unknown key 'train.Steps' (did you mean 'steps'?)"),
        ("prepare: {quality: {dorp: []}}", "'prepare.quality.dorp' (did you mean 'drop'?)"),
        ("prepare: {stacks: {indx: a}}", "'prepare.stacks.indx' (did you mean 'index'?)"),
        ("steps: 5", "unknown key 'steps' (it belongs below 'train:')"),
        ("run: {gamma_ramp: 5}", "unknown key 'run.gamma_ramp' (it belongs below 'train:')"),
        ("xyzzy: 5", "unknown key 'xyzzy'"),
    ],
)
def test_an_unknown_key_at_any_depth_is_refused_with_the_nearest_one(read, text, expected):
    assert expected in refusal(read, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {steps: many}", 'train.steps = "many": expected a whole number'),
        ("train: {steps: 2.5}", "train.steps = 2.5: expected a whole number"),
        ("train: {steps: 0}", "train.steps = 0: should be greater than 0"),
        ("train: {steps: true}", "train.steps = true: expected a number"),
        ("train: {steps: [1]}", "train.steps = [1]: expected a whole number"),
        ("train: {learning_rate: fast}", 'train.learning_rate = "fast": expected a number'),
        ("train: {minutes: .inf}", "should be a finite number"),
        ("train: {minutes: .nan}", "train.minutes = NaN: should be"),
        ("train: {gpu: 3}", "train.gpu = 3: expected true or false"),
        ("train: {gamma: [1, 1]}", "train.gamma.2 is missing"),
        ("train: {gamma: [1, 1, 1, 1, 1]}", "expected 4 values, not 5"),
        ("train: 5", "train = 5: expected keys below it"),
        ("split: {by: wel}", "should be 'well', 'plate' or 'cell' (did you mean 'well'?)"),
        ("split: {test_plates: P1}", 'split.test_plates = "P1": expected a list'),
        ("prepare: {quality: {drop: [nois]}}", "(did you mean 'noise'?)"),
        ("prepare: {channels: [DNA]}", "expected keys with values, as {DNA: OrigDNA}"),
        ("prepare: {patch_size: 8}", "should be greater than or equal to 16"),
        ("run: {folder: null}", "run.folder = null: expected text"),
        ("run: {folder: ''}", 'run.folder = "": expected text'),
        ("run: {name: true}", "run.name = true: expected text"),
    ],
)
def test_a_wrong_value_is_refused_saying_what_was_found_and_expected(read, text, expected):
    assert expected in refusal(read, text)


def test_every_problem_of_a_file_is_told_at_once(read):
    message = refusal(read, "train: {steps: x, stpes: 1}\nrun: {seed: -1}")
    assert "experiment.yaml: 3 problems" in message
    assert all(key in message for key in ("'train.stpes'", "train.steps", "run.seed"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "train:\n  steps: 5\n  gpu: no\n  steps: 6\n",
            "line 4: the key 'steps' stands here and in line 2",
        ),
        ("train: {}\nrun: {}\ntrain: {}\n", "line 3: the key 'train'"),
        ("train:\n\tsteps: 5\n", "line 2: while scanning"),
        ("train:\n  gamma: [1, 1\nrun: {}\n", "line 3:"),
        ("train: !!python/object:os.system {}\n", "line 1: could not determine"),
        ("- train\n", "expected sections such as 'train:', found ['train']"),
        ("version https://git-lfs.github.com/spec/v1\n", "expected sections such as"),
        ("name: \x07\n", "not YAML"),
        (b"name: \xb5m\n", "save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n", "not text in UTF-8"),
    ],
)
def test_what_is_no_proper_yaml_is_refused_with_its_line(read, text, expected):
    assert expected in refusal(read, text)


def test_a_tab_is_explained(read):
    assert "indent with spaces, not tabs" in refusal(read, "train:\n\tsteps: 5\n")


def test_empty_files_empty_sections_windows_text_and_anchors_are_read(read):
    assert read("") == read("# nothing yet\n") == read("train:\n") == read_config(None)
    assert read(b"\xef\xbb\xbftrain:\r\n  steps: 5\r\n").train.steps == 5
    assert read("train: &t {steps: 5}\ngenerate: {<<: {gpu: true}}\n").generate.gpu


def test_plate_names_stay_as_they_are_written(read):
    text = "split: {test_plates: [20585, 0123, NO, on, 1_000, 0x1F, 12:30, 2024-01-01]}"
    expected = ["20585", "0123", "NO", "on", "1_000", "0x1F", "12:30", "2024-01-01"]
    assert read(text).split.test_plates == expected


def test_numbers_with_exponents_and_words_for_truth_are_read(read):
    train = read("train: {learning_rate: 1e-3, steps: 2e4, gpu: yes, bf16: off}").train
    assert (train.learning_rate, train.steps, train.gpu, train.bf16) == (1e-3, 20_000, True, False)


def test_a_missing_config_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"holds no 'none\.yaml'"):
        read_config(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("train.steps=500", lambda c: c.train.steps == 500),
        ("train.gamma=[1, 1, 0, 0]", lambda c: c.train.gamma == (1, 1, 0, 0)),
        ("train.minutes=null", lambda c: c.train.minutes is None),
        ("prepare.channels.DNA=Orig=1", lambda c: c.prepare.channels == {"DNA": "Orig=1"}),
        ("prepare.quality.drop=[]", lambda c: c.prepare.quality.drop == []),
        ("generate.plates=[0123, P2]", lambda c: c.generate.plates == ["0123", "P2"]),
        (
            "run.folder=s3://anonymous@lab/x",
            lambda c: c.train.output == "s3://anonymous@lab/x/checkpoint",
        ),
        (" train.steps = 7", lambda c: c.train.steps == 7),
    ],
)
def test_a_value_can_be_set_on_the_command_line(read, override, check):
    assert check(read("train: {steps: 3, minutes: 2}\n", override))


def test_the_last_of_two_overrides_holds_and_neighbours_stay(read):
    config = read("train: {steps: 3, workers: 2}\n", "train.steps=4", "train.steps=5")
    assert (config.train.steps, config.train.workers) == (5, 2)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "--set train.steps: expected section.key=value"),
        ("=5", "expected section.key=value"),
        ("steps=5", "expected section.key=value"),
        ("train..steps=5", "expected section.key=value"),
        ("train.steps=[", "the value is not YAML"),
        ("train.steps.more=5", "'train.steps' holds a value, not keys"),
        ("train.stpes=5", "with --set: unknown key 'train.stpes' (did you mean 'steps'?)"),
    ],
)
def test_a_wrong_override_is_refused(read, override, expected):
    assert expected in refusal(read, "train: {steps: 3}\n", override)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAKEY:hush@lab/x",
        "s3://AKIAKEY:hu/sh@lab/x",
        "s3://hush@lab/x",
        "postgresql://me:hush@db/mlflow",
        "https://me:hush@mlflow.lab",
    ],
)
def test_credentials_in_a_config_are_refused_and_not_repeated(read, uri):
    for message in (
        refusal(read, f"run: {{folder: '{uri}'}}"),
        refusal(read, "", f"run.folder={uri}"),
        refusal(read, f"prepare: {{tables: ['{uri}']}}\ntrain: {{steps: x}}"),
    ):
        assert "credentials" in message
        assert "hu" not in message


def test_addresses_without_credentials_pass(read):
    uri = "s3://lab/a:b@c/20:30"
    assert (
        read(f"run: {{folder: '{uri}'}}\ntracking: {{uri: 'http://mlflow:5000'}}").run.folder == uri
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    plates=st.lists(st.text(min_size=1, max_size=8) | st.sampled_from(PLATES), max_size=4),
    rate=st.floats(1e-9, 1e3),
    seed=st.integers(0, 2**63 - 1),
    gamma=st.tuples(*[st.floats(0, 2)] * 4),
)
def test_what_a_config_writes_reads_back_the_same(tmp_path, plates, rate, seed, gamma):
    config = Config.model_validate(
        {
            "generate": {"plates": plates},
            "train": {"learning_rate": rate, "gamma": gamma},
            "run": {"seed": seed},
        }
    ).resolve()
    path = tmp_path / "resolved.yaml"
    path.write_bytes(config.yaml().encode())
    assert read_config(str(path)) == config


def test_the_written_config_means_the_same_to_other_yaml_readers():
    import yaml

    config = Config.model_validate(
        {"generate": {"plates": PLATES}, "train": {"learning_rate": 1e-7}}
    )
    data = yaml.safe_load(config.yaml())
    assert data["generate"]["plates"] == PLATES
    assert data["train"]["learning_rate"] == 1e-7


def test_a_fingerprint_tells_settings_apart_but_not_where_outputs_go(read):
    base = read("")
    assert base.fingerprint("train") == read("", "train.output=x").fingerprint("train")
    assert base.fingerprint("train") == read("", "generate.gpu=true").fingerprint("train")
    assert base.fingerprint("train") != read("", "train.steps=3").fingerprint("train")
    assert base.fingerprint("train") != base.fingerprint("train", "split")
    assert base.fingerprint("train", "split") == base.fingerprint("split", "train")
    assert base.fingerprint("train") != base.fingerprint("train", inputs=["a"])
    assert base.fingerprint("train", inputs=["b", "a"]) == base.fingerprint("train", inputs="ab")


def test_a_fingerprint_is_the_same_in_another_process():
    code = (
        "from cp2image.config_reading import read_config as r; "
        "print(r(None).fingerprint('train', 'split'))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert shown.stdout.strip() == read_config(None).fingerprint("train", "split")


def test_a_fingerprint_of_an_unknown_section_is_refused():
    with pytest.raises(ConfigError, match=r"no section 'trian' .*'train'"):
        Config().fingerprint("trian")


def test_local_folders_are_told_from_object_storage(tmp_path):
    assert local_folder("s3://lab/x") is None
    assert local_folder(str(tmp_path)) == tmp_path
    assert local_folder(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert local_folder("~").is_absolute()


def test_every_error_survives_the_way_out_of_a_worker():
    kinds = [
        e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Cp2ImageError)
    ]
    assert len(kinds) > 10
    for kind in kinds:
        again = pickle.loads(pickle.dumps(kind("what was found; what to do")))
        assert type(again) is kind
        assert str(again) == "what was found; what to do"


@pytest.mark.parametrize(
    ("train", "name"),
    [
        ({"preset": "cp2image-s", "learning_rate": 1e-3}, "learning_rate"),
        ({"preset": "cp2image-s", "gamma": (0, 1, 1, 1)}, "gamma"),
        ({"preset": "paper", "stochastic": {"energy": 0.1}}, "stochastic"),
    ],
)
def test_settings_of_the_other_preset_are_refused(train, name):
    with pytest.raises(ValueError, match=f"{name} is not a setting of the preset"):
        Config.model_validate({"train": train})


def test_time_must_be_left_for_the_adversary():
    stochastic = {"autoencoder": 0.6, "alone": 0.4}
    with pytest.raises(ValueError, match=r"autoencoder=0\.6 and alone=0\.4 .* less than 1"):
        Config.model_validate({"train": {"preset": "cp2image-s", "stochastic": stochastic}})


@pytest.mark.parametrize(
    ("train", "cells"),
    [
        ({"preset": "paper"}, 104),
        ({"preset": "cp2image-s"}, 16),
        ({"preset": "cp2image-s", "workers": 20}, 20),
        ({"preset": "cp2image-s", "gpu": True}, 64),
        ({"preset": "cp2image-s", "batch_size": 30}, 30),
    ],
)
def test_cells_of_a_step_are_the_presets_own_unless_set(train, cells):
    assert Config.model_validate({"train": train}).train.cells_per_step(104) == cells


def test_losses_of_the_config_start_from_the_recipes_own():
    assert Config().train.stochastic.model_dump() == asdict(StochasticSetting())


def test_a_submitted_job_records_where_it_is_kept(tmp_path, monkeypatch):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "abc"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    away = Config.model_validate({"run": {"folder": "s3://bucket/x"}}).resolve()
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        away.anchor()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert away.anchor().run.folder == "s3://bucket/x"
