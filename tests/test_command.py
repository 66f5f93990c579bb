import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from cp2image.command import run_job
from cp2image.config import Config
from cp2image.config_reading import read_config
from cp2image.errors import StorageError, TableError


def never(config):
    raise RuntimeError("must not run")


def test_the_step_gets_the_config_and_its_result_is_printed(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text("train: {steps: 3, workers: 2}\n")
    argv = ["--config", str(path), "--set", "train.steps=4", "--set", "run.name=x"]
    seen = []

    def step(config):
        seen.append(config)
        return "4 cells in runs/x"

    assert run_job("Train.", step, argv=argv) == 0
    assert seen == [read_config(str(path), ["train.steps=4", "run.name=x"]).anchor()]
    assert capsys.readouterr() == ("4 cells in runs/x\n", "")


def test_a_step_that_returns_nothing_prints_nothing(capsys):
    assert run_job("Train.", lambda _: None, argv=[]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_dry_run_prints_yaml_and_what_would_be_read_and_written_and_runs_nothing(
    capsys, tmp_path
):
    (tmp_path / "cells").mkdir()
    argv = [
        "--dry-run",
        "--set",
        f"run.folder={tmp_path}",
        "--set",
        "generate.checkpoint=models:/a@b",
    ]
    argv += ["--set", "prepare.tables=[/nowhere/a.csv, /nowhere/b.csv]"]
    reads = ["train.input", "prepare.tables", "prepare.stacks.index", "generate.checkpoint"]
    writes = ["train.output", "prepare.output"]
    assert run_job("Train.", never, argv, reads=reads, writes=writes) == 0
    shown, errors = capsys.readouterr()
    told = [line for line in shown.splitlines() if line.startswith("#")]
    assert told == [
        f"# reads train.input: {tmp_path}/cells (found)",
        "# reads prepare.tables: /nowhere/a.csv (not there)",
        "# reads prepare.tables: /nowhere/b.csv (not there)",
        "# reads generate.checkpoint: models:/a@b (of MLflow)",
        f"# writes train.output: {tmp_path}/checkpoint (new)",
        f"# writes prepare.output: {tmp_path}/cells (there already)",
    ]
    assert Config.model_validate(yaml.safe_load(shown)).run.folder == str(tmp_path)
    assert errors == ""
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]


def test_a_dry_run_does_not_wait_for_a_store_that_does_not_answer(capsys, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr("cp2image.command.exists", lambda _: gate.wait(30))
    monkeypatch.setattr("cp2image.command._PATIENCE_S", 0.2)
    argv = ["--dry-run", "--set", "train.input=s3://lab/x"]
    assert run_job("Train.", never, argv, reads=["train.input"]) == 0
    gate.set()
    shown = capsys.readouterr().out
    assert shown.endswith("# reads train.input: s3://lab/x (cannot tell: no answer in 0.2 s)\n")


def test_a_dry_run_lists_files_of_any_kind(capsys):
    argv = ["--dry-run", "--set", "prepare.image_folders={/a: /b}"]
    argv += ["--set", "mechanisms.profiles={uri: /wells.csv, columns: {}}"]
    reads = ["prepare.image_folders", "mechanisms.profiles"]
    assert run_job("Any.", never, argv, reads=reads) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert told == [
        "# reads prepare.image_folders: /b (not there)",
        "# reads mechanisms.profiles: /wells.csv (not there)",
    ]


@pytest.mark.parametrize(
    "setting",
    [
        "prepare.image_folders={/a: 's3:/b'}",
        "prepare.metadata_files=[{uri: 's3:/b', on: [Metadata_Well]}]",
        "mechanisms.profiles={uri: 's3:/b', columns: {}}",
    ],
)
def test_places_inside_other_settings_are_checked(capsys, setting):
    assert run_job("Any.", never, argv=["--set", setting]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {setting.partition('=')[0]} = 's3:/b': "), error


@pytest.mark.parametrize("place", ["s3:/lab/x", "s3://", "s3:///x", "gs://lab/x"])
def test_a_place_that_is_none_is_refused_by_its_key(capsys, place):
    assert run_job("Train.", never, argv=["--set", f"train.input={place}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: train.input = '{place}': ")


def test_plates_are_chosen_for_one_section_where_a_job_has_it(capsys):
    argv = ["--dry-run", "--plates", "0123", "P: 2"]
    assert run_job("Measure.", never, argv=argv, plates_of="measure") == 0
    shown = Config.model_validate(yaml.safe_load(capsys.readouterr().out))
    assert shown.measure.plates == ["0123", "P: 2"]
    assert shown.generate.plates == []
    with pytest.raises(SystemExit):
        run_job("Train.", never, argv=argv)


def test_a_dry_run_that_knows_no_places_prints_the_config_alone(capsys):
    assert run_job("Train.", never, argv=["--dry-run"]) == 0
    assert capsys.readouterr().out.rstrip() == read_config(None).anchor().yaml().rstrip()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_config_typo_is_one_readable_block(capsys, dry):
    assert run_job("Train.", never, argv=[*dry, "--set", "train.stpes=4"]) == 2
    shown, errors = capsys.readouterr()
    assert shown == ""
    assert errors == (
        "error: the defaults with --set: unknown key 'train.stpes' (did you mean 'steps'?)\n"
    )


def test_a_refusal_of_the_step_has_no_traceback(capsys):
    def step(_):
        raise TableError("cells.csv: empty;\n  export it again")

    assert run_job("Prepare.", step, argv=[]) == 2
    assert capsys.readouterr().err == "error: cells.csv: empty;\n  export it again\n"


def test_a_bug_shows_its_traceback(capsys):
    assert run_job("Train.", never, argv=[]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback")
    assert "RuntimeError: must not run" in errors


class RayTaskLikeError(StorageError):
    """Like Ray's RayTaskError: of the cause's class too, its text the worker's traceback."""

    def __init__(self, cause):
        super().__init__("\x1b[36mray::task()\x1b[39m\nTraceback …")
        self.cause = cause


class OuterError(Exception):
    pass


def test_a_refusal_in_a_worker_is_told_in_its_own_words(capsys):
    OuterError.__module__ = "ray.exceptions"

    def step(_):
        try:
            raise RayTaskLikeError(StorageError("s3://lab/x: access denied"))
        except StorageError as error:
            raise OuterError("…") from error

    assert run_job("Prepare.", step, argv=[]) == 2
    assert capsys.readouterr().err == "error: s3://lab/x: access denied\n"


def test_a_bug_in_a_worker_stays_a_bug(capsys):
    def step(_):
        raise RayTaskLikeError(KeyError("Metadata_Plate"))

    assert run_job("Prepare.", step, argv=[]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--nonsense"], ["--conf", "x"], ["extra"], ["--set"]])
def test_an_unknown_option_is_refused_by_the_parser(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        run_job("Train.", never, argv=argv)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help_shows_the_description_as_it_is_written(capsys):
    with pytest.raises(SystemExit) as stop:
        run_job(
            "Train a model.\n\n    python jobs/train.py --config a.yaml", never, argv=["--help"]
        )
    assert stop.value.code == 0
    assert "\n    python jobs/train.py --config a.yaml\n" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_unwinds_the_step_and_the_handlers_come_back(capsys, number, code):
    before = signal.getsignal(number)
    unwound = []

    def step(_):
        try:
            signal.raise_signal(number)
            time.sleep(30)
        finally:
            unwound.append(True)

    assert run_job("Train.", step, argv=[]) == code
    assert unwound == [True]
    assert capsys.readouterr().err.startswith(f"stopped by {number.name}")
    assert signal.getsignal(number) is before


def test_rays_own_answer_to_sigterm_counts_as_sigterm(capsys):
    def step(_):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert run_job("Train.", step, argv=[]) == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_job_runs_in_another_thread(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_job("x", lambda _: "ok", argv=[])))
    thread.start()
    thread.join(10)
    assert codes == [0]


JOB = """
import sys, time
from pathlib import Path
from cp2image.command import run_job

def step(config):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        Path(config.run.folder).write_text("cleaned")

if __name__ == "__main__":
    sys.exit(run_job("A job.", step))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_process_cleans_up_and_says_so(tmp_path, number, code):
    (tmp_path / "job.py").write_text(JOB)
    note = tmp_path / "note"
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "job.py"), "--set", f"run.folder={note}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert note.read_text() == "cleaned"
    assert errors == f"stopped by {number.name}; run the same command to go on\n"


def test_a_process_refused_exits_with_2_and_one_message(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "job.py"), "--config", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "holds no 'none.yaml'" in done.stderr
