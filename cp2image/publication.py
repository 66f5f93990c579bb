"""Writing datasets plate by plate, exactly once, on Ray Data. Floor: beside dataset.

Work is cut into units of cells; Ray Data spreads them over a pool of actors. Each unit writes one
file under ``_attempts/<fingerprint>/``; when all units of a plate are in, counted and checked, the
files move to ``plate=…/`` and the plate's manifest is written last. What has no manifest does
not exist for readers, finished plates are skipped by a rerun, and a retried unit writes the same
bytes again, so faults can neither lose nor double a cell.
"""

import json
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from cp2image.config import Cluster, Config
from cp2image.data.schema import to_parquet
from cp2image.dataset import (
    CellRange,
    Manifest,
    Part,
    manifest_uri,
    plate_folder,
    read_manifests,
)
from cp2image.errors import Cp2ImageError, DatasetError
from cp2image.storage import delete_tree, exists, join, list_files, move, write_bytes

ATTEMPTS = "_attempts"


@dataclass(frozen=True)
class Outcome:
    """What a process makes of one unit.

    Attributes
    ----------
    table
        The cells, in `cp2image.data.schema`'s form.
    dropped
        Reason → cells left out; with the table's rows they add up to the unit's.
    noted
        What else is counted, about cells that were kept.
    """

    table: pa.Table
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)


Process = Callable[[CellRange], Outcome]
"""Turns one unit, consecutive cells of one plate, into cells to publish."""


@dataclass(frozen=True)
class UnitRecord:
    """What became of one unit."""

    number: int
    rows: int = 0
    bytes: int = 0
    columns: str = ""
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    error: str = ""
    final: bool = False


@dataclass(frozen=True)
class Publication:
    """The account of a job that wrote a dataset.

    Attributes
    ----------
    uri
        The dataset.
    plates
        Plate → ``in``, ``out`` and one count per reason for dropping a cell.
    skipped
        Plates that an earlier run had finished.
    """

    uri: str
    plates: dict[str, dict[str, int]]
    skipped: tuple[str, ...] = ()

    @property
    def totals(self) -> dict[str, int]:
        """The same counts over all plates."""
        total: Counter[str] = Counter()
        for account in self.plates.values():
            total.update(account)
        return dict(total)

    def __str__(self) -> str:
        counts = self.totals
        reasons = {k: v for k, v in counts.items() if k not in ("in", "out") and v}
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        skipped = f" ({len(self.skipped)} already there)" if self.skipped else ""
        return (
            f"{self.uri}: {counts.get('out', 0):,} of {counts.get('in', 0):,} cells on "
            f"{len(self.plates)} plates{skipped}; left out or noted: {dropped or 'none'}"
        )


class _Worker:
    """One actor of the pool: runs the process on units and stores what comes out."""

    def __init__(self, factory: Callable[[], Process], folder: str) -> None:
        self.process, self.folder = factory(), folder

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        number = int(row["number"])
        unit = CellRange(**json.loads(row["unit"]))
        try:
            outcome = self.process(unit)
            table = outcome.table
            data = to_parquet(table) if table.num_rows else b""
            if data:
                write_bytes(_attempt(self.folder, unit), data)
            columns = ",".join(f"{f.name}:{f.type}" for f in table.schema)
            record = UnitRecord(
                number, table.num_rows, len(data), columns, outcome.dropped, outcome.noted
            )
        except Cp2ImageError as error:
            record = UnitRecord(number, error=str(error), final=not isinstance(error, OSError))
        except Exception as error:  # a bug or a lost node's leftovers: reported, then retried
            trace = traceback.format_exc(limit=-3)
            record = UnitRecord(number, error=f"{type(error).__name__}: {error}\n{trace}")
        return {"record": json.dumps(asdict(record))}


def _attempt(folder: str, unit: CellRange) -> str:
    return join(folder, plate_folder(unit.plate), f"part-{unit.index:05d}.parquet")


def publish(
    uri: str,
    units: Iterable[CellRange],
    factory: Callable[[], Process],
    config: Config,
    fingerprint: str,
    *,
    label: str,
    gpus_per_task: float = 0.0,
    left_out: Mapping[str, Mapping[str, int]] | None = None,
) -> Publication:
    """Run ``factory()`` on every unit of every unpublished plate and publish plate by plate.

    Parameters
    ----------
    uri
        The dataset to write.
    units
        All units of all plates wanted.
    factory
        Called once in each actor; returns the function that turns a unit into a table.
    config
        The experiment; a copy is stored beside the data as ``_config.yaml``.
    fingerprint
        Tells outputs of other settings apart.
    label
        Shown on the progress bar.
    gpus_per_task
        Share of a GPU that each actor takes.
    left_out
        Plate → reason → cells that were left out before the units were cut; they are counted.

    Raises
    ------
    DatasetError
        If the dataset holds plates of other settings, or if plates failed: the others are
        published, the message names the failed ones and the first reason of each.
    """
    todo: dict[str, list[CellRange]] = defaultdict(list)
    for unit in units:
        todo[unit.plate].append(unit)
    done = read_manifests(uri)
    other = [plate for plate, known in done.items() if known.fingerprint != fingerprint]
    if other:
        raise DatasetError(
            f"{uri}: holds {len(other)} plate(s) written with other settings or inputs (such as "
            f"{other[0]!r}); write to another folder, or remove this one yourself"
        )
    accounts = {plate: dict(known.account) for plate, known in done.items() if plate in todo}
    skipped = tuple(sorted(accounts))
    work = [unit for plate, group in sorted(todo.items()) if plate not in done for unit in group]
    folder = join(uri, ATTEMPTS, fingerprint)
    write_bytes(join(uri, "_config.yaml"), config.yaml().encode())
    failed: dict[str, str] = {}
    if work:
        job = _Job(uri, folder, fingerprint, label, gpus_per_task, left_out or {})
        fresh, failed = _run(job, work, factory, config.cluster)
        accounts |= fresh
    result = Publication(uri, accounts, skipped)
    account = {"totals": result.totals, "plates": accounts, "failed": failed}
    write_bytes(join(uri, "_account.json"), json.dumps(account, indent=1).encode())
    delete_tree(folder)
    if not list_files(join(uri, ATTEMPTS)):
        delete_tree(join(uri, ATTEMPTS))
    if failed:
        shown = "\n".join(f"  plate {plate}: {why}" for plate, why in sorted(failed.items())[:10])
        raise DatasetError(
            f"{uri}: {len(failed)} of {len(todo)} plates failed, the others are published; "
            f"run the job again to try only these:\n{shown}"
        )
    return result


