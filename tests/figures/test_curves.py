import numpy as np
import pandas as pd
import pytest

from cp2image.errors import EvaluationError
from cp2image.figures.curves import (
    best_features,
    correlation_boxes,
    correlation_curve,
    training_curves,
)


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    r = np.append(rng.uniform(-0.2, 0.95, 39), np.nan)
    return pd.DataFrame(
        {
            "feature": [f"Nuclei_AreaShape_F{i}" for i in range(40)],
            "compartment": ["Nuclei", "Cells"] * 20,
            "category": ["AreaShape"] * 20 + ["Texture"] * 20,
            "r": r,
        }
    )


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_the_curve_falls_from_the_best_feature_to_the_worst_and_tells_the_share(table):
    figure = correlation_curve(table)
    r = table["r"].dropna()
    share = round(100 * (r > 0.5).mean())
    label = f"generated cells: {share} % of 39 features above 0.5"
    drawn = lines(figure)[label].get_ydata()
    np.testing.assert_array_equal(drawn, sorted(r, reverse=True))
    assert [text.get_text() for text in figure.legends[0].texts] == [label]


def test_ceiling_and_control_are_drawn_beside_the_curve(table):
    other = table.iloc[:10].assign(r=np.linspace(0, 1, 10))
    figure = correlation_curve(table, ceiling=other, shuffled=other.assign(r=-0.9))
    drawn = lines(figure)
    assert len(drawn["control: shuffled features"].get_ydata()) == 10
    assert drawn["ceiling: real patches against the table"].get_ydata()[0] == 1
    assert figure.axes[0].get_ylim()[0] < -0.9
    figure.canvas.draw()


def test_the_best_features_are_drawn_in_order_with_their_r(table):
    rng = np.random.default_rng(1)
    original = pd.DataFrame(rng.normal(size=(30, 40)), columns=table["feature"])
    original.iloc[0] = np.nan
    figure = best_features(original, original + 1, table)
    best = table.sort_values("r", ascending=False).head(6)
    titles = [axes.get_title(loc="left").split("\n")[-1] for axes in figure.axes]
    assert titles == [name.split("_")[-1] for name in best["feature"]]
    assert [axes.texts[0].get_text() for axes in figure.axes] == [f"r = {r:.2f}" for r in best["r"]]
    points = figure.axes[0].collections[0].get_offsets()
    name = best["feature"].iloc[0]
    np.testing.assert_allclose(points[:, 0], original[name][1:])
    np.testing.assert_allclose(points[:, 1], original[name][1:] + 1)
    figure.canvas.draw()


def test_fewer_features_than_asked_for_and_constant_ones_are_drawn(table):
    two = table.head(2)
    flat = pd.DataFrame(0.5, index=range(9), columns=two["feature"])
    figure = best_features(flat, flat, two)
    assert len(figure.axes) == 2
    figure.canvas.draw()


def test_each_category_has_one_box_per_compartment_and_counts_its_features(table):
    figure = correlation_boxes(table, title="by category")
    axes = figure.axes[0]
    assert {label.get_text() for label in axes.get_yticklabels()} == {"AreaShape", "Texture"}
    assert sorted(text.get_text() for text in axes.texts) == ["10", "10", "10", "9"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["Nuclei", "Cells"]
    figure.canvas.draw()


def test_training_curves_have_one_panel_per_metric_logarithmic_when_it_spans_decades():
    steps = np.arange(50)
    figure = training_curves(
        {
            "L_MSE": (steps, 1e4 * np.exp(-steps / 8)),
            "L_Dis": (steps, np.where(steps == 3, np.nan, 1.4)),
            "val/L_MSE": ([0, 10, 20], [300, 250, 170]),
            "empty": ([], []),
        },
        floors={"val/L_MSE": 253.0},
        title="run",
    )
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == ["L_MSE", "L_Dis", "val/L_MSE", "empty"]
    assert [axes.get_yscale() for axes in panels.values()] == ["log", "linear", "linear", "linear"]
    assert len(panels["L_Dis"].get_lines()[0].get_xdata()) == 49
    assert panels["val/L_MSE"].get_lines()[1].get_ydata()[0] == 253
    figure.canvas.draw()


def test_nothing_to_draw_is_an_error_that_says_so(table):
    undefined = table.assign(r=np.nan)
    for draw in (correlation_curve, correlation_boxes):
        with pytest.raises(EvaluationError, match="no feature has a defined correlation"):
            draw(undefined)
    with pytest.raises(EvaluationError, match="no feature has a defined correlation"):
        best_features(pd.DataFrame(), pd.DataFrame(), undefined)
    with pytest.raises(EvaluationError, match="no training history"):
        training_curves({})
