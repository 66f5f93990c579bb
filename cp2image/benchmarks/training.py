"""How fast training is, beside a plain script: steps, losses, workers, growth. Above networks."""

from typing import Any

import torch

from cp2image.benchmarks.networks import (
    Size,
    follow_losses,
    measure_growth,
    tell_losses,
    tell_training,
    time_training,
    time_workers,
)
from cp2image.benchmarks.report import Findings, Table, Timing, tell
from cp2image.config import Config
from cp2image.figures.canvas import save
from cp2image.figures.curves import training_curves
from cp2image.storage import join

_FEATURES = 1_752
"""What is left of `measure`'s features on BBBC021 after selection."""


def benchmark_train(config: Config) -> Findings:
    """Time steps against a plain script, follow both sides' losses, add a worker, grow."""
    settings = config.benchmark
    size = Size(_FEATURES, batch=settings.batch)
    tell(f"train: steps of {size.batch} cells, plain and the package's in turn")
    timings = time_training(size, repetitions=settings.repetitions)
    followed = Size(_FEATURES, batch=settings.followed_batch)
    tell(f"train: losses of both over {settings.followed_steps} steps of {followed.batch} cells")
    losses = follow_losses(followed, settings.followed_steps)
    figure = training_curves(
        _curves(losses, "ours"),
        beside=_curves(losses, "plain"),
        title="Solid: cp2image; dashed: the plain script, same weights and batches",
    )
    save(figure, join(settings.output, "train_losses.png"))
    tell("train: one worker, two workers, one thread each")
    workers = {n: time_workers(size, settings.repetitions, n) for n in (1, 2)}

    def step(one: Size) -> Timing:
        taken = time_training(one, repetitions=settings.repetitions, plain=False)
        return taken["float32"]

    tables = [
        tell_training(timings, size),
        tell_losses(losses),
        _tell_workers(workers, size.batch),
    ]
    grown: list[dict[str, Any]] = []
    if settings.growth:
        sizes = [Size(n, batch=26) for n in (50, 500, 2000)]
        sizes += [Size(500, side=side, batch=26) for side in (64, 96, 128)]
        sizes += [Size(500, batch=batch) for batch in (52, 104)]
        table, grown = measure_growth(step, sizes, "trained cell")
        tables.append(table)
    figures = {
        "size": vars(size),
        "steps": {name: timing.to_json() for name, timing in timings.items()},
        "losses": losses,
        "workers_s_per_step": {str(n): seconds for n, seconds in workers.items()},
        "growth": grown,
    }
    introduction = (
        f"{torch.get_num_threads()} threads; synthetic cells, {_FEATURES:,} features, "
        f"{size.channels} channels, {size.side} px; plain: a script as one would write it, data "
        f"in memory on both sides; medians of {settings.repetitions} repetitions in turn."
    )
    return Findings(introduction, tables, figures)


def _curves(losses: list[dict[str, Any]], side: str) -> dict[str, tuple[list[int], list[float]]]:
    steps = [one["step"] for one in losses]
    return {name: (steps, [one[side][name] for one in losses]) for name in losses[0][side]}


def _tell_workers(workers: dict[int, float], batch: int) -> Table:
    rows = [
        [str(n), f"{seconds:.2f} s", f"{batch / seconds:,.0f}", f"{workers[1] / seconds:.2f} ×"]
        for n, seconds in workers.items()
    ]
    note = f"Batches of {batch} cells over all workers, gloo, gradients averaged each step."
    return Table(
        "Workers of one thread each", ["workers", "step", "cells/s", "speed-up"], rows, note
    )
