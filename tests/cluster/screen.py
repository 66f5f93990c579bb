"""A simulated screen of eight plates on S3, taken through every step."""

from dataclasses import dataclass, field
from typing import Any

from tests.cluster.laboratory import BUCKET, Ended, Laboratory

STEPS = ("simulate", "prepare", "measure", "train", "generate", "evaluate")


@dataclass
class Screen:
    """The screen and how its steps ended.

    Attributes
    ----------
    laboratory
        Where it lies.
    folder
        Its ``run.folder``.
    ended
        Step → end of its job.
    hosts_at_work
        Hosts that had a Ray worker doing something while a step ran.
    reference
        Name and content of every generated cell of the undisturbed run.
    """

    laboratory: Laboratory
    plates: int = 8
    folder: str = f"s3://{BUCKET}/screen"
    ended: dict[str, Ended] = field(default_factory=dict)
    hosts_at_work: set[int] = field(default_factory=set)
    reference: list[tuple[str, str]] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """The experiment, as a user would write it."""
        simulated = f"{self.folder}/simulated"
        return {
            "run": {"name": "screen", "folder": self.folder},
            "simulate": {"plates": self.plates, "wells_per_plate": 6, "cells_per_site": 30},
            "prepare": {
                "tables": [f"{simulated}/tables"],
                "images": f"{simulated}/images",
                "channels": {name: name for name in ("DNA", "Actin", "Tubulin")},
                "patch_size": 68,
            },
            "cluster": {"cells_per_task": 64},
            "split": {"by": "well", "validation": 0.2, "test": 0},
            "train": {
                "input": f"{self.folder}/measured",
                "learning_rate": 0.003,
                "batch_size": 26,
                "steps": 40,
                "validate_every": 20,
                "checkpoint_every": 20,
            },
            "generate": {"input": f"{self.folder}/measured"},
            "evaluate": {"split": "validation"},
            "tracking": {"experiment": "cluster"},
        }

    def generating(self, output: str) -> dict[str, Any]:
        """Return the experiment with another folder for the generated screen, recorded apart."""
        generate = {**self.config["generate"], "output": output}
        return {**self.config, "generate": generate, "tracking": {"experiment": "other screens"}}

    def make(self) -> None:
        """Run every step; stop at the first that fails."""
        for step in STEPS:
            job = self.laboratory.submit(step, self.config)
            self.ended[step] = self.laboratory.wait(job, watch=self._look_at_hosts)
            if self.ended[step].exit_code != 0:
                return
        self.reference = self.laboratory.cells(f"{self.folder}/screen")

    def _look_at_hosts(self) -> None:
        for host in range(self.laboratory.hosts.count):
            if any(self.laboratory.hosts.busy(host)):
                self.hosts_at_work.add(host)
