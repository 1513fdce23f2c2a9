"""Plots of training curves (dalle/commands/plot.py)."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from dalle.commands.plot import PlotArgs, plot
from dalle.viz.curves import plot_losses, smoothed


def write_log(run: Path, lines: list[dict]) -> None:
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two runs of a transformer, the second without evaluations."""
    for name, shift in (("one", 0.0), ("two", 1.0)):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "loss": 5 / step + shift, "grad_norm": 1.0} for step in range(1, 6)]
        lines[0] |= {"baseline/loss": 6.0, "grad_scale_log2": [13.0, 13.0]}
        lines += [{"step": 5, "val/loss": 1.5}] if name == "one" else []
        write_log(tmp_path / name, lines)
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


def curves(axis) -> list[tuple[list[float], list[float]]]:
    return [
        (list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in axis.get_lines()
    ]


def legend(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_each_run_has_its_curve_its_evaluations_and_its_chance(runs, figures, tmp_path):
    plot(PlotArgs(tuple(runs), out=tmp_path / "new" / "curves.png"))
    (axis,) = figures[0].axes
    one, evaluated, chance, two, _ = curves(axis)
    assert one == ([1, 2, 3, 4, 5], [5.0, 2.5, 5 / 3, 1.25, 1.0])
    assert evaluated == ([5.0], [1.5])
    assert chance[1] == [6.0, 6.0]
    assert two[1][0] == 6.0
    assert legend(axis) == ["one", "two"]
    assert Image.open(tmp_path / "new" / "curves.png").width > 300


def test_metrics_labels_and_axes_are_options(runs, figures, tmp_path):
    options = {"metrics": ("grad_norm", "loss"), "labels": ("AdamW", "Muon"), "chance": False}
    plot(PlotArgs(tuple(runs), **options, log_x=True, log_y=True, out=tmp_path / "curves.png"))
    first, second = figures[0].axes
    assert (first.get_title(), second.get_title()) == ("grad_norm", "loss")
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert len(curves(second)) == 3
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


def test_the_rows_of_the_quick_start(runs, figures):
    plot_losses({"transformer": runs[0], "clip": runs[1]})
    titles = [f"transformer: {name}" for name in ("loss", "image_loss", "text_loss")]
    titles += ["clip: loss", "clip: image_to_text_acc"]
    assert [axis.get_title() for axis in figures[0].axes if axis.get_visible()] == titles


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no runs to plot"),
        ({"runs": ("nowhere",)}, "nowhere/log.jsonl"),
        ({"runs": ("one",), "metrics": ("los",)}, "'los'.* baseline/loss, .*val/loss"),
        ({"runs": ("empty",)}, "empty"),
        ({"smooth": 1.0}, "smooth must"),
        ({"runs": ("a",), "labels": ("a", "b")}, "2 labels for 1 runs"),
    ],
)
def test_what_cannot_be_plotted_is_named(options, message, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_log(tmp_path / "empty", [])
    with pytest.raises(ValueError, match=message):
        plot(PlotArgs(**options | {"runs": tuple(map(Path, options.get("runs", ())))}))


def test_the_script_takes_runs_by_position(runs, figures, script):
    done = script("plot", *runs, "--smooth", "0.5", "--log-x", "--labels", "a", "b")
    assert "wrote curves.png" in done.out
    assert curves(figures[0].axes[0])[0][1][1] == pytest.approx((5 + 2 * 2.5) / 3)


def test_gradient_scales(tmp_path, figures):
    lines = [{"step": step, "grad_scale_log2": [13.0, 12.0, 13.0 + step, 12.0]} for step in (1, 2, 3)]
    write_log(tmp_path, lines)
    plot(PlotArgs((tmp_path,), gradient_scales=True, out=tmp_path / "new" / "scales.png"))
    attention, mlp = figures[0].axes
    assert curves(attention)[1] == ([1, 2, 3], [14.0, 15.0, 16.0])
    assert len(curves(mlp)) == 2
    with pytest.raises(ValueError, match="one run, got 2"):
        plot(PlotArgs((tmp_path, tmp_path), gradient_scales=True))
