"""The promises of publication: nothing lost, nothing doubled, nothing half visible.

Most tests run the units in this process, in place of Ray's actors (fixture ``inline``); those at
the end run on real actors and kill them.
"""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import ray

from cp2image import publication
from cp2image.config import Cluster, Config
from cp2image.data.schema import PatchFormat, build_table
from cp2image.dataset import CellRange, open_dataset, read_manifests
from cp2image.errors import DatasetError, FieldError, StorageError
from cp2image.publication import Outcome, finished_plates, publish

FORMAT = PatchFormat(("DNA",), 4, "uint8", 8)
CONFIG = Config.model_validate({"tracking": {"enabled": False}})
ROWS = 5


def units_of(*plates, count=3):
    return [CellRange(p, i, "", i * ROWS, ROWS) for p in plates for i in range(count)]


def draw(unit, features=("Nuclei_AreaShape_Area",), rows=None):
    """Cells that follow from their names alone."""
    numbers = unit.start + np.arange(unit.rows if rows is None else rows)
    metadata = pd.DataFrame(
        {
            "Metadata_Plate": [unit.plate] * len(numbers),
            "Metadata_Well": "B02",
            "Metadata_Site": "1",
            "Metadata_ImageNumber": 1,
            "Metadata_ObjectNumber": numbers,
        }
    )
    values = pd.DataFrame({name: numbers.astype(np.float32) for name in features})
    patches = np.broadcast_to(numbers[:, None, None, None], (len(numbers), 1, 4, 4))
    return build_table(metadata, values, patches.astype(np.uint8), FORMAT)


class Draw:
    """Draws cells; on the units of ``faults`` it raises ``error`` the first ``times`` times."""

    def __init__(self, log, faults=(), error=None, times=1):
        self.log, self.faults, self.error, self.times = log, faults, error, times

    def __call__(self, unit):
        name = f"{unit.plate}-{unit.index}"
        with open(self.log, "a") as log:
            log.write(f"{name}\n")
        with open(self.log) as log:
            tries = log.read().splitlines().count(name)
        if (unit.plate, unit.index) in self.faults and tries <= self.times:
            raise self.error
        return Outcome(draw(unit))


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "cells")


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def run(uri, process, units, mark="mark", config=CONFIG, **options):
    return publish(uri, units, lambda: process, config, mark, label="test", **options)


def objects_in(uri):
    cells = pd.read_parquet(uri)
    return sorted(zip(cells["Metadata_Plate"], cells["Metadata_ObjectNumber"], strict=True))


def expected(*plates, count=3):
    return sorted((plate, number) for plate in plates for number in range(count * ROWS))


@pytest.mark.usefixtures("inline")
def test_every_cell_is_published_once_and_counted(uri, log):
    result = run(uri, Draw(log), units_of("P1", "P 2/3"), left_out={"P1": {"without_cell": 2}})
    assert objects_in(uri) == expected("P1", "P 2/3")
    assert result.plates == {
        "P1": {"in": 17, "out": 15, "without_cell": 2},
        "P 2/3": {"in": 15, "out": 15},
    }
    assert result.totals == {"in": 32, "out": 30, "without_cell": 2}
    assert "30 of 32 cells on 2 plates; left out or noted: 2 without_cell" in str(result)


@pytest.mark.usefixtures("inline")
def test_the_account_is_stored_beside_the_data_and_no_scratch_is_left(uri, log, tmp_path):
    result = run(uri, Draw(log), units_of("P1"))
    stored = json.loads((tmp_path / "cells" / "_account.json").read_text())
    assert stored == {"totals": result.totals, "plates": result.plates, "failed": {}}
    names = {path.name for path in (tmp_path / "cells").iterdir()}
    assert names == {"_account.json", "_config.yaml", "_manifests", "plate=P1"}


