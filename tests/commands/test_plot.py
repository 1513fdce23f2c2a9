"""Plots of training curves (dalle/commands/plot.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dalle.commands.plot import PlotArgs, plot
from dalle.viz.curves import plot_losses, smoothed


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two runs of a transformer, the second without evaluations, and one without a step."""
    one, two = (
        [{"step": s, "loss": 5 / s + shift, "grad_norm": 1.0} for s in range(1, 6)] for shift in (0, 1)
    )
    for name, lines in {"one": [*one, {"step": 5, "val/loss": 1.5}], "two": two, "empty": []}.items():
        if lines:
            lines[0] |= {"baseline/loss": 6.0, "grad_scale_log2": [13.0, 12.0, 14.0, 12.0]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [tmp_path / "one", tmp_path / "two"]


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    saved, save = [], Figure.savefig

    def record(figure, *args, **settings):
        saved.append(figure)
        save(figure, *args, **settings)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


def curves(axis) -> list[list[list[float]]]:
    """The x and the y of each line."""
    return [np.stack(line.get_data()).astype(float).tolist() for line in axis.get_lines()]


def legend(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_each_run_has_its_curve_its_evaluations_and_its_chance(runs, figures, tmp_path):
    plot(PlotArgs(tuple(runs), out=tmp_path / "new" / "curves.png"))
    (axis,) = figures[0].axes
    one, evaluated, chance, two, _ = curves(axis)
    assert one == [[1, 2, 3, 4, 5], [5.0, 2.5, 5 / 3, 1.25, 1.0]]
    assert evaluated == [[5.0], [1.5]]
    assert chance[1] == [6.0, 6.0]
    assert two[1][0] == 6.0
    assert legend(axis) == ["one", "two"]
    assert Image.open(tmp_path / "new" / "curves.png").width > 300


def test_metrics_labels_and_axes_are_options(runs, figures, tmp_path):
    options = {"metrics": ("grad_norm", "loss"), "labels": ("AdamW", "Muon"), "smooth": 0.5}
    plot(PlotArgs(tuple(runs), **options, chance=False, log_x=True, log_y=True, out=tmp_path / "curves.png"))
    first, second = figures[0].axes
    assert (first.get_title(), second.get_title()) == ("grad_norm", "loss")
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert len(curves(second)) == 3
    assert curves(second)[0][1][1] == pytest.approx((5 + 2 * 2.5) / 3)
    assert legend(first) == ["AdamW", "Muon"]


def test_a_log_file_is_a_run_and_runs_of_one_name_have_different_labels(runs, figures, tmp_path):
    (tmp_path / "other").mkdir()
    other = runs[0].rename(tmp_path / "other" / "two")
    plot(PlotArgs((other / "log.jsonl", runs[1]), out=tmp_path / "curves.png"))
    assert legend(figures[0].axes[0]) == [str(other / "log.jsonl"), str(runs[1])]


def test_smoothing_is_a_running_mean_corrected_for_its_start():
    assert smoothed([3.0, 1.0, 2.0], 0.0) == [3.0, 1.0, 2.0]
    assert smoothed([3.0, 3.0, 3.0], 0.9) == pytest.approx([3.0] * 3)
    assert smoothed([4.0, 1.0], 0.5) == pytest.approx([4.0, (4 + 2 * 1) / 3])


def test_the_panels_of_the_quick_start(runs, figures):
    plot_losses({"transformer": runs[0], "clip": runs[1]})
    titles = [f"transformer: {name}" for name in ("loss", "image_loss", "text_loss")]
    titles += ["clip: loss", "clip: image_to_text_acc"]
    assert [axis.get_title() for axis in figures[0].axes] == titles


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no runs to plot"),
        ({"runs": ("nowhere",)}, "nowhere/log.jsonl"),
        ({"runs": ("one",), "metrics": ("los",)}, "'los'.* baseline/loss, .*val/loss"),
        ({"runs": ("empty",)}, "empty"),
        ({"smooth": 1.0}, "smooth must"),
        ({"runs": ("a",), "labels": ("a", "b")}, "2 labels for 1 runs"),
        ({"runs": ("one", "two"), "gradient_scales": True}, "one run, got 2"),
        ({"runs": ("empty",), "gradient_scales": True}, "only runs with train"),
    ],
)
def test_what_cannot_be_plotted_is_named(options, message, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        plot(PlotArgs(**options | {"runs": tuple(map(Path, options.get("runs", ())))}))


def test_gradient_scales(runs, figures, tmp_path):
    plot(PlotArgs((runs[0],), gradient_scales=True, out=tmp_path / "new" / "scales.png"))
    attention, mlp = figures[0].axes
    assert curves(attention) == [[[1], [13.0]], [[1], [14.0]]]
    assert curves(mlp) == [[[1], [12.0]]] * 2
