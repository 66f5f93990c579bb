"""A generated screen equals the undisturbed one whatever happens while it is made."""

import time

import pytest

from tests.cluster.disturbances import (
    AT_WORK_S,
    cut_cable,
    disturb,
    kill_driver,
    kill_node_while_refused,
    kill_store,
    stall_store,
)

pytestmark = pytest.mark.timeout(1800)


def test_the_screen_is_the_same_though_requests_are_refused_and_a_node_is_killed(screen):
    assert disturb(screen, "refusals", kill_node_while_refused, 0, seed=1).exact
    assert screen.laboratory.proxy.refused > 5
    assert screen.laboratory.proxy.reset > 5


@pytest.mark.slow
def test_the_screen_is_the_same_after_the_driver_is_killed_and_run_again(screen):
    survived = disturb(screen, "driver", kill_driver, AT_WORK_S)
    assert survived.exact
    assert survived.runs == 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", [cut_cable, kill_store, stall_store])
def test_the_screen_is_the_same_after_long_faults(screen, fault):
    assert disturb(screen, fault.__name__, fault, AT_WORK_S, seed=2).exact


def test_a_rerun_does_nothing_again(screen):
    laboratory = screen.laboratory
    job = laboratory.submit("generate", screen.config)
    ended = laboratory.wait(job)
    assert ended.exit_code == 0
    assert "8 plates (8 already there)" in ended.logs
    assert laboratory.cells(f"{screen.folder}/screen") == screen.reference


@pytest.mark.slow
def test_a_stopped_job_leaves_nothing_half_done_and_goes_on(screen):
    laboratory = screen.laboratory
    config = screen.generating(f"{screen.folder}/stopped")
    job = laboratory.submit("generate", config)
    time.sleep(AT_WORK_S)
    laboratory.stop_job(job)
    ended = laboratory.wait(job)
    assert ended.status == "STOPPED"
    assert "stopped by SIGTERM; run the same command to go on" in ended.logs
    assert set(laboratory.cells(f"{screen.folder}/stopped")) <= set(screen.reference)
    assert laboratory.run("generate", config).exit_code == 0
    assert laboratory.cells(f"{screen.folder}/stopped") == screen.reference


@pytest.mark.slow
def test_chosen_plates_alone_are_written(screen):
    config = screen.generating(f"{screen.folder}/chosen")
    plate = screen.reference[0][0].partition("Metadata_Plate=")[2].partition("/")[0]
    config["generate"] = {**config["generate"], "plates": [plate]}
    ended = screen.laboratory.run("generate", config)
    assert ended.exit_code == 0, ended.logs[-2000:]
    found = screen.laboratory.cells(f"{screen.folder}/chosen")
    assert found == [cell for cell in screen.reference if f"Metadata_Plate={plate}/" in cell[0]]
    assert found


@pytest.mark.slow
def test_a_store_that_stays_away_ends_in_a_clear_error(screen):
    laboratory = screen.laboratory
    laboratory.faults.stalled = True
    started = time.monotonic()
    try:
        job = laboratory.submit("generate", screen.generating(f"{screen.folder}/nowhere"))
        ended = laboratory.wait(job, 400)
    finally:
        laboratory.faults.stalled = False
    assert ended.exit_code == 2
    assert f"no answer from {laboratory.proxy.endpoint}" in ended.logs
    assert "Traceback" not in ended.logs
    assert time.monotonic() - started < 200
