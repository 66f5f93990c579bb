"""The whole way, from a simulated screen to a scored generated one. Above the steps."""

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cp2image.config import Config
from cp2image.evaluation import Report, evaluate
from cp2image.generation import generate
from cp2image.measuring import measure_dataset
from cp2image.preparation import prepare
from cp2image.simulation import simulate
from cp2image.storage import join
from cp2image.tracking import tracking_uri
from cp2image.training import train

STEPS: tuple[tuple[str, Callable[[Config], Any]], ...] = (
    ("simulate a screen: fields of view and tables whose truth is known", simulate),
    ("prepare: cut, check and count one patch per cell", prepare),
    ("measure: CellProfiler features of the patches", measure_dataset),
    ("train a generator on them", train),
    ("generate every cell of the screen from its features", generate),
    ("evaluate the held-out wells", evaluate),
)


@dataclass(frozen=True)
class Demonstration:
    """Where everything is; printed at the end."""

    config: Config
    report: Report
    seconds: float

    def __str__(self) -> str:
        config = self.config
        report = config.evaluate.output
        store = tracking_uri(config)
        mlflow = shlex.join([sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store])
        return "\n".join(
            [
                "",
                str(self.report),
                "",
                f"Done in {self.seconds / 60:.1f} minutes. Look at",
                f"  real above generated cells   {join(report, 'cells.png')}",
                f"  how features are kept        {join(report, 'correlation.png')}",
                f"  a plate of generated cells   {join(config.generate.output, '_plates')}/",
                f"  all numbers                  {join(report, 'report.json')}",
                f"  the generated screen         {config.generate.output}/  (pandas.read_parquet)",
                f"  runs and the model           {mlflow}",
            ]
        )


def demonstrate(config: Config) -> Demonstration:
    """Run all steps one after another; what an earlier run finished is not done again."""
    started = time.monotonic()
    result: Any = None
    for number, (title, step) in enumerate(STEPS, start=1):
        print(f"\n[{number}/{len(STEPS)}] {title}", flush=True)
        result = step(config)
        if number < len(STEPS):
            print(result, flush=True)
    return Demonstration(config, result, time.monotonic() - started)
