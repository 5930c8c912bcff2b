"""Figures as they are drawn."""

import pytest

from fewstep.report.curves import _draw_validation, plot_runs
from fewstep.report.figure import label_plainly, new_figure
from fewstep.training.run_folder import RunFolder, json_line


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


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "fewstep.report.curves.save_figure", lambda figure, _: figures.append(figure)
    )
    lines = [{"iteration": i, "loss": 1.0, "val_loss": 1.0, "val_ci95": 0.1} for i in (1, 2)]
    paths = [tmp_path / name for name in ("a/run", "b/run", "b/other")]
    for path in paths:
        path.mkdir(parents=True)
        (path / "metrics.jsonl").write_text("".join(map(json_line, lines)))

    def labels(*runs):
        plot_runs([RunFolder(path) for path in runs], tmp_path / "curves.png")
        for axes in figures.pop().axes:
            yield [text.get_text() for text in axes.get_legend().get_texts()]

    assert list(labels(paths[0])) == [["run"]] * 2
    assert list(labels(*paths)) == [["a/run", "b/run", "b/other"]] * 2
    assert list(labels(*paths[1:])) == [["run", "other"]] * 2


def test_one_validation_has_its_interval_too():
    axes = new_figure(4, 4).subplots()
    _draw_validation(
        axes, [{"iteration": 5, "val_accuracy": 0.5, "val_ci95": 0.1}], "accuracy", "C0", "run"
    )
    ((bar,),) = (line.get_segments() for line in axes.containers[0][2])
    assert bar[:, 1].tolist() == pytest.approx([40, 60])
