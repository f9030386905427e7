"""Many points as one small image, which a browser redraws far more quickly than a thousand circles."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

SIZE = (360, 480)  # rows, columns: 1.5 times the pixels that the picture has on a usual screen


def disc(radius: float) -> np.ndarray:
    """Coverage in 0..1 of a round dot, with a soft edge."""
    reach = np.arange(-int(radius) - 1, int(radius) + 2)
    return np.clip(radius + 0.5 - np.hypot(reach[:, None], reach), 0, 1)


def diamond(radius: float) -> np.ndarray:
    """As `disc`, but a square standing on its corner."""
    reach = np.arange(-int(radius) - 1, int(radius) + 2)
    return np.clip(radius + 0.5 - np.abs(reach[:, None]) - np.abs(reach), 0, 1)


def stamp(image: np.ndarray, at: np.ndarray, colour: np.ndarray, shape: np.ndarray) -> None:
    """Draws `shape` into `image (rows, columns, 3)` float32 at the pixels `at (n, 2)`, each in its `colour (n, 4)`.

    Where dots overlap, the later one covers the earlier one; its colour mixes with the image below only.
    """
    half, (rows, columns) = shape.shape[0] // 2, image.shape[:2]
    row, column = np.nonzero(shape)
    order = np.argsort(shape[row, column])  # edges first, so that no edge covers the middle of a neighbour
    row, column = row[order], column[order]
    y = at[:, 0] + (row - half)[:, None]  # (pixels of the shape, dots)
    x = at[:, 1] + (column - half)[:, None]
    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    last = np.full(rows * columns, -1, np.int32)  # the number of the pair (pixel of the shape, dot) that is on top
    last[(y * columns + x)[inside]] = np.flatnonzero(inside)
    part, dot = np.divmod(last[last >= 0], len(at))
    alpha = (colour[dot, 3] * shape[row[part], column[part]])[:, None]
    hit = (last >= 0).reshape(rows, columns)
    image[hit] += (colour[dot, :3] - image[hit]) * alpha


def data_uri(image: np.ndarray) -> str:
    """`image (rows, columns, 3)` in 0..1 as a PNG in a data URI."""
    rows, columns = image.shape[:2]
    lines = np.zeros((rows, 1 + columns * 3), np.uint8)  # each line starts with its filter, 0 for none
    lines[:, 1:] = np.rint(image * 255).reshape(rows, -1)
    header = struct.pack(">2I5B", columns, rows, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 1)), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def key_picture(
    keys: np.ndarray, colours: np.ndarray, prototypes: np.ndarray, low: np.ndarray, high: np.ndarray
) -> str:
    """Dots at `keys (T, 2)` in `colours (T, 3)` and diamonds at `prototypes (C, 2)`; the image spans `low`..`high`."""
    image = np.ones((*SIZE, 3), np.float32)

    def pixels(points: np.ndarray) -> np.ndarray:
        share = (points - low) / (high - low)
        return np.rint(np.stack([1 - share[:, 1], share[:, 0]], 1) * (np.array(SIZE) - 1)).astype(int)

    faint = np.concatenate([colours, np.full((len(colours), 1), 0.5)], 1)
    stamp(image, pixels(keys), faint, disc(3.8))
    at = pixels(prototypes)
    for radius, shade in ((9, 0.1), (7, 1.0)):
        stamp(image, at, np.tile([shade, shade, shade, 1.0], (len(at), 1)), diamond(radius))
    return data_uri(image)