@dataclass(frozen=True)
class _Job:
    """What the parts of one publication share."""

    uri: str
    folder: str
    fingerprint: str
    label: str
    gpus: float
    left_out: Mapping[str, Mapping[str, int]]


def _run(
    job: _Job, work: list[CellRange], factory: Callable[[], Process], cluster: Cluster
) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    waiting = defaultdict(set)
    for number, unit in enumerate(work):
        waiting[unit.plate].add(number)
    records: dict[int, UnitRecord] = {}
    accounts: dict[str, dict[str, int]] = {}
    failed: dict[str, str] = {}
    columns = ""
    pending = list(range(len(work)))
    with tqdm(total=sum(u.rows for u in work), desc=job.label, unit=" cells", mininterval=1) as bar:
        for attempt in range(cluster.retries + 1):
            again = []
            for record in _map(pending, work, factory, job, cluster):
                unit = work[record.number]
                columns = columns or (record.columns if record.rows else "")
                if not record.error and record.rows and record.columns != columns:
                    what = _difference(columns, record.columns)
                    record = UnitRecord(record.number, error=what, final=True)
                if record.error:
                    if record.final or attempt == cluster.retries:
                        failed.setdefault(unit.plate, record.error)
                        bar.update(unit.rows)
                    else:
                        again.append(record.number)
                    continue
                records[record.number] = record
                bar.update(unit.rows)
                waiting[unit.plate].discard(record.number)
                if not waiting[unit.plate]:
                    group = [n for n, u in enumerate(work) if u.plate == unit.plate]
                    pairs = [(work[n], records[n]) for n in group]
                    accounts[unit.plate] = _publish_plate(job, pairs)
            pending = [n for n in again if work[n].plate not in failed]
            if not pending:
                break
    return accounts, failed


def _map(
    numbers: list[int],
    work: list[CellRange],
    factory: Callable[[], Process],
    job: _Job,
    cluster: Cluster,
) -> Iterable[UnitRecord]:
    import ray
    from ray.data import ActorPoolStrategy

    room = int(ray.cluster_resources().get("CPU", 1) // cluster.cpus_per_task)
    size = max(1, min(cluster.tasks or room, room, len(numbers)))
    items = [{"number": n, "unit": json.dumps(asdict(work[n]))} for n in numbers]
    rows = ray.data.from_items(items, override_num_blocks=len(items))
    mapped = rows.map(
        _Worker,
        fn_constructor_args=(factory, job.folder),
        compute=ActorPoolStrategy(min_size=1, max_size=size, max_tasks_in_flight_per_actor=2),
        num_cpus=cluster.cpus_per_task,
        num_gpus=job.gpus or None,
    )
    for row in mapped.iter_rows():
        yield UnitRecord(**json.loads(row["record"]))


def _publish_plate(job: _Job, pairs: list[tuple[CellRange, UnitRecord]]) -> dict[str, int]:
    plate = pairs[0][0].plate
    before = job.left_out.get(plate, {})
    account: Counter[str] = Counter({"in": sum(before.values()), "out": 0, **before})
    for unit, record in pairs:
        lost = unit.rows - record.rows - sum(record.dropped.values())
        if lost:
            raise DatasetError(
                f"plate {plate!r}, part {unit.index}: {unit.rows} cells went in, {record.rows} came "
                f"out and {sum(record.dropped.values())} were dropped; this is a bug, please report it"
            )
        account.update({"in": unit.rows, "out": record.rows})
        account.update(record.dropped)
        account.update(record.noted)
    target = join(job.uri, plate_folder(plate))
    if exists(target):  # left by a publication that was interrupted before its manifest
        delete_tree(target)
    parts = []
    for unit, record in pairs:
        if record.rows:
            name = join(plate_folder(plate), f"part-{unit.index:05d}.parquet")
            move(_attempt(job.folder, unit), join(job.uri, name))
            parts.append(Part(name, record.rows, record.bytes))
    manifest = Manifest(plate, job.fingerprint, tuple(parts), dict(account))
    write_bytes(manifest_uri(job.uri, plate), manifest.to_json())
    return dict(account)


def _difference(known: str, found: str) -> str:
    a, b = set(known.split(",")), set(found.split(","))
    missing, extra = sorted(a - b)[:5], sorted(b - a)[:5]
    return (
        "its columns differ from the plates before it: "
        f"missing {', '.join(missing) or 'none'}; extra {', '.join(extra) or 'none'}. "
        "All plates of a dataset must come from one pipeline"
    )
