"""The trials of a search on storage: one small JSON file each, so nothing is lost. Above config."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pandas as pd

from cp2image.storage import exists, join, list_files, read_bytes, write_bytes

Status = Literal["running", "complete", "stopped", "diverged", "failed"]
OVER = ("complete", "stopped", "diverged")
"""A trial that is one of these is never run again."""
SEARCH, FINAL = "search", "final"


@dataclass(frozen=True)
class Trial:
    """One training run of a search.

    Attributes
    ----------
    number
        From 0, in the order they were proposed.
    values
        Dotted key → number in which it differs from the base config.
    seed
        Of its run.
    steps
        That it is to reach.
    kind
        ``search`` or ``final``: one of the best, or a reference, with one of the seeds.
    name
        Of the reference it is; empty for what was proposed.
    parent
        Number of the trial whose state it began with; None: new weights.
    generation
        Of a population, from 0.
    status
        ``running`` (or interrupted), ``complete``, ``stopped`` early, ``diverged``, ``failed``.
    history
        What it reported, in order of ``step``: every logged metric and ``score``.
    reason
        Why it failed or diverged.
    overhead
        Seconds from its start to its first step; None if that was not seen.
    """

    number: int
    values: dict[str, float]
    seed: int
    steps: int
    kind: str = SEARCH
    name: str = ""
    parent: int | None = None
    generation: int | None = None
    status: Status = "running"
    history: list[dict[str, float]] = field(default_factory=list)
    reason: str = ""
    overhead: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether it is never run again."""
        return self.status in OVER

    @property
    def step(self) -> int:
        """Step of its last report."""
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def score(self) -> float | None:
        """Score of its last report; less is better."""
        return self.history[-1]["score"] if self.history else None

    def reported(self, metrics: dict[str, float]) -> "Trial":
        """Return the trial with one more report; one of the same or a later step is replaced."""
        before = [one for one in self.history if one["step"] < metrics["step"]]
        return replace(self, history=[*before, metrics])


class TrialTable:
    """The trials below a folder; whatever is changed is written at once.

    Parameters
    ----------
    uri
        Folder of the search.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        files = [f for f in list_files(join(uri, "trials")) if f.endswith("/trial.json")]
        read = [Trial(**json.loads(read_bytes(file))) for file in files]
        self._trials = {trial.number: trial for trial in read}

    @property
    def trials(self) -> list[Trial]:
        """All of them, by number."""
        return [self._trials[number] for number in sorted(self._trials)]

    def __getitem__(self, number: int) -> Trial:
        return self._trials[number]

    def next_number(self) -> int:
        """Return the number of a trial that is not there yet."""
        return max(self._trials, default=-1) + 1

    def put(self, trial: Trial) -> None:
        """Write a trial."""
        self._trials[trial.number] = trial
        data = json.dumps(asdict(trial), indent=1).encode()
        write_bytes(join(self.folder(trial.number), "trial.json"), data)

    def folder(self, number: int) -> str:
        """Return where a trial and its checkpoint lie."""
        return join(self.uri, "trials", f"{number:04d}")


def to_frame(trials: Iterable[Trial]) -> pd.DataFrame:
    """Return one row per trial: what it is, its values, and the metrics of its last report."""
    rows: list[dict[str, Any]] = []
    for trial in trials:
        last = dict(trial.history[-1]) if trial.history else {}
        about = {
            "trial": trial.number,
            "kind": trial.kind,
            "name": trial.name,
            "status": trial.status,
            "seed": trial.seed,
            "parent": trial.parent,
            "generation": trial.generation,
            "step": last.pop("step", 0),
            "score": last.pop("score", None),
            "overhead_seconds": trial.overhead,
        }
        rows.append({**about, **trial.values, **last})
    return pd.DataFrame(rows)


def read_json(uri: str) -> dict[str, Any] | None:
    """Return a small JSON file, or None if it is not there."""
    if not exists(uri):
        return None
    found: dict[str, Any] = json.loads(read_bytes(uri))
    return found
