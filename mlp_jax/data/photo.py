"""A photo or drawing of a digit converted to MNIST's format: 28x28, white on black.

demo.html repeats `to_mnist` in JavaScript, to the same pixels, so it uses only sums over areas and
maxima, written out here.
"""

import contextlib
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from mlp_jax.errors import UserError, one_line

LONGEST = 640
"""Pixels to which a photo's longer side is reduced: a pen's line is still several wide."""
CONTRAST = 0.1
"""Least difference between ink and paper; between black and white it is 1."""
BOX = 20
"""Pixels of a digit's longer side in MNIST, whose images have 28."""
FINE = 4
"""Subdivisions of such a pixel, in which line widths are measured and changed."""
LINE = 2.1
"""Median line width of MNIST's images, in pixels: thinner lines are widened."""
MOST_EDGES = 12
"""Edges of ink along a picture's border: a digit that is cut off has few, ruled paper many."""
NEAR = 0.15
"""Greatest distance of a stroke from the rest of its digit, as a part of the digit's height."""
MARGIN = 2
"""Pixels around the box into which lines may widen: more than half of LINE."""


def read_digit(path: Path) -> np.ndarray:
    """The digit in an image file (of an animation, its first frame) as uint8 [28, 28].

    UserError if the file is not a readable image, or has no digit.
    """
    try:
        return to_mnist(find_ink(read_grey(path)))
    except UserError as error:
        raise UserError(f"{path} {error}") from None


