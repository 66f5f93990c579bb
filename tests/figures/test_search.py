"""What a search has seen, drawn: every trial stands where its numbers say."""

import numpy as np
import pandas as pd
import pytest

from cp2image.errors import EvaluationError
from cp2image.figures.canvas import save
from cp2image.figures.search import numbers_against_objective, parallel_coordinates

KEYS = {"train.gamma.1": True, "train.gamma_ramp": False}
TRIALS = pd.DataFrame(
    {
        "train.gamma.1": [0.0, 0.1, 10.0, 1.0],
        "train.gamma_ramp": [10, 20, 30, 40],
        "validation/frechet_cp": [5.0, 3.0, 1.0, np.nan],
        "status": ["complete", "stopped", "complete", "failed"],
    }
)


def lines_of(figure):
    (axes,) = figure.axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    return {tuple(np.round(line.get_ydata(), 3)): line for line in lines}


def test_a_line_per_scored_trial_passes_its_numbers_with_0_below_the_logarithm(tmp_path):
    figure = parallel_coordinates(TRIALS, KEYS, "validation/frechet_cp", title="three")
    lines = lines_of(figure)
    assert len(lines) == 3
    ends = {place[2]: place for place in lines}
    assert ends[1.0][:2] == (0, 0)  # γ₁ = 0, the smallest ramp, the largest distance
    assert ends[0.0][:2] == (1, 1)
    assert 0.1 < ends[0.5][0] < 0.3
    assert lines[ends[0.5]].get_linestyle() == "--"
    save(figure, str(tmp_path / "lines.png"))


def test_each_number_has_a_panel_with_the_references_as_lines(tmp_path):
    figure = numbers_against_objective(
        TRIALS, KEYS, "validation/frechet_cp", references={"gamma-1": 2.0}
    )
    first, second = figure.axes
    assert (first.get_xlabel(), second.get_xlabel()) == ("γ₁", "gamma ramp")
    points = np.concatenate([part.get_offsets() for part in second.collections])
    assert sorted(map(tuple, points.tolist())) == [(10, 5), (20, 3), (30, 1)]
    assert first.get_xticklabels()[0].get_text() == "0"
    assert [line.get_ydata()[0] for line in first.lines] == [2.0]
    save(figure, str(tmp_path / "panels.png"))


def test_without_a_scored_trial_there_is_nothing_to_draw():
    with pytest.raises(EvaluationError, match="no trial has reported validation/mean_r"):
        parallel_coordinates(TRIALS, KEYS, "validation/mean_r")
