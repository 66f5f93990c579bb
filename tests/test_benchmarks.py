"""The benchmarks run and account for themselves; how fast anything is, is never asserted."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cp2image.benchmarks.patches import publish_patches, take_patches
from cp2image.benchmarks.plain_evaluation import (
    correlate_plain,
    embed_plain,
    frechet_plain,
    kernel_plain,
)
from cp2image.benchmarks.plain_measurement import measure_plain
from cp2image.benchmarks.report import Comparison, Sample, Timing, interleave
from cp2image.benchmarks.running import run_benchmarks
from cp2image.config_reading import read_config
from cp2image.errors import DatasetError
from cp2image.metrics.correlation import feature_correlation
from cp2image.metrics.embedding import CellProfilerEmbedding
from cp2image.metrics.frechet import Moments, frechet_distance, kernel_distance

JOB = Path(__file__).parents[1] / "jobs" / "benchmark.py"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    settings = [
        f"run.folder={folder}",
        "benchmark.patches=3",
        "benchmark.repetitions=2",
        "benchmark.sizes=[6, 20]",
        "cluster.cells_per_task=6",
    ]
    return run_benchmarks(read_config(None, settings)), folder / "benchmark"


@pytest.fixture(scope="module")
def patches():
    return take_patches(read_config(None), 5)


def numbers(node):
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from numbers(value)
    elif isinstance(node, int | float):
        yield node


def test_a_tiny_run_yields_a_table_of_finite_ratios(written):
    text, folder = written
    assert (folder / "measure.md").read_text() in text
    ratios = [float(ratio) for ratio in re.findall(r"\| ([\d.,infa]+) ×", text)]
    assert len(ratios) == 2 * 2 + 2
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)
    for title in ("masks given", "segmentation included", "One core and two", "Growth", "actor"):
        assert title in text
    assert "next bottleneck" in text


def test_the_figures_come_with_the_machine_the_commit_and_every_sample(written):
    found = json.loads((written[1] / "measure.json").read_text())
    assert found["cpu_model"]
    assert found["cores"] >= 1
    assert found["load_before"] >= 0
    assert found["load_after"] >= 0
    assert re.match(r"[0-9a-f]{40}|unknown", found["commit"])
    assert found["versions"]["cp_measure"]
    results = found["results"]
    assert all(math.isfinite(number) for number in numbers(results))
    given = results["compared"]["masks given"]
    assert len(given["ours"]["samples_cpu_s"]) == len(given["plain"]["samples_cpu_s"]) == 2
    assert list(results["growth"]) == ["6", "20"]
    assert [row["cells"] for row in results["actor"]] == [6, 20]
    assert all(row["peak_mib"] > 10 for row in results["actor"])
    assert results["share_of_equal_values"] > 0.99


def test_both_ways_work_on_the_same_patches_and_give_the_same_values(patches):
    images = patches.images / 65535
    plain = measure_plain(images, patches.masks, patches.channels)
    fast = measure_plain(images, patches.masks, patches.channels, accelerated=True)
    tied = [name for name in plain if "_Location_MaxIntensity_" in name]
    np.testing.assert_allclose(fast.drop(columns=tied), plain.drop(columns=tied), 1e-9, 1e-9)


def test_published_patches_are_taken_before_simulated_ones(patches, tmp_path):
    uri = publish_patches(patches, str(tmp_path), 12, 5)
    config = read_config(None, [f"measure.input={uri}"])
    taken = take_patches(config, 7)
    assert taken.source == uri
    np.testing.assert_array_equal(taken.images[:5], patches.images)
    np.testing.assert_array_equal(taken.images[5:], patches.images[:2])
    np.testing.assert_array_equal(taken.masks[:5], patches.masks)
    with pytest.raises(DatasetError, match=r"12 patches with a nucleus.*was to take 13"):
        take_patches(config, 13)


def test_ratios_are_those_of_medians_and_repetitions_take_turns():
    order = []
    taken = interleave(
        {"a": lambda n: order.append(("a", n)), "b": lambda n: order.append("b")}, 5, 2
    )
    assert order == [("a", 2), "b", ("a", 5), "b", ("a", 5), "b"]
    assert len(taken["a"].samples) == 2
    slow = Timing(10, (Sample(9.0, 3.0), Sample(2.0, 2.0), Sample(1.0, 1.0)))
    quick = Timing(10, (Sample(1.0, 1.0), Sample(0.5, 0.5), Sample(0.1, 0.1)))
    both = Comparison("x", slow, quick)
    assert (slow.wall, slow.cpu) == (200.0, 200.0)
    assert (both.wall_ratio, both.cpu_ratio, both.range) == (4.0, 4.0, (3.0, 10.0))
    assert (slow + quick).samples[0] == Sample(10.0, 4.0)


def test_names_on_the_command_line_choose_benchmarks_and_unknown_ones_are_refused():
    def run(*arguments):
        command = [sys.executable, str(JOB), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    known = run("measure", "--dry-run", "--set", "benchmark.patches=7")
    assert known.returncode == 0, known.stderr
    assert re.search(r"which:\s+(- measure|\[measure\])", known.stdout)
    assert "patches: 7" in known.stdout
    unknown = run("mesure")
    assert unknown.returncode == 2
    assert "did you mean 'measure'" in unknown.stderr


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("run")
    settings = [
        f"run.folder={folder}",
        "benchmark.which=[evaluate]",
        "benchmark.patches=3",
        "benchmark.repetitions=2",
        "benchmark.evaluated_cells=120",
    ]
    text = run_benchmarks(read_config(None, settings))
    return text, json.loads((folder / "benchmark" / "evaluate.json").read_text())["results"]


def test_the_parts_of_an_evaluation_add_up_to_all_of_it(evaluated):
    text, results = evaluated
    assert all(math.isfinite(number) for number in numbers(results))
    assert set(results["shares"]) == set(results["seconds"])
    assert sum(results["shares"].values()) == pytest.approx(1)
    assert sum(results["seconds"].values()) == pytest.approx(results["total_seconds"])
    expected = {"reading", "measuring", "embedding", "moving", "correlation", "distances"}
    expected |= {"bootstrap over wells", "control: drawing", "control: measuring", "pictures"}
    assert expected <= set(results["seconds"])
    assert min(results["seconds"][part] for part in expected) > 0
    assert "Where the time goes" in text


def test_the_plain_script_is_timed_part_by_part(evaluated):
    text, results = evaluated
    assert len(results["compared"]) == 6
    for found in results["compared"].values():
        assert len(found["plain"]["samples_cpu_s"]) == len(found["ours"]["samples_cpu_s"]) == 2
    assert "beside a plain script" in text


def test_both_ways_find_the_same_correlations_and_distances():
    names = ["Nuclei_AreaShape_Area", *(f"Nuclei_Texture_Variance_DNA_{k}_00_256" for k in (3, 5))]
    random = np.random.default_rng(0)
    real = pd.DataFrame(random.normal(size=(400, 3)), columns=names)
    drawn = real + random.normal(size=(400, 3))
    table = feature_correlation(real, drawn, names)
    np.testing.assert_allclose(correlate_plain(real, drawn), table["r"], rtol=1e-12)
    embedding = CellProfilerEmbedding.fit(real)
    x, y = embed_plain(real, drawn)
    np.testing.assert_allclose(np.abs(x), np.abs(embedding.embed(real)), atol=1e-5)
    distance = frechet_distance(Moments.of(x), Moments.of(y))
    assert frechet_plain(x, y) == pytest.approx(distance, rel=1e-8)
    kernel = kernel_distance(x, y, subset_size=200)
    assert kernel_plain(x, y) == pytest.approx(kernel.mean, rel=0.2)
