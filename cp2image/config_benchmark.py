"""Config of the benchmarks. Ground floor."""

from typing import Annotated, Literal

from pydantic import Field

from cp2image.config_section import Count, Positive, Section


class Benchmark(Section):
    """Speed beside what a user would otherwise write (`cp2image.benchmarks`)."""

    which: Annotated[
        list[Literal["measure", "generate", "train", "input", "evaluate", "screen"]],
        Field(min_length=1),
    ] = ["measure"]
    output: str = ""
    patches: Positive = 96
    """Patches that both ways work on; the plain way takes a tenth of a second for each."""
    repetitions: Positive = 5
    sizes: Annotated[list[Annotated[Count, Field(ge=2)]], Field(min_length=1)] = [
        1_000,
        10_000,
        50_000,
    ]
    """Numbers of patches over which growth is shown; the largest takes 60 kB of memory each."""
    drawn: Positive = 416
    """Cells that both generators draw."""
    plate_cells: Annotated[Positive, Field(ge=4)] = 61_440
    """Cells of the plate that the whole generation job draws; 35 kB of disk each."""
    small_plate_cells: Annotated[Positive, Field(ge=4)] = 20_480
    """Cells of a plate that the job draws once, to show what its start costs."""
    bare_cells: Annotated[Positive, Field(ge=64)] = 8_192
    """Cells that the bare model draws before and after each job, in two ways."""
    growth: bool = True
    """Whether cost is also shown over numbers of features, sides of patches and batches."""
    jobs: Positive = 5
    """How often the whole generation job is run."""
    screens: Annotated[list[Annotated[Count, Field(ge=8)]], Field(min_length=1)] = [
        100_000,
        1_000_000,
    ]
    """Cells of the screens, of small patches, over which the generation job's growth is shown."""
    screen_jobs: Positive = 3
    """How often each of them is generated."""
    batch: Annotated[Positive, Field(ge=4, multiple_of=2)] = 104
    """Cells of a training step, for two workers too; the plain script needs about 3 MB for each."""
    followed_steps: Positive = 200
    followed_batch: Positive = 13
    """Steps and cells over which the losses of both ways are compared."""
    read_cells: Annotated[Positive, Field(ge=208)] = 65_536
    """Cells that are read from a dataset and from one file each; 60 kB of disk and 36 kB of memory
    each."""
    evaluated_cells: Positive = 10_000
    """Real cells of the evaluation that is timed, and as many generated ones."""
