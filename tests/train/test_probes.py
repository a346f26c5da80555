"""The drawn tasks: always the same, balanced, and what their questions say."""

import numpy as np
import pytest

from vitarium.train.config import find_recipe, recipe_names
from vitarium.train.probes import COLOURS, GROUND, HELD_OUT, LINE, PROBES, SIZE, TRAIN, drawn
from vitarium.train.sources import load_data


def _pixels(name, count=60):
    images, answers = drawn(name, count)
    return [np.asarray(image) for image in images], answers


def _where(pixels, colour):
    return (pixels == np.array(colour)).all(-1)


@pytest.mark.parametrize("name", PROBES)
def test_images_are_functions_of_their_number(name):
    first, answers = _pixels(name)
    again, same = _pixels(name, 5)
    assert all((a == b).all() for a, b in zip(first, again)) and (answers[:5] == same).all()
    held_out, _ = drawn(name, 5, split=1)
    assert not any((a == np.asarray(b)).all() for a, b in zip(first, held_out))
    assert first[0].shape == (SIZE, SIZE, 3)
    _, many = drawn(name, 300)
    assert 0.4 < many.mean() < 0.6


def test_pairs_have_one_colour_or_two():
    for pixels, answer in zip(*_pixels("pair")):
        seen = sum(_where(pixels, colour).any() for colour in COLOURS)
        assert seen == 2 - answer
        bars = ~_where(pixels, GROUND)
        for ends in (bars.any(0), bars.any(1)):  # whichever way they lie
            assert not ends[8:24].any() or ends[8:24].all()


def test_counts_are_equal_or_not():
    for pixels, answer in zip(*_pixels("counting")):
        first, second = (_where(pixels, COLOURS[i]).sum() // 25 for i in (0, 2))
        assert 8 <= first + second <= 12
        assert (first == second) == bool(answer) and (answer or abs(first - second) >= 4)


def test_textures_have_lines_of_one_colour():
    for pixels, answer in zip(*_pixels("texture")):
        red = _where(pixels, COLOURS[0])
        along = [red.mean(1 - axis).std() for axis in (0, 1)]  # of rows, of columns
        assert (along[0] > along[1]) == bool(answer)


def test_lines_join_the_dots_or_not():
    from scipy.ndimage import label

    for pixels, answer in zip(*_pixels("path")):
        dots = _where(pixels, COLOURS[0])
        parts, count = label(dots | _where(pixels, LINE), np.ones((3, 3)))
        assert count == 2 and label(dots, np.ones((3, 3)))[1] == 2
        assert (len(np.unique(parts[dots])) == 1) == bool(answer)


def test_the_source_has_both_splits_and_refuses_others():
    data = load_data("probe:pair")
    assert data.classes == ["different", "same"]
    assert (len(data.train.images), len(data.held_out.images)) == (TRAIN, HELD_OUT)
    with pytest.raises(ValueError, match=r"data='probe:pairs' is unknown.*pair.*allowed are"):
        load_data("probe:pairs")
    assert "probe" in recipe_names() and "probe:pair" in find_recipe("probe")[0]