def read_grey(path: Path) -> np.ndarray:
    """Luminance [h, w] in 0 ... 1 of an image file, upright, reduced to LONGEST."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    try:
        # warnings of odd metadata, and of half of Pillow's size limit
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            image.draft("RGB", (LONGEST, LONGEST))  # a JPEG is decoded at a fraction of its size
            upright = make_grey(ImageOps.exif_transpose(image))
            small = upright.reduce(-(-max(upright.size) // LONGEST))
    except Image.DecompressionBombError:
        raise UserError("has too many pixels to be read: make it smaller") from None
    except OSError as error:
        reason = error.strerror or "not an image that Pillow knows, or truncated"
        if path.suffix.lower() in (".heic", ".heif"):
            reason += "; HEIC needs pip install pillow-heif"
        raise UserError(f"cannot be read: {reason}") from None
    except Exception as error:  # each of Pillow's decoders raises its own
        raise UserError(f"cannot be read: {one_line(error)}") from None
    grey = np.nan_to_num(np.asarray(small, float))
    return grey / (255 if small.mode == "L" else grey.max() or 1)


def make_grey(image: Image.Image) -> Image.Image:
    """Luminance in 8 bits, or in float if `image` has more; transparency shows paper.

    The paper is white, unless the ink is bright.
    """
    if image.mode.startswith(("I", "F")):
        return image.convert("F")
    if not ("A" in image.getbands() or "transparency" in image.info):
        return find_contrast(image)
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema()[0] == 255:  # opaque
        return find_contrast(image.convert("RGB"))
    grey, alpha = image.convert("L"), image.getchannel("A")
    shown = np.asarray(alpha, float)
    bright = (np.asarray(grey) * shown).sum() > 128 * shown.sum()
    return Image.composite(grey, Image.new("L", grey.size, 0 if bright else 255), alpha)


def find_contrast(image: Image.Image) -> Image.Image:
    """Luminance, or red, green or blue if that varies more than twice as much."""
    bands = [image.convert("L"), *image.convert("RGB").split()]
    spreads = [np.std(np.asarray(band)) for band in bands]
    most = int(np.argmax(spreads))
    return bands[most if spreads[most] > 2 * spreads[0] else 0]


def find_ink(grey: np.ndarray) -> np.ndarray:
    """How much of each pixel is ink, [h, w] in 0 ... 1; `grey` is luminance.

    UserError if there is none.
    """
    grey, cut = find_sheet(grey)
    sides = (grey[0], grey[-1], grey[:, 0], grey[:, -1])
    if cut and all(np.ptp(side) == 0 for side in sides):
        ink = np.abs(grey - grey[0, 0])  # drawn, not photographed: used unchanged
        if ink.max() < CONTRAST:
            raise UserError("shows no digit")
        return ink / ink.max()
    # light and shadows are wider than a line
    grey = ndimage.gaussian_filter(-grey if ink_is_dark(grey) else grey, 1)
    ink = ndimage.white_tophat(grey, max(3, max(grey.shape) // 4))
    ink -= np.median(ink)
    noise = 1.5 * np.median(np.abs(ink))  # the SD of normal noise
    least = max(CONTRAST, 8 * noise, 0.4 * ink.max())
    if ink.max() < least:
        raise UserError("shows no digit")
    strength = np.median(ink[ink >= least])
    return keep_digit(np.clip(2 * ink / strength - 0.5, 0, 1), cut)


def find_sheet(grey: np.ndarray) -> tuple[np.ndarray, bool]:
    """`grey`, and whether the picture may have cut off the digit.

    Not if it shows a bright sheet on something darker, which is then made paper.
    """
    side = max(grey.shape)
    blank = ndimage.grey_closing(grey, max(3, side // 8))  # without dark lines
    dark, bright = np.percentile(blank, (5, 95))
    parts, _ = ndimage.label(blank > (dark + bright) / 2)
    wide = ndimage.grey_opening(np.uint8(parts > 0), max(3, side // 3)) * parts
    sheet = parts == np.bincount(wide[wide > 0], minlength=1).argmax()
    border = np.concatenate([sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]])
    filled = np.count_nonzero(wide[sheet]) / sheet.sum()  # unlike a digit in chalk
    if bright - dark < 3 * CONTRAST or border.mean() > 0.3 or filled < 0.75:
        return grey, True
    inside = ndimage.minimum_filter(sheet & (wide > 0), max(3, side // 40))  # off its edge
    nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    return np.where(inside, grey, blank[tuple(nearest)]), False


def ink_is_dark(grey: np.ndarray) -> bool:
    """Whether ink is darker than the paper around it, which is the local median."""
    step = -(-max(grey.shape) // 64)
    small = ndimage.uniform_filter(grey, step)[::step, ::step]
    return ((small - ndimage.median_filter(small, 33)) ** 3).sum() < 0


def keep_digit(ink: np.ndarray, cut: bool) -> np.ndarray:
    """`ink` without specks, what touches the border, frames, and what is far from the digit.

    If the picture may have `cut` off the digit, it may touch the border where nothing else is left.
    UserError if there is no digit.
    """
    parts, _ = ndimage.label(ink >= 0.5, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0  # paper
    boxes = [None, *ndimage.find_objects(parts)]
    large = np.flatnonzero(sizes >= sizes.max() / 20).tolist()
    border = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    outer = [k for k in large if k in border or is_frame(k, boxes, sizes)]
    if len(outer) < len(large):
        sizes[outer] = 0
    elif not cut or np.count_nonzero(np.diff(border > 0)) > MOST_EDGES:
        raise UserError("shows no digit")
    main = sizes.argmax()
    far = NEAR * max(side.stop - side.start for side in boxes[main])
    near = ndimage.distance_transform_edt(parts != main) <= far
    kept = np.isin(parts, np.intersect1d(parts[near], np.flatnonzero(sizes >= sizes[main] / 20)))
    return np.where(ndimage.binary_dilation(kept, np.ones((3, 3)), 3), ink, 0)  # with soft edges


def is_frame(part: int, boxes: list, sizes: np.ndarray) -> bool:
    """Whether a part surrounds another that has a fifth of its ink, or more."""
    return any(
        all(a.start < b.start and a.stop > b.stop for a, b in zip(boxes[part], box, strict=True))
        for box, size in zip(boxes[1:], sizes[1:], strict=True)
        if size >= sizes[part] / 5
    )


def to_mnist(ink: np.ndarray) -> np.ndarray:
    """`ink` in MNIST's format, uint8 [28, 28] (LeCun et al. 1998): scaled into 20x20 pixels by area
    averages, with its centre of mass in the middle.

    Lines thinner than MNIST's are widened first.
    """
    top, left, bottom, right = bounds(ink)
    cell = max(bottom - top, right - left) / (BOX * FINE)
    n = (BOX + 2 * MARGIN) * FINE
    ink = average(ink, (top + bottom - cell * n) / 2, (left + right - cell * n) / 2, cell, n)
    ink = widen(ink, max(0.0, (LINE * FINE - line_width(ink)) / 2))
    top, left, bottom, right = bounds(ink)
    cell = max(bottom - top, right - left) / BOX
    y, x = ((np.arange(n) + 0.5) @ ink.sum(axis) / ink.sum() for axis in (1, 0))
    # MNIST's images were moved by whole pixels: the centre of mass lies between 14 and 15
    y, x = y - 14.5 * cell, x - 14.5 * cell
    y, x = np.clip(y, bottom - 28 * cell, top), np.clip(x, right - 28 * cell, left)
    ink = average(ink, y, x, cell, 28)
    # ties of rounding go up, in JavaScript as well
    return np.floor(255 * ink / ink.max() + 0.5 + 1e-9).astype(np.uint8)


def bounds(ink: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the ink without its faint edges."""
    there = ink > ink.max() / 4 + 1e-9
    rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def average(ink: np.ndarray, top: float, left: float, cell: float, n: int) -> np.ndarray:
    """Means over n x n squares with sides of `cell` pixels, starting at (top, left)."""

    def shares(start: float, size: int) -> np.ndarray:
        low = start + cell * np.arange(n)[:, None]
        pixel = np.arange(size)[None]
        return np.clip(np.minimum(low + cell, pixel + 1) - np.maximum(low, pixel), 0, None) / cell

    return shares(top, ink.shape[0]) @ ink @ shares(left, ink.shape[1]).T


def line_width(ink: np.ndarray) -> float:
    """Mean width of the lines in pixels: twice their area over the length of their edges."""
    down, right = np.diff(ink, axis=0)[:, :-1], np.diff(ink, axis=1)[:-1]
    return 2 * ink.sum() / np.sqrt(down**2 + right**2).sum()


def widen(ink: np.ndarray, radius: float) -> np.ndarray:
    """Each pixel becomes the maximum within `radius`, which may be fractional."""
    reach, n = int(np.ceil(radius)), len(ink)
    padded, wide = np.pad(ink, reach), ink
    for y, x in np.ndindex(2 * reach + 1, 2 * reach + 1):
        weight = min(radius + 1 - np.hypot(y - reach, x - reach), 1)
        if weight > 0:
            wide = np.maximum(wide, weight * padded[y : y + n, x : x + n])
    return wide