@pytest.mark.usefixtures("inline")
def test_a_rerun_does_only_what_is_not_there_and_doubles_nothing(uri, log):
    run(uri, Draw(log), units_of("P1"))
    tried = log.read_text()
    again = run(uri, Draw(log), units_of("P1"))
    assert log.read_text() == tried
    assert again.skipped == ("P1",)
    more = run(uri, Draw(log), units_of("P1", "P2"))
    assert set(log.read_text().splitlines()[3:]) == {"P2-0", "P2-1", "P2-2"}
    assert objects_in(uri) == expected("P1", "P2")
    assert more.totals == {"in": 30, "out": 30}
    assert "2 plates (1 already there)" in str(more)


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("step", ["move", "write_bytes"])
def test_a_run_interrupted_before_the_manifest_shows_nothing_and_is_completed_by_a_rerun(
    uri, log, monkeypatch, step
):
    plain = getattr(publication, step)

    def interrupted(first, *rest):
        if step == "move" and first.endswith("part-00001.parquet"):
            raise KeyboardInterrupt
        if step == "write_bytes" and "_manifests" in first:
            raise KeyboardInterrupt
        plain(first, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(publication, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(uri, Draw(log), units_of("P1"))
    with pytest.raises(DatasetError, match="no plate in it is finished"):
        open_dataset(uri)
    cut_otherwise = [CellRange("P1", 0, "", 0, 3 * ROWS)]
    run(uri, Draw(log), cut_otherwise)
    assert objects_in(uri) == expected("P1")
    assert open_dataset(uri).rows == 15


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from dataclasses import asdict
import json
import test_publication as t
from cp2image import publication
def run(numbers, work, factory, job, cluster, threads):
    worker = publication._Worker(factory, job.folder)
    for n in numbers:
        row = worker({"number": n, "unit": json.dumps(asdict(work[n]))})
        yield publication.UnitRecord(**json.loads(row["record"]))
plain = publication.write_bytes
def kill(uri, data):
    if uri.endswith("P2.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    plain(uri, data)
publication._map, publication.write_bytes = run, kill
t.run(sys.argv[1], t.Draw(sys.argv[3]), t.units_of("P1", "P2"))
"""


@pytest.mark.usefixtures("inline")
def test_a_killed_driver_leaves_finished_plates_only_and_a_rerun_goes_on(uri, log, tmp_path):
    command = [sys.executable, "-c", KILLED, uri, os.path.dirname(__file__), str(log)]
    done = subprocess.run(command, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert set(open_dataset(uri).manifests) == {"P1"}
    assert (tmp_path / "cells" / "plate=P2" / "part-00002.parquet").exists()
    run(uri, Draw(log), units_of("P1", "P2"))
    assert log.read_text().splitlines().count("P1-0") == 1
    assert objects_in(uri) == expected("P1", "P2")
    assert not (tmp_path / "cells" / "_attempts").exists()


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize(
    "error", [RuntimeError("node gone"), StorageError("503"), MemoryError()], ids=repr
)
def test_an_unexpected_error_and_a_failing_store_are_tried_again(uri, log, error):
    run(uri, Draw(log, [("P1", 1)], error, times=2), units_of("P1", "P2"))
    assert log.read_text().splitlines().count("P1-1") == 3
    assert objects_in(uri) == expected("P1", "P2")


@pytest.mark.usefixtures("inline")
def test_a_plate_that_keeps_failing_is_named_and_the_others_are_published(uri, log, tmp_path):
    process = Draw(log, [("P2", 1)], RuntimeError("no luck"), times=99)
    with pytest.raises(DatasetError, match=r"1 of 3 plates failed") as caught:
        run(uri, process, units_of("P1", "P2", "P3"))
    assert "plate P2: RuntimeError: no luck" in str(caught.value)
    assert log.read_text().splitlines().count("P2-1") == 1 + CONFIG.cluster.retries
    assert objects_in(uri) == expected("P1", "P3")
    stored = json.loads((tmp_path / "cells" / "_account.json").read_text())
    assert set(stored["failed"]) == {"P2"}
    run(uri, Draw(log), units_of("P1", "P2", "P3"))
    assert objects_in(uri) == expected("P1", "P2", "P3")


@pytest.mark.usefixtures("inline")
def test_bad_input_is_not_tried_again(uri, log):
    process = Draw(log, [("P1", 0)], FieldError("a.tif: truncated"), times=99)
    with pytest.raises(DatasetError, match=r"plate P1: a\.tif: truncated"):
        run(uri, process, units_of("P1", "P2"))
    assert log.read_text().splitlines().count("P1-0") == 1
    assert objects_in(uri) == expected("P2")


@pytest.mark.usefixtures("inline")
def test_a_process_that_cannot_be_built_fails_the_plates_with_its_reason(uri):
    def factory():
        raise FieldError("the model is gone")

    with pytest.raises(DatasetError, match="plate P1: the model is gone"):
        publish(uri, units_of("P1"), factory, CONFIG, "mark", label="test")


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("rows", [ROWS - 1, ROWS + 1])
def test_cells_that_vanish_or_appear_are_noticed(uri, rows):
    def process(unit):
        return Outcome(draw(unit, rows=rows if unit.plate == "P1" and unit.index == 1 else None))

    with pytest.raises(DatasetError, match=f"P1: part 1: 5 cells went in, {rows} came out and 0"):
        run(uri, process, units_of("P1", "P2"))
    assert objects_in(uri) == expected("P2")


@pytest.mark.usefixtures("inline")
def test_dropped_cells_are_counted_by_reason_and_an_empty_plate_is_published(uri):
    def process(unit):
        if unit.plate == "P1":
            return Outcome(draw(unit, rows=0), {"noise": ROWS})
        return Outcome(draw(unit, rows=2), {"noise": 1, "border": 2}, {"noted_empty": 1})

    result = run(uri, process, units_of("P1", "P2"))
    assert result.plates["P1"] == {"in": 15, "out": 0, "noise": 15}
    counts = {"in": 15, "out": 6, "noise": 3, "border": 6, "noted_empty": 3}
    assert result.plates["P2"] == counts
    assert read_manifests(uri)["P1"].parts == ()
    assert open_dataset(uri).rows == 6


@pytest.mark.usefixtures("inline")
def test_other_settings_or_another_input_into_the_same_folder_are_refused(uri, log):
    run(uri, Draw(log), units_of("P1"), inputs={"P1": "a"})
    before = log.read_text()
    with pytest.raises(DatasetError, match="plate 'P1', written with other settings"):
        run(uri, Draw(log), units_of("P1", "P2"), mark="another")
    with pytest.raises(DatasetError, match="plate 'P1', written with another input"):
        run(uri, Draw(log), units_of("P1", "P2"), inputs={"P1": "b", "P2": "c"})
    assert log.read_text() == before
    run(uri, Draw(log), units_of("P2"), inputs={"P1": "a", "P2": "c"})
    assert set(finished_plates(uri, "mark")) == {"P1", "P2"}


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("runs", [1, 2], ids=["in one run", "in a later run"])
def test_a_plate_with_other_columns_is_refused_naming_them(uri, runs):
    def process(unit):
        return Outcome(draw(unit, ["Nuclei_AreaShape_Area" if unit.plate == "P2" else "Other"]))

    if runs == 2:
        run(uri, process, units_of("P2"))
    with pytest.raises(DatasetError, match="missing Nuclei_AreaShape_Area:float; extra Other:fl"):
        run(uri, process, units_of("P1", "P2"))
    assert objects_in(uri) == expected("P2")


@pytest.mark.usefixtures("inline")
def test_a_plate_that_another_run_has_published_meanwhile_is_left_as_it_is(uri, log, tmp_path):
    def process(unit):
        if unit.index == 0 and not read_manifests(uri):
            run(uri, Draw(log), units_of("P1"))
        return Outcome(draw(unit))

    run(uri, process, units_of("P1"))
    assert objects_in(uri) == expected("P1")


@pytest.mark.usefixtures("inline")
def test_a_refused_plate_is_not_tried_and_named(uri, log):
    with pytest.raises(DatasetError, match=r"1 of 2 plates failed(.|\n)*plate P1: no light"):
        run(uri, Draw(log), units_of("P1", "P2"), refused={"P1": "no light"})
    assert "P1" not in log.read_text()


@pytest.mark.usefixtures("inline")
def test_an_output_that_cannot_be_written_is_named(tmp_path, log):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="is a file where a folder is expected"):
        run(str(tmp_path / "file" / "cells"), Draw(log), units_of("P1"))


class Suicide:
    """Kills its own process on one unit: once, or whenever it meets it; leaves a mark each time."""

    def __init__(self, folder, always):
        self.folder, self.always = folder, always

    def __call__(self, unit):
        if (unit.plate, unit.index) == ("P2", 1):
            deaths = len(os.listdir(self.folder))
            if self.always or not deaths:
                open(os.path.join(self.folder, f"{deaths}"), "x").close()
                os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(draw(unit))


@pytest.fixture
def by_value(ray_session):
    """Let Ray's workers have this module's classes, which they cannot import."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


@pytest.mark.usefixtures("by_value")
def test_cells_are_the_same_when_a_worker_is_killed_in_the_middle(tmp_path):
    quiet, struck = str(tmp_path / "quiet"), str(tmp_path / "struck")
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    factory = partial(Suicide, str(deaths), always=False)
    publish(struck, units_of("P1", "P2"), factory, CONFIG, "mark", label="test")
    assert len(list(deaths.iterdir())) == 1
    publish(quiet, units_of("P1", "P2"), factory, CONFIG, "mark", label="test")
    pd.testing.assert_frame_equal(pd.read_parquet(struck), pd.read_parquet(quiet))
    assert objects_in(struck) == expected("P1", "P2")


@pytest.mark.usefixtures("by_value")
def test_a_unit_that_always_kills_its_process_fails_its_plate_alone(tmp_path):
    uri, deaths = str(tmp_path / "cells"), tmp_path / "deaths"
    deaths.mkdir()
    config = CONFIG.model_copy(update={"cluster": CONFIG.cluster.model_copy(update={"retries": 0})})
    factory = partial(Suicide, str(deaths), always=True)
    with pytest.raises(DatasetError, match="plate P2: part 1: the process died each time"):
        publish(uri, units_of("P1", "P2"), factory, config, "mark", label="test")
    assert len(list(deaths.iterdir())) == 3
    assert objects_in(uri) == expected("P1")


@pytest.mark.parametrize(
    ("cpus", "tasks", "wanted", "free", "expected"),
    [
        ([2], None, 4, 2, (2, 2)),
        ([16, 16, 16], None, 4, 48, (48, 4)),
        ([0, 6, 4], None, 4, 10, (10, 2)),  # what fills both nodes
        ([5, 5], None, 4, 10, (10, 1)),
        ([16], 6, 4, 16, (6, 2)),
        ([16], None, 1, 16, (16, 1)),
        ([16], None, 4, 15, (16, 1)),  # others are at work: small actors find room
        ([], None, 4, 0, (1, 1)),
    ],
)
def test_actors_of_several_threads_fill_the_nodes(monkeypatch, cpus, tasks, wanted, free, expected):
    nodes = [{"Alive": True, "Resources": {"CPU": float(count)}} for count in cpus]
    nodes.append({"Alive": False, "Resources": {"CPU": 64.0}})
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": float(free)})
    assert publication._room(Cluster(tasks=tasks), wanted) == expected


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize(("retries", "expected"), [(2, [4, 1, 1]), (0, [1])])
def test_what_is_tried_again_works_alone(uri, log, monkeypatch, retries, expected):
    seen, plain = [], publication._map

    def follow(numbers, work, factory, job, cluster, threads):
        seen.append(threads)
        yield from plain(numbers, work, factory, job, cluster, threads)

    monkeypatch.setattr(publication, "_map", follow)
    process = Draw(log, [("P1", 1)], RuntimeError("no luck"), times=99)
    config = Config.model_validate({"cluster": {"retries": retries}})
    with pytest.raises(DatasetError, match="no luck"):
        publish(uri, units_of("P1"), lambda: process, config, "mark", label="draw", threads=4)
    assert seen == expected


@pytest.mark.usefixtures("inline")
def test_nothing_is_published_before_the_record_is_open(uri, log, tmp_path):
    def refuse():
        raise StorageError("MLflow does not answer")

    with pytest.raises(StorageError, match="MLflow does not answer"):
        publish(
            uri, units_of("P1"), lambda: Draw(log), Config(), "mark", label="draw", ready=refuse
        )
    assert not read_manifests(uri)
    assert not list(tmp_path.glob("cells/plate=*"))
