"""The jobs as a user starts them: by name, with a dry run first, and submitted to a cluster."""

import contextlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cp2image.command import DONE, REFUSED
from cp2image.data.simulate import SimulatedScreen, simulate_screen

ROOT = Path(__file__).parents[1]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def run_here(monkeypatch, job, *arguments):
    """Run a job's file in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__main__")
    return stopped.value.code


@pytest.mark.parametrize("job", JOBS)
def test_every_job_says_what_it_reads_and_writes(monkeypatch, capsys, job):
    assert run_here(monkeypatch, job, "--help") == DONE
    shown = capsys.readouterr().out
    assert "--config FILE" in shown
    assert f"python jobs/{job}.py" in shown


@pytest.mark.parametrize("job", JOBS)
def test_a_dry_run_of_every_job_shows_the_whole_config_and_does_nothing(
    monkeypatch, capsys, tmp_path, job
):
    folder = tmp_path / "run"
    assert run_here(monkeypatch, job, "--dry-run", "--set", f"run.folder={folder}") == DONE
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["run"]["folder"] == str(folder)
    assert shown["generate"]["output"] == str(folder / "screen")
    assert not folder.exists()


def test_a_dry_run_of_a_comparison_lists_what_its_systems_read_and_refuses_their_settings(
    monkeypatch, capsys, tmp_path
):
    mine = {"checkpoints": [str(tmp_path)], "evaluate": {"inception_weights": "/no.pth"}}
    other = {"train": {"turned": str(tmp_path / "turned")}}
    given = ["--dry-run", "--set", "compare.seeds=[0]", "--set"]
    setting = f"compare.systems={json.dumps({'mine': mine, 'other': other})}"
    assert run_here(monkeypatch, "compare", *given, setting) == DONE
    shown = capsys.readouterr().out
    assert f"# reads compare.systems.mine.checkpoints: {tmp_path} (found)" in shown
    assert "# reads compare.systems.mine.evaluate.inception_weights: /no.pth (not there)" in shown
    assert f"# reads compare.systems.other.train.turned: {tmp_path}/turned (not there)" in shown
    setting = "compare.systems={x: {train: {stepz: 3}}}"
    assert run_here(monkeypatch, "compare", *given, setting) == REFUSED
    assert "compare.systems.x: unknown key 'train.stepz'" in capsys.readouterr().err


def test_a_dry_run_says_where_turned_cells_go_and_where_they_are_read(
    monkeypatch, capsys, tmp_path
):
    folder = f"run.folder={tmp_path}"
    turned = ("--dry-run", "--set", folder, "--set", "measure.turned=true")
    assert run_here(monkeypatch, "measure", *turned) == DONE
    assert f"# writes measure.output: {tmp_path}/turned (" in capsys.readouterr().out
    given = ("--dry-run", "--set", folder, "--set", f"train.turned={tmp_path}/turned")
    assert run_here(monkeypatch, "train", *given) == DONE
    assert f"# reads train.turned: {tmp_path}/turned (not there)" in capsys.readouterr().out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_accepted(monkeypatch, capsys, config):
    assert run_here(monkeypatch, "prepare", "--config", str(config), "--dry-run") == DONE


@pytest.mark.parametrize("job", JOBS)
def test_no_job_is_more_than_twenty_lines(job):
    assert len((ROOT / "jobs" / f"{job}.py").read_text().splitlines()) <= 20


def test_a_job_that_is_not_told_what_to_do_says_so_in_one_line(monkeypatch, capsys, tmp_path):
    assert run_here(monkeypatch, "prepare", "--set", f"run.folder={tmp_path}") == REFUSED
    shown = capsys.readouterr().err
    assert shown.startswith("error: prepare: set either 'tables'")
    assert shown.count("\n") == 1


def test_a_simulated_screen_is_written_once_and_no_other_folder_is_touched(
    monkeypatch, capsys, tmp_path
):
    small = ["plates=1", "wells_per_plate=2", "cells_per_site=3", "field_size=128"]
    options = [word for key in small for word in ("--set", f"simulate.{key}")]
    options += ["--set", f"simulate.output={tmp_path / 'screen'}"]
    assert run_here(monkeypatch, "simulate", *options) == DONE
    assert "6 simulated cells in 2 fields" in capsys.readouterr().out
    truth = tmp_path / "screen" / "truth.csv"
    written = truth.stat().st_mtime_ns
    assert run_here(monkeypatch, "simulate", *options) == DONE
    assert truth.stat().st_mtime_ns == written
    assert run_here(monkeypatch, "simulate", *options, "--set", "run.seed=1") == REFUSED
    assert "with other settings ({'seed': 0})" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "Image.csv").write_text("")
    options[-1] = f"simulate.output={tmp_path / 'mine'}"
    assert run_here(monkeypatch, "simulate", *options) == REFUSED
    assert "holds files that are no simulated screen" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["Image.csv"]


def test_an_interrupted_simulation_is_taken_up_again(monkeypatch, tmp_path):
    from cp2image import simulation

    small = ["plates=1", "wells_per_plate=2", "cells_per_site=3", "field_size=128"]
    options = [word for key in small for word in ("--set", f"simulate.{key}")]
    options += ["--set", f"simulate.output={tmp_path / 'screen'}"]
    with monkeypatch.context() as patch:
        patch.setattr(simulation, "simulate_screen", lambda *_: os.kill(os.getpid(), 15))
        assert run_here(monkeypatch, "simulate", *options) == 128 + signal.SIGTERM
    assert run_here(monkeypatch, "simulate", *options) == DONE
    assert len(pd.read_csv(tmp_path / "screen" / "truth.csv")) == 6


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def cluster():
    """A Ray head of its own on free ports, which asks for a token; ends with all it started."""
    if find_spec("aiohttp_cors") is None:
        pytest.fail("jobs cannot be submitted: Ray was installed without its extra 'default'")
    port, dashboard, agent = free_ports(3)
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # its sockets need a short path
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-for-this-test-only-0123456789",
        "HOME": folder,
    }
    environment.pop("RAY_ADDRESS", None)
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
    command += [f"--dashboard-agent-listen-port={agent}"]
    command += ["--object-store-memory=200000000", "--disable-usage-stats"]
    with Path(folder, "start.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for(f"{address}/api/version", head, Path(folder, "start.log"))
        yield ray, environment | {"RAY_ADDRESS": address}
    finally:
        for process in (head.pid, *descendants(head.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def descendants(process):
    """Return the ids of the processes that one has started, and of those they have."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def wait_for(url, head, log):
    ends = time.monotonic() + 90
    while time.monotonic() < ends:
        if head.poll() is not None:
            raise RuntimeError(f"the Ray head ended at once: {log.read_text()[-2000:]}")
        try:
            urllib.request.urlopen(url, timeout=5)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.3)
        else:
            return
    raise TimeoutError(f"no answer from {url}")


def test_a_submitted_job_runs_on_the_cluster_and_only_with_the_token(cluster, tmp_path):
    ray, environment = cluster
    simulate_screen(
        tmp_path,
        SimulatedScreen(
            plates=1, wells_per_plate=2, cells_per_site=4, field_size=128, defect_share=0.0
        ),
    )
    settings = {
        "run": {"folder": str(tmp_path / "run")},
        "prepare": {
            "tables": [str(tmp_path / "tables")],
            "images": str(tmp_path / "images"),
            "channels": {"DNA": "DNA", "Actin": "Actin"},
            "patch_size": 48,
        },
    }
    (tmp_path / "screen.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{environment['RAY_ADDRESS']}/api/jobs/", timeout=10)
    job = [sys.executable, "jobs/prepare.py", "--config", str(tmp_path / "screen.yaml")]
    command = [ray, "job", "submit", "--working-dir", ".", "--", *job]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, timeout=240, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 of 8 cells on 1 plates" in done.stdout
    assert len(pd.read_parquet(tmp_path / "run" / "cells")) == 8
    assert (tmp_path / "run" / "mlflow.db").exists()
