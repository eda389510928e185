"""How pictures are written, and how lines are labelled."""

import itertools
from pathlib import Path

import matplotlib
from matplotlib.text import Text
import numpy as np
import pytest

import drawing
from pictures import assert_picture

FOLDER = Path(drawing.__file__).parent
COMMITTED = [
    *FOLDER.glob("pictures/*.png"),
    *FOLDER.parent.glob("benchmarks/pictures/*.png"),
]


def test_a_picture_is_written_in_the_style_which_nothing_else_gets(tmp_path):
    before, out = matplotlib.rcParams["axes.prop_cycle"], tmp_path / "new" / "picture.png"
    with drawing.picture(out, height=2) as figure:
        (line,) = figure.subplots().plot([1, 2])
    assert line.get_color() == "#0A3470"
    assert matplotlib.rcParams["axes.prop_cycle"] == before
    assert matplotlib.rcParams["savefig.dpi"] == "figure"
    assert_picture(out)


def test_a_picture_that_cannot_be_drawn_is_not_written(tmp_path):
    def draw():
        with drawing.picture(tmp_path / "picture.png", height=2) as figure:
            figure.subplots().plot([1, 2], [3])

    with pytest.raises(ValueError, match="same first dimension"):
        draw()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ends", [[0.5], [0.1, 0.1001, 0.9], [1.0] * 6, [3, 2, 1, 1, 1]])
def test_labels_are_in_the_order_of_the_lines_beside_the_axes_and_apart(ends, tmp_path):
    with drawing.picture(tmp_path / "picture.png", height=4) as figure:
        axes = figure.subplots()
        for i, end in enumerate(ends):
            axes.plot([0, 1, 2], [0, end, np.nan], label=f"line {i}")  # its end is at 1
        axes.plot([0, 1], [np.nan, np.nan], label="nowhere")
        axes.plot([0, 1], [0, 1])  # without a label
        drawing.label_ends(axes)
        figure.draw_without_rendering()
        labels = {int(text.get_text().removeprefix("line ")): text for text in axes.texts}
        assert sorted(labels) == list(range(len(ends)))
        # An annotation is a text with a pointer.
        boxes = [Text.get_window_extent(labels[i]) for i in np.argsort(ends, kind="stable")]
    for below, above in itertools.pairwise(boxes):
        assert below.y1 < above.y0
    for box in boxes:
        assert box.x0 > axes.bbox.x1
        assert box.x1 <= figure.bbox.x1
        assert axes.bbox.y0 < (box.y0 + box.y1) / 2 < axes.bbox.y1 + 1


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_what_is_committed_is_a_picture(file):
    assert_picture(file)
