"""The look of the pictures of examples and benchmarks, and how they are written."""

from collections.abc import Iterator
import contextlib
import io
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
from PIL import Image

STYLE = Path(__file__).with_name("rmsprop.mplstyle")
WIDTH = 8  # inches
QUANTIZER = Image.Quantize.MAXCOVERAGE  # the default replaces rare colours


@contextlib.contextmanager
def picture(out: Path, height: float) -> Iterator[Figure]:
    """A figure to draw on, `height` inches high; on exit it is written to `out` as a PNG file."""
    with matplotlib.rc_context(fname=STYLE):
        figure = Figure(figsize=(WIDTH, height))
        yield figure
        png = io.BytesIO()
        figure.savefig(png, format="png")
    out.parent.mkdir(parents=True, exist_ok=True)
    # A palette of 256 colours halves the file without a visible difference.
    image = Image.open(png).convert("RGB").quantize(256, QUANTIZER, kmeans=1)
    image.save(out, format="png", optimize=True)


def label_ends(axes: Axes) -> None:
    """Labels each line at its right end, which is easier to follow than a legend."""
    low, high = sorted(axes.get_ylim())
    ends = []
    for line in axes.get_lines():
        label, xy = str(line.get_label()), np.asarray(line.get_xydata())
        xy = xy[np.isfinite(xy).all(axis=1)]
        if len(xy) and not label.startswith("_"):
            x, y = xy[-1]
            ends.append(((x, np.clip(y, low, high)), label, line.get_color()))
    if not ends:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the size of the axes is known only now
    heights = axes.transData.transform([point for point, _, _ in ends])[:, 1]
    heights = (heights - axes.bbox.y0) / axes.bbox.height
    lines = 1 + max(label.count("\n") for _, label, _ in ends)
    points = 3 + 12 * lines  # between labels
    apart = points / 72 * figure.dpi / axes.bbox.height
    order = np.argsort(heights, kind="stable")
    places = heights[order]
    for _ in range(500):  # labels that are too close push each other apart
        places = np.clip(places, 0, 1)
        push = np.maximum(0, apart - np.diff(places)) / 2
        places[:-1] -= push
        places[1:] += push
    for i, place in zip(order, places, strict=True):
        point, label, color = ends[i]
        pointer = {"arrowstyle": "-", "color": color, "relpos": (0, 0.5), "shrinkA": 1}
        axes.annotate(
            label,
            point,
            (1.03, place),
            textcoords="axes fraction",
            verticalalignment="center",
            fontsize=9,
            arrowprops=pointer,
            annotation_clip=False,
        )
