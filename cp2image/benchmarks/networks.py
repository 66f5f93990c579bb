"""Drawing and training: the package's networks beside plain PyTorch. Floor 1: torch alone.

``python -m cp2image.benchmarks.networks`` runs it where nothing but torch is installed, on a GPU if
there is one. The plain networks (`plain_networks`) run in torch's default layout with all threads
they are given, at the best of three batch sizes when drawing.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from cp2image.benchmarks.plain_networks import (
    PlainDiscriminator,
    PlainGenerator,
    PlainTraining,
    copy_discriminator,
    copy_generator,
)
from cp2image.benchmarks.report import (
    Comparison,
    Findings,
    Report,
    Table,
    Timing,
    compare,
    interleave,
    observe,
    tell,
)
from cp2image.models.cp2image import Generator
from cp2image.models.data_parallel import average_over_ranks
from cp2image.models.folded_generator import FoldedGenerator
from cp2image.models.recipe import Batch, OptimiserSetting, PaperRecipe

_RATES = OptimiserSetting(generator=0.003, discriminator=0.001)
_RAMP = 25
"""Steps of the γ ramp when curves are compared: all four hidden losses are full after 125."""


@dataclass(frozen=True)
class Size:
    """What the networks are built for.

    Attributes
    ----------
    features, channels, side
        Number of features and channels, side of a patch in pixels.
    batch
        Cells of a training step.
    """

    features: int = 453
    channels: int = 3
    side: int = 68
    batch: int = 104


def synthetic_cells(size: Size, cells: int, seed: int, device: str = "cpu") -> Batch:
    """Return cells whose features tell position, size and brightness of a blob per channel."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(cells, size.features, generator=random)
    grid = torch.linspace(-1, 1, size.side)
    shape = (cells, 1, 1, 1)

    def blobs(told: Tensor) -> Tensor:
        radius = (0.4 + 0.1 * told[:, 0]).clamp(0.1, 0.8).view(shape)
        x, y = (0.15 * told[:, i].view(shape) for i in (1, 2))
        away = torch.hypot(grid.view(1, 1, 1, -1) - x, grid.view(1, 1, -1, 1) - y)
        level = (0.6 + 0.1 * told[:, 3 : 3 + size.channels]).clamp(0.2, 1)
        soft = torch.sigmoid((radius - away) * 20) * level.view(cells, size.channels, 1, 1)
        return (soft + 0.05 * torch.rand(soft.shape, generator=random)).clamp(0, 1)

    real = blobs(torch.randn(cells, size.features, generator=random))
    return Batch(blobs(features).to(device), features.to(device), real.to(device))


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def has_bf16(device: str) -> bool:
    """Return whether bfloat16 arithmetic is done in hardware."""
    if device != "cpu":
        return bool(torch.cuda.is_bf16_supported())
    known = Path("/proc/cpuinfo")
    return known.exists() and any(
        flag in known.read_text() for flag in ("avx512_bf16", "amx_bf16", " bf16")
    )


@dataclass(frozen=True)
class Drawing:
    """What `time_drawing` found: timings by name, and the largest difference between patches."""

    timings: dict[str, Timing]
    plain_batch: int
    difference: float


def time_drawing(
    size: Size, *, cells: int, repetitions: int, device: str = "cpu", plain: bool = True
) -> Drawing:
    """Draw ``cells`` cells with the plain generator and the folded one, in turn.

    Patches are produced on the device and left there.
    """
    torch.manual_seed(0)
    trained = Generator(size.features, size.channels, size.side).to(device).train()
    with torch.no_grad():
        for seed in range(3):  # statistics that are not those of a fresh network
            trained(synthetic_cells(size, 16, seed, device).features)
    trained.eval().requires_grad_(False)
    slow = PlainGenerator(size.features, size.channels, size.side).to(device).eval()
    copy_generator(slow, trained.state_dict())
    folded = {"float32": FoldedGenerator(trained)}
    if has_bf16(device):
        folded["bf16"] = FoldedGenerator(trained, torch.bfloat16)
    features = torch.randn(max(cells, 1024), size.features, device=device)

    def draw(network: Callable[[Tensor], Tensor], batch: int) -> Callable[[int], None]:
        def call(n: int) -> None:
            with torch.inference_mode():
                for start in range(0, n, batch):
                    network(features[start : min(start + batch, n)])
            _wait(device)

        return call

    ours = 16 if device == "cpu" else 1024
    calls = {name: draw(network, ours) for name, network in folded.items()}
    batch = 0
    if plain:
        sizes = (8, 32, 104) if device == "cpu" else (104, 512, 1024)
        tried = {n: draw(slow, n) for n in sizes}
        batch = min(tried, key=lambda n: _seconds(tried[n], min(cells, 2 * max(sizes))))
        calls = {"plain": draw(slow, batch), **calls}
    with torch.inference_mode():
        seen = features[:64]
        difference = float((slow(seen) - folded["float32"](seen)).abs().max())
    return Drawing(interleave(calls, cells, repetitions), batch, difference)


