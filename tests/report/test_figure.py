"""Figures as they are drawn."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F

from fewstep import MetaLearner, maml
from fewstep.data.episodes import ClassificationEpisodes
from fewstep.data.store import ClassStore
from fewstep.models import sinusoid_mlp
from fewstep.report.curves import _draw_validation, plot_runs
from fewstep.report.episode_picture import picture_episodes
from fewstep.report.figure import draw_band, label_plainly, new_figure, save_figure
from fewstep.report.sinusoid_fits import plot_sinusoid_fits
from fewstep.training.metrics_file import json_line
from fewstep.training.run_folder import RunFolder

pytestmark = pytest.mark.pictures


def test_a_band_is_of_the_iterations_that_all_have():
    axes = new_figure(3, 2).subplots()
    draw_band(axes, [{1: 5.0, 2: 2.0, 4: 0.0}, {4: 3.0, 2: 4.0, 3: 9.0}], "MAML", "C1")
    (line,), (band,) = axes.lines, axes.collections
    assert line.get_xydata().tolist() == [[2, 3], [4, 1.5]]
    assert set(map(tuple, band.get_paths()[0].vertices)) == {(2, 2), (2, 4), (4, 0), (4, 3)}
    draw_band(axes, [{1: 5.0}, {}], "not begun", "C2")
    assert len(axes.lines) == 1


def test_a_picture_is_drawn_once_and_as_savefig_would(tmp_path, monkeypatch):
    drawn, draw = [], Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda *a: drawn.append(a) or draw(*a))
    own, usual = tmp_path / "own.png", tmp_path / "usual.png"
    for path in (own, usual):
        figure = new_figure(3, 2)
        for axes in figure.subplots(1, 2):
            axes.plot([1, 1000], [0.3, 20], label="run")
            axes.set(xlabel="iteration", ylabel="loss", title="training", yscale="log")
            label_plainly(axes.yaxis)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
        if path == own:
            save_figure(figure, path)
            assert len(drawn) == 1
        else:
            figure.savefig(path, dpi=120)
    pixels, wanted = (np.array(Image.open(path)) for path in (own, usual))
    assert pixels.shape == (240, 360, 4)
    assert np.array_equal(pixels, wanted)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1.05, 1.65, ["1.1", "1.2", "1.3", "1.4", "1.5", "1.6"]),
        (0.78, 1.6, ["0.8", "0.9", "1", "1.5"]),
        (0.3, 2, ["0.3", "0.4", "0.6", "1", "1.5", "2"]),
        (0.0003, 0.2, ["0.001", "0.01", "0.1"]),
    ],
)
def test_a_logarithmic_axis_has_plain_numbers(low, high, labels):
    figure = new_figure(3, 4)
    axes = figure.subplots()
    axes.set(yscale="log", ylim=(low, high))
    label_plainly(axes.yaxis)
    figure.canvas.draw()
    ticks = [*axes.get_yticklabels(minor=False), *axes.get_yticklabels(minor=True)]
    shown = {t.get_text() for t in ticks if t.get_text() and low <= t.get_position()[1] <= high}
    assert sorted(shown, key=float) == labels


@pytest.mark.parametrize(("metric", "logarithmic"), [("accuracy", 1), ("loss", 2)])
def test_losses_are_labelled_so(tmp_path, monkeypatch, metric, logarithmic):
    labelled = []
    monkeypatch.setattr("fewstep.report.curves.label_plainly", labelled.append)
    lines = [{"iteration": i, "loss": 1 + 1 / i} for i in range(1, 5)]
    lines.append({"iteration": 4, f"val_{metric}": 0.5, "val_ci95": 0.1, "val_loss": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(map(json_line, lines)))
    plot_runs([RunFolder(tmp_path)], tmp_path / "curves.png")
    assert len(labelled) == logarithmic


@pytest.fixture
def figures(monkeypatch):
    """Figures in place of their files."""
    figures = []
    for module in ("curves", "episode_picture", "sinusoid_fits"):
        monkeypatch.setattr(
            f"fewstep.report.{module}.save_figure", lambda figure, _: figures.append(figure)
        )
    return figures


def test_runs_of_one_name_are_told_apart(tmp_path, figures):
    lines = [{"iteration": i, "loss": 1.0, "val_loss": 1.0, "val_ci95": 0.1} for i in (1, 2)]
    paths = [tmp_path / name for name in ("a/run", "b/run", "b/other")]
    for path in paths:
        path.mkdir(parents=True)
        (path / "metrics.jsonl").write_text("".join(map(json_line, lines)))

    def labels(*runs):
        plot_runs([RunFolder(path) for path in runs], tmp_path / "curves.png")
        (legend,) = figures.pop().legends
        return [text.get_text() for text in legend.get_texts()]

    assert labels(paths[0]) == ["run"]
    assert labels(*paths) == ["a/run", "b/run", "b/other"]
    assert labels(*paths[1:]) == ["run", "other"]


def test_one_validation_has_its_interval_too():
    axes = new_figure(4, 4).subplots()
    _draw_validation(
        axes, [{"iteration": 5, "val_accuracy": 0.5, "val_ci95": 0.1}], "accuracy", "C0", "run"
    )
    ((bar,),) = (line.get_segments() for line in axes.containers[0][2])
    assert bar[:, 1].tolist() == pytest.approx([40, 60])


def test_training_is_a_mean_over_the_last_2_percent_and_validation_has_its_interval(
    tmp_path, figures
):
    lines = [{"iteration": i, "loss": float(i % 2)} for i in range(1, 101)]
    lines += [{"iteration": i, "val_accuracy": 0.5, "val_ci95": i / 1000} for i in (50, 100)]
    (tmp_path / "metrics.jsonl").write_text("".join(map(json_line, lines)))
    plot_runs([RunFolder(tmp_path)], tmp_path / "curves.png")
    left, right = figures.pop().axes
    assert left.lines[0].get_xydata().tolist() == [[i, 0.5] for i in range(2, 101)]
    (path,) = right.collections[0].get_paths()
    band = {tuple(map(round, vertex)) for vertex in path.vertices.tolist()}
    assert band == {(50, 45), (50, 55), (100, 40), (100, 60)}


def test_a_legend_lies_on_no_curve(tmp_path, figures):
    lines = [
        {"iteration": i, "loss": 1.0, "val_accuracy": i / 9, "val_ci95": 1.0} for i in range(9)
    ]
    runs = []
    for number in range(4):
        path = tmp_path / f"{number}-a-run-of-a-rather-long-name"
        path.mkdir()
        (path / "metrics.jsonl").write_text("".join(map(json_line, lines)))
        runs.append(RunFolder(path))
    plot_runs(runs, tmp_path / "curves.png")
    (figure,) = figures
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width
    for axes in figure.axes:
        assert axes.get_legend() is None
        assert legend.y1 <= axes.get_tightbbox().y0
    assert "running mean" in figure.axes[0].get_title()


def test_a_picture_of_episodes_is_filled(figures, tmp_path):
    store = ClassStore.from_counts(
        torch.zeros(400, 1, 4, 4, dtype=torch.uint8), [20] * 20, list(map(str, range(20)))
    )
    for ways, shots, queries, count in ((20, 5, 15, 3), (20, 1, 3, 3), (5, 5, 3, 12)):
        episodes = ClassificationEpisodes(store, "train", ways=ways, shots=shots, queries=queries)
        picture_episodes(episodes, count, tmp_path / "episodes.png")
        figure = figures.pop()
        figure.draw_without_rendering()
        boxes = [axes.get_position() for axes in figure.axes]
        titles = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
        assert len(titles) == 2 * count
        assert not any(a.overlaps(b) for a, b in itertools.combinations(titles, 2))
        assert min(title.x0 for title in titles) >= 0
        for low, high in (("x0", "x1"), ("y0", "y1")):
            ends = min(getattr(b, low) for b in boxes), max(getattr(b, high) for b in boxes)
            assert ends[1] - ends[0] > 0.9


def test_of_results_that_come_along_the_validation_is_drawn(tmp_path, figures):
    paths = [tmp_path / name for name in ("alone", "whole")]
    for path, file in zip(paths, ("validation.jsonl", "metrics.jsonl"), strict=True):
        path.mkdir()
        lines = [{"iteration": i, "val_accuracy": i / 9, "val_ci95": 0.1} for i in (1, 2)]
        if path.name == "whole":
            lines.append({"iteration": 1, "loss": 1.0})
        (path / file).write_text("".join(map(json_line, lines)))
    plot_runs([RunFolder(paths[0])], tmp_path / "curves.png")
    (axes,) = figures.pop().axes
    assert axes.lines[0].get_ydata() == pytest.approx([100 / 9, 200 / 9])
    plot_runs([RunFolder(path) for path in paths], tmp_path / "curves.png")
    left, right = figures.pop().axes
    assert [len(axes.lines) for axes in (left, right)] == [1, 2]
    (paths[1] / "validation.jsonl").write_text(json_line({"iteration": 9}))  # of no account beside
    assert len(RunFolder(paths[1]).metrics()) == 3


def test_a_line_of_an_episode_s_picture_is_a_class(figures, tmp_path):
    """Support left of query, a column for each image."""
    images = torch.arange(6 * 9, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)
    store = ClassStore.from_counts(images, [9] * 6, list("abcdef"))
    episodes = ClassificationEpisodes(store, "train", ways=3, shots=2, queries=4)
    picture_episodes(episodes, 2, tmp_path / "episodes.png")
    drawn = [np.rint(axes.images[0].get_array() * 255) for axes in figures.pop().axes]
    for support, query in zip(drawn[::2], drawn[1::2], strict=True):
        assert (support.shape, query.shape) == ((12, 8), (12, 16))
        lines = np.concatenate([support, query], 1).reshape(3, 4, 6, 4)
        assert (lines == lines[:, :1, :, :1]).all()
        of_classes = lines[:, 0, :, 0]
        assert all(len(set(line)) == 6 and len(set(line // 9)) == 1 for line in of_classes)
        assert len(set(of_classes[:, 0] // 9)) == 3


def test_fits_are_those_after_their_steps_and_points_lie_on_the_truth(figures, tmp_path):
    learner = MetaLearner(sinusoid_mlp(), maml(1, 0.01), F.mse_loss)
    plot_sinusoid_fits(learner, tmp_path / "fits.png")
    for axes in figures.pop().axes:
        lines = {line.get_label(): torch.tensor(line.get_xydata()).float() for line in axes.lines}
        x, y = lines["support"].T
        truth = np.interp(x, *lines["truth"].T)
        assert y.numpy() == pytest.approx(truth, abs=0.01)  # of 200 points of the curve
        for name, steps in (("before", 0), ("1 step", 1), ("5 steps", 5), ("10 steps", 10)):
            at, fit = lines[name].T
            with torch.no_grad():
                wanted = learner.adapt(x[:, None], y[:, None], num_steps=steps)(at[:, None])
            torch.testing.assert_close(fit, wanted[:, 0])
