"""Digits drawn by strokes, none of them from MNIST: as they look on paper, on a screen, in a photo.

A skeleton is a few strokes in a box of width and height 1 (y down), each a smooth curve through its
points. A pen draws them, slanted, turned and with a hand's wobble, on paper of any kind.
"""

import numpy as np
from PIL import Image, ImageDraw

RING = [(0.5, 0.02), (0.2, 0.15), (0.1, 0.5), (0.22, 0.86), (0.5, 0.98), (0.8, 0.85), (0.9, 0.5)]
SKELETONS = {
    0: [[[*RING, (0.78, 0.14), (0.5, 0.02)]]],
    1: [
        [[(0.5, 0.0), (0.5, 0.5), (0.5, 1.0)]],
        [[(0.3, 0.22), (0.52, 0.0)], [(0.52, 0.0), (0.52, 1.0)]],
    ],
    2: [
        [
            [(0.12, 0.25), (0.3, 0.04), (0.65, 0.03), (0.84, 0.25), (0.65, 0.55), (0.1, 0.97)],
            [(0.1, 0.97), (0.9, 0.95)],
        ]
    ],
    3: [
        [
            [(0.15, 0.1), (0.5, 0.0), (0.8, 0.18), (0.65, 0.42), (0.38, 0.47)],
            [(0.38, 0.47), (0.75, 0.55), (0.85, 0.78), (0.5, 1.0), (0.12, 0.88)],
        ]
    ],
    4: [
        [[(0.3, 0.02), (0.12, 0.58)], [(0.12, 0.58), (0.92, 0.55)], [(0.72, 0.1), (0.68, 1.0)]],
        [[(0.7, 0.0), (0.1, 0.66)], [(0.1, 0.66), (0.92, 0.66)], [(0.7, 0.0), (0.7, 1.0)]],
    ],
    5: [
        [
            [(0.22, 0.03), (0.18, 0.45)],
            [(0.18, 0.45), (0.55, 0.37), (0.85, 0.62), (0.6, 0.96), (0.12, 0.92)],
            [(0.22, 0.03), (0.85, 0.02)],
        ]
    ],
    6: [
        [
            [
                *[(0.68, 0.0), (0.34, 0.25), (0.16, 0.65), (0.35, 0.97), (0.7, 0.92)],
                *[(0.82, 0.7), (0.6, 0.5), (0.3, 0.58), (0.18, 0.72)],
            ]
        ]
    ],
    7: [
        [[(0.1, 0.05), (0.9, 0.03)], [(0.9, 0.03), (0.6, 0.45), (0.42, 1.0)]],
        [
            *[[(0.1, 0.05), (0.9, 0.03)], [(0.9, 0.03), (0.6, 0.45), (0.42, 1.0)]],
            [(0.32, 0.52), (0.82, 0.5)],
        ],
    ],
    8: [
        [
            [
                *[(0.5, 0.47), (0.22, 0.26), (0.5, 0.01), (0.78, 0.24), (0.5, 0.47)],
                *[(0.16, 0.74), (0.5, 0.99), (0.84, 0.74), (0.5, 0.47)],
            ]
        ]
    ],
    9: [
        [
            [(0.8, 0.2), (0.5, 0.02), (0.2, 0.22), (0.42, 0.48), (0.75, 0.38), (0.82, 0.18)],
            [(0.82, 0.18), (0.78, 0.6), (0.66, 1.0)],
        ]
    ],
}
"""The usual ways to write each digit."""


def draw(
    digit: int,
    *,
    way: int = 0,
    height: int = 200,
    pen: float = 0.1,
    width: float = 0.62,
    slant: float = 0.1,
    turn: float = 0.0,
    wobble: float = 0.0,
    margin: float = 0.3,
    offset: tuple[float, float] = (0.0, 0.0),
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """How much of each pixel is ink, [h, w] in 0 ... 1; lengths are relative to the `height`.

    `turn` is in degrees; `offset` moves the digit off the middle, relative to the `margin`.
    """
    size = round(height * (1 + 2 * margin))
    scale = min(4, max(1, 4000 // size))  # drawn larger, then averaged: smooth edges
    image = Image.new("L", (size * scale, size * scale))
    pencil, radius = ImageDraw.Draw(image), pen * height * scale / 2
    cos, sin = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    strokes = SKELETONS[digit][way % len(SKELETONS[digit])]
    # strokes that meet still meet: a wobble is of the place, not of the stroke
    wobbles = {p: rng.normal(0, wobble, 2) if wobble else (0, 0) for s in strokes for p in s}
    for stroke in strokes:
        points = smooth(np.array([np.add(p, wobbles[p]) for p in stroke])) - 0.5
        points[:, 0] = points[:, 0] * width - slant * points[:, 1]
        points = points @ np.array([[cos, sin], [-sin, cos]])
        points = (points * height + size / 2 + margin * height * np.array(offset)) * scale
        pencil.line([tuple(p) for p in points], fill=255, width=max(1, round(2 * radius)))
        for x, y in points:
            pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.asarray(image.reduce(scale), float) / 255


def smooth(points: np.ndarray) -> np.ndarray:
    """A Catmull-Rom spline through [n, 2] points."""
    p = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, 24)[:, None]
    pieces = [
        b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
    ]
    return np.concatenate(pieces)


def on_paper(
    ink: np.ndarray,
    *,
    colour: tuple[int, ...] = (30, 30, 40),
    paper: tuple[int, ...] = (245, 243, 235),
    shade: float = 0.0,
    edge: float = 0.0,
    grain: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Image.Image:
    """An RGB picture of `ink`: light falls off by `shade` across it, a shadow of darkness `edge`
    with a soft edge lies over a part of it, and paper and camera add noise of SD `grain` (0 ... 1).
    """
    h, w = ink.shape
    y, x = np.mgrid[0:h, 0:w] / max(h, w)
    light = 1 - shade * (0.7 * x + 0.3 * y)
    light *= 1 - edge / (1 + np.exp(-(0.8 * x + y - 0.8) / 0.02))
    picture = np.array(paper) * (1 - ink[..., None]) + np.array(colour) * ink[..., None]
    picture = picture * light[..., None]
    if grain:
        coarse = np.kron(rng.normal(0, grain, (h // 4 + 1, w // 4 + 1)), np.ones((4, 4)))[:h, :w]
        picture += 255 * (rng.normal(0, grain, (h, w)) + coarse)[..., None] / 2**0.5
    return Image.fromarray(picture.clip(0, 255).round().astype(np.uint8))


def cases():
    """Every digit in each of its usual ways, in pens, hands and lights of all kinds."""
    rng = np.random.default_rng(0)
    for digit, ways in SKELETONS.items():
        for way in range(len(ways)):
            for height in (60, 200, 500):
                ink = draw(
                    digit,
                    way=way,
                    height=height,
                    pen=rng.uniform(0.05, 0.14),
                    slant=rng.uniform(-0.1, 0.3),
                    wobble=0.02,
                    offset=tuple(rng.uniform(-1, 1, 2)),
                    rng=rng,
                )
                yield digit, ink, rng
