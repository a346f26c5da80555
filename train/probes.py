"""Drawn tasks that tell token mixers apart by what they see: the source `probe:NAME`.

Every task is one question with two answers, each right for half of the images, so that guessing
gives 50%. The sum over positions of anything seen at one of them says nothing about the answer of
`pair` and `counting`: whoever knows it has compared what is far apart. Images are functions of the
task and their number; colours and places vary, so that nothing is known by where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from vitarium.train.config import nearest

SIZE = 32  # pixels
TRAIN, HELD_OUT = 2048, 512  # images
COLOURS = ((230, 60, 60), (60, 200, 80), (70, 110, 240), (235, 200, 50))
GROUND, LINE = (40, 40, 40), (200, 200, 200)

Place = tuple[int, int]
Random = np.random.Generator


class Probe(NamedTuple):
    """A task.

    Attributes:
        question: what is asked of an image.
        classes: the two answers, in natural order.
        draw: draws an image with the answer of this index.
    """

    question: str
    classes: tuple[str, str]
    draw: Callable[[Random, ImageDraw.ImageDraw, int], None]


def _texture(random: Random, canvas: ImageDraw.ImageDraw, answer: int) -> None:
    """Cells of 4 pixels in lines of one colour, one cell in ten of the other one."""
    lines = random.integers(2, size=9)
    cells = np.tile(lines[:, None], 9) ^ (random.random((9, 9)) < 0.1)
    left, top = random.integers(-3, 1, 2)
    for (row, column), cell in np.ndenumerate(cells if answer else cells.T):
        _square(canvas, left + 4 * column, top + 4 * row, 3, COLOURS[2 * int(cell)])


def _pair(random: Random, canvas: ImageDraw.ImageDraw, answer: int) -> None:
    """Two bars at opposite sides, of four colours."""
    first, second = random.permutation(len(COLOURS))[:2]
    turned = bool(random.integers(2))
    for start, colour in ((0, first), (SIZE - 7, first if answer else second)):
        x, y = start + int(random.integers(2)), int(random.integers(8))
        box = (x, y, x + 5, y + 23)
        canvas.rectangle((y, x, y + 23, x + 5) if turned else box, fill=COLOURS[colour])


def _counting(random: Random, canvas: ImageDraw.ImageDraw, answer: int) -> None:
    """8 to 12 squares of two colours: equally many, or 4 to 6 more of either."""
    half = int(random.integers(4, 7))
    more = half + (0 if answer else int(random.integers(2, 4)))
    colours = [COLOURS[0]] * more + [COLOURS[2]] * (2 * half - more)
    if random.integers(2):
        colours = [COLOURS[2] if colour == COLOURS[0] else COLOURS[0] for colour in colours]
    for place, colour in zip(random.permutation(16), colours):
        x, y = random.integers(1, 3, 2) + 8 * np.array(divmod(place, 4))
        _square(canvas, x, y, 5, colour)


def _path(random: Random, canvas: ImageDraw.ImageDraw, answer: int) -> None:
    """Two lines that do not touch, and two dots: at both ends of one, or at one end of each."""
    lines: list[list[Place]] = []
    while len(lines) < 2:
        free = np.ones((6, 6), bool)
        lines = [line for _ in range(2) if (line := _walk(random, free))]
    for line in lines:
        canvas.line([(3 + 5 * x, 3 + 5 * y) for x, y in line], fill=LINE, width=2)
    for x, y in (lines[0][0], lines[0][-1] if answer else lines[1][0]):
        _square(canvas, 1 + 5 * x, 1 + 5 * y, 4, COLOURS[0])


def _walk(random: Random, free: np.ndarray) -> list[Place]:
    """Four free places, each beside the one before it, mostly straight on; empty if it gets stuck.

    They are free no longer, nor is what they touch.
    """
    x, y = (int(v) for v in random.integers(0, len(free), 2))
    open_, walk, step = free.copy(), [], (0, 0)
    while open_[y, x]:
        walk.append((x, y))
        open_[y, x] = False
        if len(walk) == 4:
            for x, y in walk:
                free[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = False
            return walk
        inside = range(len(free))
        steps = [
            (i, j)
            for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))
            if x + i in inside and y + j in inside and open_[y + j, x + i]
        ]
        if not steps:
            break
        if step not in steps or random.random() < 0.4:
            step = steps[random.integers(len(steps))]
        x, y = x + step[0], y + step[1]
    return []


def _square(canvas: ImageDraw.ImageDraw, x: int, y: int, side: int, colour: tuple) -> None:
    canvas.rectangle((int(x), int(y), int(x) + side - 1, int(y) + side - 1), fill=colour)


PROBES = {
    "texture": Probe("do cells agree along rows or columns?", ("columns", "rows"), _texture),
    "pair": Probe("have two bars far apart one colour?", ("different", "same"), _pair),
    "counting": Probe("as many of one colour as of the other?", ("different", "equal"), _counting),
    "path": Probe("does a line join the dots?", ("apart", "joined"), _path),
}


def probe(name: str) -> Probe:
    """The task of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in PROBES:
        raise ValueError(
            f"data='probe:{name}' is unknown{nearest(name, PROBES)}; allowed are "
            f"{', '.join(PROBES)}"
        )
    return PROBES[name]


def drawn(name: str, count: int, split: int = 0) -> tuple[list[Image.Image], np.ndarray]:
    """Images of a task and the indices of their answers, the same in every call.

    Args:
        name: a key of `PROBES`.
        count: how many images; the first ones are the same whatever it is.
        split: other images for every number; 0 is trained on, 1 is held out.

    Returns:
        Images of `SIZE`, and int32 `(count,)`.
    """
    task = probe(name)
    images, answers = [], np.empty(count, np.int32)
    for number in range(count):
        random = np.random.default_rng((list(PROBES).index(name), split, number))
        answers[number] = random.integers(2)
        images.append(Image.new("RGB", (SIZE, SIZE), GROUND))
        task.draw(random, ImageDraw.Draw(images[-1]), int(answers[number]))
    return images, answers
