"""Grids show the pixels they are given; charts escape unusual names."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from skimage.io import imread

from fedface.measurements import Interval
from fedface.reports import charts


def test_a_face_grid_repeats_pixels_and_keeps_their_colour() -> None:
    """A 2 x 2 checkerboard enlarged to 64 pixels is four flat squares; 0.6 becomes 153."""
    board = torch.zeros(1, 3, 2, 2)
    board[0, :, 0, 0] = 0.6
    png = charts.face_grid([("row", board)], ["column"], side=64)
    pixels = np.asarray(imread(io.BytesIO(png)))
    face = pixels[-70:-6, -70:-6, :3]
    assert (face[2:30, 2:30] == 153).all()
    assert (face[34:62, 34:62] == 0).all() and (face[2:30, 34:62] == 0).all()


def test_rows_and_columns_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="rows must hold 3 images each, got 2"):
        charts.face_grid([("row", torch.zeros(2, 3, 8, 8))], ["a", "b", "c"])


def test_a_group_name_with_dollars_and_angles_stays_text() -> None:
    points = [(0.0, Interval(estimate=1.0, low=0.5, high=1.5, count=1))]
    svg = charts.group_dots(["$a_{b}$ <i>"], [(charts.AFTER, points)], unit="steps").decode()
    assert "$a_{b}$ &lt;i&gt;" in svg


def test_the_same_numbers_draw_the_same_chart() -> None:
    bars = [(charts.AFTER, (0.25, 0.75))]
    assert charts.tone_bars(["light", "dark"], bars) == charts.tone_bars(["light", "dark"], bars)
