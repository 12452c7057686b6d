"""Photos and drawings of digits in MNIST's form: any pen, paper and light."""

from pathlib import Path

import drawings
import numpy as np
import pytest
from PIL import ImageOps
from scipy import ndimage

from mlp_jax.data.photo import find_ink, read_digit, to_mnist
from mlp_jax.errors import UserError
from mlp_jax.records.checkpoint import predict


def test_drawings_are_read(committee):
    """On white or coloured paper, by pen, chalk or light, under shadows and grain."""
    digits, images = [], []
    for digit, ink, rng in drawings.cases():
        chalk = {"colour": (240, 240, 230), "paper": (25, 60, 45)}
        blue = {"colour": (40, 60, 160), "paper": (250, 240, 170)}
        light = {"shade": 0.5, "edge": 0.3, "grain": 0.03, "rng": rng}
        for look in ({}, chalk, light, blue | light):
            paper = drawings.on_paper(ink, **look).convert("L")
            images.append(to_mnist(find_ink(np.asarray(paper) / 255)))
            digits.append(digit)
    assert len(digits) == 13 * 3 * 4
    wrong = predict(committee, np.stack(images)).argmax(-1) != digits
    assert wrong.mean() <= 0.03


def test_colours_of_equal_luminance_are_told_apart(here, committee):
    looks = {"colour": (200, 30, 30), "paper": (30, 115, 40), "grain": 0.01}
    images = []
    for digit in range(10):
        rng = np.random.default_rng(digit)
        drawings.on_paper(drawings.draw(digit), rng=rng, **looks).save("red.jpg", quality=90)
        images.append(read_digit(Path("red.jpg")))
    assert (predict(committee, np.stack(images)).argmax(-1) == range(10)).mean() >= 0.97


def test_a_sheet_on_a_table_is_read(committee):
    """Paper on something darker, straight or turned, with or without grain."""
    digits, images = [], []
    for digit, ink, rng in drawings.cases():
        for turn, table, grain in ((0, (70, 50, 40), 0), (8, (60, 60, 70), 0.03)):
            paper = drawings.on_paper(ink, grain=grain, rng=rng)
            width = round(paper.width * rng.uniform(0.15, 0.5))
            photo = ImageOps.expand(paper, width, table).rotate(turn, fillcolor=table)
            noise = rng.normal(0, 255 * grain, (photo.height, photo.width))
            grey = np.asarray(photo.convert("L")) + noise
            images.append(to_mnist(find_ink(grey.clip(0, 255) / 255)))
            digits.append(digit)
    wrong = predict(committee, np.stack(images)).argmax(-1) != digits
    assert wrong.mean() <= 0.03


def photographed(ink, table=None, width=0.0, shade=0.3):
    """In a light that falls off, perhaps on a table with `width` of it around, relative to ink."""
    rng = np.random.default_rng(0)
    paper = drawings.on_paper(ink, shade=shade, grain=0.02, rng=rng)
    if table:
        paper = ImageOps.expand(paper, round(width * paper.width), table).rotate(8, fillcolor=table)
    return np.asarray(paper.convert("L")) / 255


def with_frame(ink):
    framed = ink.copy()
    n = len(ink) // 8
    for box in (np.s_[n : n + 5, n:-n], np.s_[-n - 5 : -n, n:-n]):
        framed[box] = framed.T[box] = 1
    return framed


def with_name(ink):
    """A line of writing in a corner."""
    named = ink.copy()
    for start in range(8, len(ink) // 2, 24):
        named[8:26, start : start + 6] = named[20:26, start : start + 15] = 1
    return named


def test_only_the_digit_is_read(committee):
    """Not a frame around it, nor writing beside it."""
    wrong = 0
    for digit in range(10):
        ink = drawings.draw(digit, margin=0.6)
        photos = [photographed(with_frame(ink)), photographed(with_name(ink))]
        images = np.stack([to_mnist(find_ink(photo)) for photo in photos])
        wrong += np.count_nonzero(predict(committee, images).argmax(-1) != digit)
    assert wrong <= 1


@pytest.mark.parametrize("kind", ["lined", "squared", "sheet"])
def test_paper_without_a_digit_is_blank(kind):
    ink = np.zeros((400, 400))
    if kind != "sheet":
        ink[30::45, :] = ink[31::45, :] = ink[32::45, :] = 0.7
    if kind == "squared":
        ink = np.maximum(ink, ink.T)
    photo = photographed(ink, (70, 50, 40) if kind == "sheet" else None, width=0.3)
    with pytest.raises(UserError, match="shows no digit"):
        find_ink(photo)


def test_it_has_mnists_form():
    """20 pixels of the longer side, its aspect kept; the centre of mass between 14 and 15."""
    for _, ink, _ in drawings.cases():
        image = to_mnist(ink)
        assert image.shape == (28, 28)
        assert image.dtype == np.uint8
        assert image.max() == 255
        there = image > 255 / 4
        height, width = (np.ptp(np.flatnonzero(there.any(axis))) + 1 for axis in (1, 0))
        assert 19 <= max(height, width) <= 21
        rows, columns = (np.flatnonzero((ink > 0.25).any(axis)) for axis in (1, 0))
        before = np.ptp(columns) / np.ptp(rows)
        assert width / height == pytest.approx(before, abs=0.12)  # thin lines were widened
        assert ndimage.center_of_mass(image) == pytest.approx((14, 14), abs=0.6)


@pytest.mark.network
def test_mnists_own_images_come_back(mnist, committee):
    """An MNIST image, enlarged and put on paper, is recognized as before."""
    images, labels = mnist.test.images[:500].reshape(-1, 28, 28), mnist.test.labels[:500]
    large = [np.kron(np.pad(image, 4), np.ones((9, 9))) / 255 for image in images]
    read = np.stack([to_mnist(find_ink(1 - image)) for image in large])
    right = (predict(committee, read).argmax(-1) == labels).mean()
    before = (predict(committee, images).argmax(-1) == labels).mean()
    assert right > before - 0.015
