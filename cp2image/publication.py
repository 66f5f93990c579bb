"""Writing datasets plate by plate, exactly once, on Ray Data. Floor: beside dataset.

Work is cut into units of cells; Ray Data spreads them over a pool of actors. Each unit writes one
file under ``_attempts/<fingerprint>/``; when all units of a plate are in, counted and checked, the
files move to ``plate=…/`` and the plate's manifest is written last. What has no manifest does
not exist for readers, finished plates are skipped by a rerun, and a retried unit writes the same
bytes again, so faults can neither lose nor double a cell.
"""

import json
import math
import threading
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    read_schema,
)
from cp2image.errors import Cp2ImageError, DatasetError
from cp2image.storage import delete_tree, exists, join, list_files, move, read_bytes, write_bytes

ATTEMPTS = "_attempts"
_CRASHES = 2
"""Further attempts at a unit whose process dies, before it counts as failed."""


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
    """What became of one unit; ``final`` errors are not tried again."""

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
    """The account of a dataset, as a job that wrote it leaves it.

    Attributes
    ----------
    uri
        The dataset.
    plates
        Published plate → ``in``, ``out`` and one count per reason for dropping a cell.
    skipped
        Plates that were there before.
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


def finished_plates(
    uri: str, fingerprint: str, inputs: Mapping[str, str] | None = None
) -> dict[str, Manifest]:
    """Return the plates of a dataset that need no more work.

    Raises
    ------
    DatasetError
        If plates there were written with other settings or from another input.
    """
    done = read_manifests(uri)
    for plate, known in sorted(done.items()):
        source = (inputs or {}).get(plate, known.input)
        if (known.fingerprint, known.input) != (fingerprint, source):
            what = "other settings" if known.fingerprint != fingerprint else "another input"
            raise DatasetError(
                f"{uri}: holds plate {plate!r}, written with {what}; write to another folder, or "
                "remove this one yourself"
            )
    return done


def publish(
    uri: str,
    units: Iterable[CellRange],
    factory: Callable[[], Process],
    config: Config,
    fingerprint: str,
    *,
    label: str,
    ready: Callable[[], object] = lambda: None,
    inputs: Mapping[str, str] | None = None,
    left_out: Mapping[str, Mapping[str, int]] | None = None,
    refused: Mapping[str, str] | None = None,
    gpus_per_task: float = 0.0,
    threads: int = 1,
) -> Publication:
    """Run ``factory()`` on every unit of every unpublished plate and publish plate by plate.

    Parameters
    ----------
    uri
        The dataset to write.
    units
        All units of all plates wanted; those of published plates are skipped.
    factory
        Called once in each actor; returns the function that turns a unit into a table.
    config
        The experiment; a copy is stored beside the data as ``_config.yaml``.
    fingerprint
        Tells outputs of other settings apart.
    label
        Shown on the progress bar.
    ready
        Called when the first unit has come back, and before any plate is published; may raise.
    inputs
        Plate → what tells its input apart from an earlier one.
    left_out
        Plate → reason → cells that were left out before the units were cut; they are counted.
    refused
        Plate → why it cannot be done; it counts as failed and its units are not tried.
    gpus_per_task
        Share of a GPU that each actor takes.
    threads
        Most units that an actor works on side by side, if what ``factory()`` makes allows that;
        it then takes the CPUs of as many tasks.

    Raises
    ------
    DatasetError
        If the dataset holds plates of other settings or inputs, or if plates failed: the others
        are published, the message names the failed ones and the first reason of each.
    """
    done = finished_plates(uri, fingerprint, inputs)
    failed = dict(refused or {})
    work = [unit for unit in units if unit.plate not in done and unit.plate not in failed]
    work.sort(key=lambda unit: (unit.plate, unit.index))
    folder = join(uri, ATTEMPTS, fingerprint)
    write_bytes(join(uri, "_config.yaml"), config.yaml().encode())
    accounts = {plate: dict(known.account) for plate, known in done.items()}
    if work:
        filled = [known for known in done.values() if known.parts]
        columns = _columns(read_schema(uri, filled[0])) if filled else ""
        job = _Job(
            uri,
            folder,
            fingerprint,
            label,
            gpus_per_task,
            threads,
            columns,
            inputs or {},
            left_out or {},
        )
        fresh, broken = _run(job, work, factory, config.cluster, ready)
        accounts |= fresh
        failed |= broken
    result = Publication(uri, dict(sorted(accounts.items())), tuple(sorted(done)))
    account = {"totals": result.totals, "plates": result.plates, "failed": failed}
    write_bytes(join(uri, "_account.json"), json.dumps(account, indent=1).encode())
    delete_tree(folder)
    if not list_files(join(uri, ATTEMPTS)):
        delete_tree(join(uri, ATTEMPTS))
    if failed:
        tried = len(failed) + len(accounts) - len(done)
        kept = ", the others are published" if len(failed) < tried else ""
        shown = "\n".join(f"  plate {plate}: {why}" for plate, why in sorted(failed.items())[:10])
        more = f"\n  and {len(failed) - 10} more, see _account.json" if len(failed) > 10 else ""
        raise DatasetError(
            f"{uri}: {len(failed)} of {tried} plates failed{kept}; "
            f"run the job again to try only these:\n{shown}{more}"
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
    threads: int
    columns: str
    inputs: Mapping[str, str]
    left_out: Mapping[str, Mapping[str, int]]


class _Worker:
    """One actor of the pool: runs the process on units and stores what comes out."""

    def __init__(self, factory: Callable[[], Process], folder: str) -> None:
        self._factory, self._folder = factory, folder
        self._process: Process | None = None
        self._starting = threading.Lock()

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        number = int(row["number"])
        try:
            record = self._work(number, CellRange(**json.loads(row["unit"])))
        except Cp2ImageError as error:
            record = UnitRecord(number, error=str(error), final=not isinstance(error, OSError))
        except Exception as error:  # a bug or a lost node's leftovers: reported, then retried
            trace = traceback.format_exc(limit=-3)
            record = UnitRecord(number, error=f"{type(error).__name__}: {error}\n{trace}")
        return {"record": json.dumps(asdict(record))}

    def _work(self, number: int, unit: CellRange) -> UnitRecord:
        with self._starting:
            if self._process is None:
                self._process = self._factory()
        outcome = self._process(unit)
        table = outcome.table
        data = to_parquet(table) if table.num_rows else b""
        if data:
            write_bytes(_attempt(self._folder, unit), data)
        counts = (table.num_rows, len(data), _columns(table.schema))
        return UnitRecord(number, *counts, outcome.dropped, outcome.noted)


def _attempt(folder: str, unit: CellRange) -> str:
    return join(folder, plate_folder(unit.plate), f"part-{unit.index:05d}.parquet")


def _columns(schema: pa.Schema) -> str:
    return ",".join(f"{column.name}:{column.type}" for column in schema)


def _run(
    job: _Job,
    work: list[CellRange],
    factory: Callable[[], Process],
    cluster: Cluster,
    ready: Callable[[], object],
) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Return the accounts of the plates published and the reasons of those that failed."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, unit in enumerate(work):
        numbers[unit.plate].append(number)
    records: dict[int, UnitRecord] = {}
    accounts: dict[str, dict[str, int]] = {}
    failed: dict[str, str] = {}
    columns = job.columns
    pending = list(range(len(work)))
    with tqdm(total=sum(u.rows for u in work), desc=job.label, unit=" cells", mininterval=1) as bar:
        for left in reversed(range(cluster.retries + 1)):
            again = []
            # What is tried again works alone: what kills its process must not take others along.
            first = left == cluster.retries and left > 0
            threads = job.threads if first else 1
            for record in _map(pending, work, factory, job, cluster, threads):
                ready()
                unit = work[record.number]
                error = record.error or _lost_cells(unit, record) or _other_columns(columns, record)
                if record.error and left and not record.final:
                    again.append(record.number)
                    continue
                bar.update(unit.rows)
                if error:
                    failed.setdefault(unit.plate, error)
                    continue
                columns = columns or (record.columns if record.rows else "")
                records[record.number] = record
                if all(number in records for number in numbers[unit.plate]):
                    pairs = [(work[n], records[n]) for n in numbers[unit.plate]]
                    try:
                        accounts[unit.plate] = _publish_plate(job, pairs)
                    except Cp2ImageError as problem:
                        failed[unit.plate] = str(problem)
            pending = [number for number in again if work[number].plate not in failed]
            if not pending:
                break
    return accounts, failed


def _map(
    numbers: list[int],
    work: list[CellRange],
    factory: Callable[[], Process],
    job: _Job,
    cluster: Cluster,
    threads: int,
) -> Iterator[UnitRecord]:
    """Run units on a pool of actors; yield one record of each, in any order."""
    import ray

    room, threads = _room(cluster, threads)
    size = max(1, min(room, len(numbers)) // threads)
    items = [{"number": n, "unit": json.dumps(asdict(work[n]))} for n in numbers]
    rows = ray.data.from_items(items, override_num_blocks=len(items))
    with warnings.catch_warnings():  # there is no other way yet to limit the retries of a crash
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        mapped = rows.map(
            _Worker,
            fn_constructor_args=(factory, job.folder),
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                initial_size=size,
                max_size=size,
                max_tasks_in_flight_per_actor=2 * threads,
                enable_true_multi_threading=threads > 1,
                max_concurrent_calls_per_actor=threads,
            ),
            num_cpus=cluster.cpus_per_task * threads,
            num_gpus=job.gpus or None,
            max_task_retries=_CRASHES,
        )
    mapped.context.max_errored_blocks = -1  # a unit whose process keeps dying must not end the job
    silent = set(numbers)
    for row in mapped.iter_rows():
        record = UnitRecord(**json.loads(row["record"]))
        silent.discard(record.number)
        yield record
    for number in sorted(silent):
        yield UnitRecord(
            number,
            error=f"part {work[number].index}: the process died each time it worked on it, perhaps "
            "for want of memory; give tasks more CPUs or fewer cells (cluster.cells_per_task)",
        )


def _room(cluster: Cluster, threads: int) -> tuple[int, int]:
    """Return how many units may be worked on at once, and how many of them in one actor.

    Actors of several threads have to fill the nodes and ``cluster.tasks`` without remainder.
    """
    import ray

    cpus = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    places = [n for n in (int(count // cluster.cpus_per_task) for count in cpus) if n]
    room = sum(places) or 1
    if cluster.tasks:
        room = min(cluster.tasks, room)
    if ray.available_resources().get("CPU", 0.0) < sum(cpus):  # shared with other work: small
        threads = 1  # actors fit into what is left
    common = math.gcd(room, *places)
    return room, max(n for n in range(1, max(1, threads) + 1) if common % n == 0)


def _lost_cells(unit: CellRange, record: UnitRecord) -> str:
    dropped = sum(record.dropped.values())
    if unit.rows == record.rows + dropped:
        return ""
    return (
        f"part {unit.index}: {unit.rows} cells went in, {record.rows} came out and {dropped} were "
        "dropped; this is a bug, please report it"
    )


def _other_columns(known: str, record: UnitRecord) -> str:
    if not record.rows or not known or record.columns == known:
        return ""
    a, b = known.split(","), record.columns.split(",")
    missing, extra = [c for c in a if c not in b], [c for c in b if c not in a]
    if not (missing or extra):
        return "its columns are in another order than those of the plates before it"
    return (
        "its columns differ from the plates before it: "
        f"missing {', '.join(missing[:5]) or 'none'}; extra {', '.join(extra[:5]) or 'none'}. "
        "All plates of a dataset must come from one pipeline"
    )


def _publish_plate(job: _Job, pairs: list[tuple[CellRange, UnitRecord]]) -> dict[str, int]:
    """Move a plate's files to their place, write its manifest, return its account."""
    plate = pairs[0][0].plate
    place = manifest_uri(job.uri, plate)
    if exists(place):  # another run of the same job was faster
        return dict(Manifest.from_json(read_bytes(place)).account)
    before = job.left_out.get(plate, {})
    account: Counter[str] = Counter({"in": sum(before.values()), "out": 0, **before})
    for unit, record in pairs:
        account.update({"in": unit.rows, "out": record.rows})
        account.update(record.dropped)
        account.update(record.noted)
    delete_tree(join(job.uri, plate_folder(plate)))  # of a run that ended before its manifest
    parts = []
    for unit, record in pairs:
        if record.rows:
            name = join(plate_folder(plate), f"part-{unit.index:05d}.parquet")
            move(_attempt(job.folder, unit), join(job.uri, name))
            parts.append(Part(name, record.rows, record.bytes))
    manifest = Manifest(
        plate, job.fingerprint, tuple(parts), dict(account), job.inputs.get(plate, "")
    )
    write_bytes(place, manifest.to_json())
    return dict(account)