def time_bare(size: Size, cells: int, threads: int) -> dict[str, float]:
    """Return the folded generator's cells a second with all threads, arranged in two ways.

    ``"torch threads"``: one pass after another, each on all threads, as a script would have it;
    ``"Python threads"``: as many passes side by side, each on one thread, as the actors of the
    generation job have them.
    """
    torch.manual_seed(0)
    network = FoldedGenerator(Generator(size.features, size.channels, size.side).eval())
    features = torch.randn(1024, size.features)

    def draw(count: int) -> None:
        with torch.inference_mode():
            for start in range(0, count, 16):
                network(features[start % 1024 : start % 1024 + 16])

    found = {}
    kept = torch.get_num_threads()
    try:
        draw(64)
        before = time.perf_counter()
        draw(cells)
        found["torch threads"] = cells / (time.perf_counter() - before)
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
            before = time.perf_counter()
            list(pool.map(draw, [cells // threads] * threads))
            found["Python threads"] = cells / (time.perf_counter() - before)
    finally:
        torch.set_num_threads(kept)
    return found


def _seconds(call: Callable[[int], None], cells: int) -> float:
    call(cells)
    before = time.perf_counter()
    call(cells)
    return time.perf_counter() - before


def _recipe(size: Size, device: str, ramp: int, bf16: bool = False) -> PaperRecipe:
    torch.manual_seed(0)
    return PaperRecipe(
        size.features,
        size.channels,
        size.side,
        setting=_RATES,
        gamma_ramp=ramp,
        bf16=bf16,
        device=device,
    )


def _plain_training(size: Size, recipe: PaperRecipe, device: str, ramp: int) -> PlainTraining:
    generator = PlainGenerator(size.features, size.channels, size.side).to(device)
    discriminator = PlainDiscriminator(size.channels, size.side).to(device)
    copy_generator(generator, recipe.generator.state_dict())
    copy_discriminator(discriminator, recipe.discriminator.state_dict())
    return PlainTraining(generator, discriminator, _RATES.generator, _RATES.discriminator, ramp)


def _alone(_: Sequence[Tensor]) -> None:
    """One rank: nothing to average."""


def time_training(
    size: Size, *, repetitions: int, device: str = "cpu", plain: bool = True
) -> dict[str, Timing]:
    """Time steps with all hidden losses on, plain and the package's in turn."""
    far = 1_000_000  # past the ramp
    recipe = _recipe(size, device, 1)
    script = _plain_training(size, recipe, device, 1) if plain else None
    recipes = {"float32": recipe}
    if has_bf16(device):
        recipes["bf16"] = _recipe(size, device, 1, bf16=True)
    cells = synthetic_cells(size, size.batch, 1, device)

    def part(n: int) -> Batch:
        return Batch(cells.original[:n], cells.features[:n], cells.real[:n])

    def ours(which: PaperRecipe) -> Callable[[int], None]:
        def call(n: int) -> None:
            which.step(part(n), far, _alone)
            _wait(device)

        return call

    calls = {name: ours(which) for name, which in recipes.items()}
    if script is not None:
        told = script

        def call_plain(n: int) -> None:
            some = part(n)
            told.step(some.original, some.features, some.real, far)
            _wait(device)

        calls = {"plain": call_plain, **calls}
    return interleave(calls, size.batch, repetitions)


def follow_losses(size: Size, steps: int, device: str = "cpu") -> list[dict[str, Any]]:
    """Train the plain script and the package's recipe on the same batches from the same weights.

    Adversarial training enlarges rounding errors. How much is seen from a second plain script,
    whose weights differ from the first one's by a rounding error each: two ways of computing the
    same thing cannot stay closer than those two do.

    Returns
    -------
    list of dict
        Per step: ``step``; ``plain``, ``ours`` and ``nudged`` with their losses.
    """
    recipe = _recipe(size, device, _RAMP)
    script = _plain_training(size, recipe, device, _RAMP)
    nudged = _plain_training(size, recipe, device, _RAMP)
    _nudge([*nudged.generator.parameters(), *nudged.discriminator.parameters()])
    found = []
    for step in range(steps):
        cells = synthetic_cells(size, size.batch, 1000 + step, device)
        plain = script.step(cells.original, cells.features, cells.real, step)
        beside = nudged.step(cells.original, cells.features, cells.real, step)
        ours = {name: float(loss) for name, loss in recipe.step(cells, step, _alone).items()}
        losses = {"plain": plain, "ours": {n: ours[n] for n in plain}, "nudged": beside}
        found.append({"step": step, **losses})
    return found


def _nudge(parameters: Sequence[Tensor]) -> None:
    """Change every weight by one part in 2²³, what float32 can just tell, up or down."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            up = torch.randint(0, 2, parameter.shape, generator=random).to(parameter.device)
            parameter.mul_(1 + (2.0 * up - 1) * 2.0**-23)


def time_workers(size: Size, repetitions: int, workers: int) -> float:
    """Return seconds a step, the median, of one thread per worker sharing ``size.batch`` cells."""
    with tempfile.TemporaryDirectory(prefix="cp2image-workers-") as folder:
        place = str(Path(folder, "seconds"))
        run: Callable[..., object] = spawn  # torch does not type it
        run(_run_rank, (size, repetitions, workers, folder), nprocs=workers)
        seconds: list[float] = torch.load(place, weights_only=True).tolist()
        return statistics.median(seconds)


def _run_rank(rank: int, size: Size, repetitions: int, workers: int, folder: str) -> None:
    torch.set_num_threads(1)
    recipe = _recipe(size, "cpu", 1)
    cells = synthetic_cells(size, size.batch // workers, 1 + rank)
    average: Callable[[Sequence[Tensor]], None] = _alone
    if workers > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
        average = average_over_ranks
    seconds = []
    for _ in range(repetitions + 1):
        before = time.perf_counter()
        recipe.step(cells, 1_000_000, average)
        seconds.append(time.perf_counter() - before)
    if rank == 0:
        torch.save(torch.tensor(seconds[1:]), Path(folder, "seconds"))
    if workers > 1:
        dist.destroy_process_group()


def tell_drawing(found: Drawing, size: Size) -> Table:
    """Set drawing out as a table."""
    pairs = [
        Comparison(f"{name}, {_side(size)}", found.timings["plain"], timing)
        for name, timing in found.timings.items()
        if name != "plain"
    ]
    note = (
        f"Patches drawn a second: {', '.join(_rates(found.timings))}. Plain at its best batch of "
        f"{found.plain_batch}. Largest difference in float32: {found.difference:.1e}."
    )
    return compare("Drawing, bare model", pairs, "plain", note)


def tell_training(timings: dict[str, Timing], size: Size) -> Table:
    """Set training out as a table."""
    pairs = [
        Comparison(f"{name}, batch {size.batch}, {_side(size)}", timings["plain"], timing)
        for name, timing in timings.items()
        if name != "plain"
    ]
    note = f"Cells trained a second, all hidden losses on: {', '.join(_rates(timings))}."
    return compare("A training step", pairs, "plain", note)


def _side(size: Size) -> str:
    return f"{size.features:,} features, {size.side} px"


def _rates(timings: dict[str, Timing]) -> list[str]:
    return [f"{name} {1000 / timing.wall:,.0f}" for name, timing in timings.items()]


def tell_losses(found: list[dict[str, Any]]) -> Table:
    """Set both sides' losses out, and how far they ever are from each other."""
    shown = sorted({0, len(found) // 4, len(found) // 2, 3 * len(found) // 4, len(found) - 1})
    names = list(found[0]["plain"])
    rows = [
        [str(found[i]["step"] + 1)]
        + [f"{found[i]['plain'][name]:.4g} / {found[i]['ours'][name]:.4g}" for name in names]
        for i in shown
    ]
    ours, nudged = (
        ", ".join(f"{name} {worst:.2%}" for name, worst in loss_deviation(found, side).items())
        for side in ("ours", "nudged")
    )
    note = (
        "plain / cp2image, same weights and batches to begin with. Largest relative difference of "
        f"the means over 20 steps: {ours}. Of the plain script from itself, started with each "
        f"weight one rounding error off: {nudged}."
    )
    return Table("The same losses", ["step", *names], rows, note)


def loss_deviation(
    found: list[dict[str, Any]], side: str = "ours", window: int = 20
) -> dict[str, float]:
    """Return the largest relative difference of each loss's running means from ``plain``'s."""
    deviations = {}
    for name in found[0]["plain"]:
        worst = 0.0
        for start in range(0, max(1, len(found) - window + 1)):
            part = found[start : start + window]
            plain, other = (statistics.fmean(p[k][name] for p in part) for k in ("plain", side))
            worst = max(worst, abs(plain - other) / abs(plain))
        deviations[name] = worst
    return deviations


def measure_growth(
    time_one: Callable[[Size], Timing], sizes: Sequence[Size], wording: str
) -> tuple[Table, list[dict[str, Any]]]:
    """Time one thing at several sizes; return the table and the figures."""
    rows, figures = [], []
    for size in sizes:
        tell(f"growth: {size.features} features, {size.side} px, batch {size.batch}")
        timing = time_one(size)
        rows.append(
            [
                f"{size.features:,}",
                str(size.side),
                str(size.batch),
                f"{timing.wall:.2f} ms",
                f"{timing.cpu:.2f} ms",
            ]
        )
        figures.append({**vars(size), **timing.to_json()})
    columns = ["features", "side, px", "batch", f"wall per {wording}", "CPU"]
    return Table("Growth", columns, rows), figures


def benchmark_networks(
    size: Size, *, cells: int, repetitions: int, steps: int, device: str
) -> Findings:
    """Draw, train, follow losses: everything that torch alone can show."""
    tell(f"networks: drawing {cells:,} cells, plain and folded in turn")
    drawing = time_drawing(size, cells=cells, repetitions=repetitions, device=device)
    tell("networks: training steps, plain and the package's in turn")
    training = time_training(size, repetitions=repetitions, device=device)
    tell(f"networks: losses over {steps} steps")
    losses = follow_losses(size, steps, device)
    tables = [tell_drawing(drawing, size), tell_training(training, size), tell_losses(losses)]
    figures = {
        "size": vars(size),
        "drawing": {name: timing.to_json() for name, timing in drawing.timings.items()},
        "difference": drawing.difference,
        "training": {name: timing.to_json() for name, timing in training.items()},
        "losses": losses,
    }
    where = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    introduction = (
        f"{where}, {torch.get_num_threads()} threads; {_side(size)}, {size.channels} channels; "
        f"medians of {repetitions} repetitions in turn."
    )
    return Findings(introduction, tables, figures)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def run_alone() -> Report:
    """Parse the command line and run `benchmark_networks`: no config, no Ray."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("features", 453), ("channels", 3), ("side", 68), ("batch", 104)):
        parser.add_argument(f"--{name}", type=_positive, default=value)
    parser.add_argument("--cells", type=_positive, help="to draw; as many as fit the device")
    parser.add_argument("--repetitions", type=_positive, default=5)
    parser.add_argument(
        "--steps", type=_positive, default=200, help="over which losses are compared"
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = Size(options.features, options.channels, options.side, options.batch)
    cells = options.cells or (208 if device == "cpu" else 20_480)

    def run() -> Findings:
        return benchmark_networks(
            size,
            cells=cells,
            repetitions=options.repetitions,
            steps=options.steps,
            device=device,
        )

    return observe("networks", run, {**vars(options), "threads": os.cpu_count()})


if __name__ == "__main__":
    print(run_alone())
