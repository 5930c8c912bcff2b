"""A picture of a few classification episodes."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from fewstep.data.episodes import ClassificationEpisodes
from fewstep.report.figure import new_figure, save_figure

_WIDEST = 24  # inches


def picture_episodes(episodes: ClassificationEpisodes, count: int, path: Path) -> None:
    """Draw the first episodes side by side, a line for each class, support left of query.

    Args:
        episodes: What to draw.
        count: How many episodes.
        path: PNG file to write.
    """
    batch = episodes.batch(0, count)
    height = 0.5 * episodes.ways + 0.6
    width = 0.5 * (episodes.shots + episodes.queries) + 0.4
    across = min(count, max(1, int(_WIDEST / width)))
    rows = math.ceil(count / across)
    scale = min(1, _WIDEST / max(width, height))  # of both, as images stay square
    figure = new_figure(scale * width * across, scale * height * rows)
    ratios = [episodes.shots, episodes.queries] * across
    axes = figure.subplots(rows, 2 * across, width_ratios=ratios, squeeze=False).flatten()
    is_narrow = min(episodes.shots, episodes.queries) == 1
    for axis in axes:
        axis.set_axis_off()
    for task in range(count):
        sets = (
            ("support", batch.x_support, episodes.shots),
            ("query", batch.x_query, episodes.queries),
        )
        for axis, (name, x, columns) in zip(axes[2 * task : 2 * task + 2], sets, strict=True):
            axis.imshow(
                _mosaic(x[task].cpu(), episodes.ways, columns).numpy(),
                cmap="gray_r",
                vmin=0,
                vmax=1,
            )
            title = f"{name[0].upper()}{task}" if is_narrow else f"{name} {task}"
            axis.set_title(title, fontsize=8)
    save_figure(figure, path)


def _mosaic(images: Tensor, rows: int, columns: int) -> Tensor:
    """Lay (rows * columns, channels, h, w) out as one image, (rows * h, columns * w[, 3])."""
    channels, height, width = images.shape[1:]
    grid = images.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * height, columns * width, channels).squeeze(-1)
