"""A headless Chromium for tests, and what its screenshots hold."""

from __future__ import annotations

import shutil
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
SECONDS = 120


class Browser:
    """One page at a time, each in a profile of its own.

    Args:
        program: The browser's executable.
        folder: Where profiles and results go.
    """

    def __init__(self, program: str, folder: Path) -> None:
        self._program, self._folder, self._runs = program, folder, 0

    def dom(self, page: Path, *, width: int = 1280) -> str:
        """The document after it was laid out."""
        return self._run(page, width, 900, ["--dump-dom"])

    def pixels(self, page: Path, *, width: int, height: int, dark: bool = False) -> npt.NDArray[np.uint8]:
        """A screenshot, [height, width, channels]."""
        target = self._folder / f"shot-{self._runs}.png"
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        self._run(page, width, height, [f"--screenshot={target}", scheme])
        return read_png(target)

    def pdf(self, page: Path) -> bytes:
        """The page in print."""
        target = self._folder / f"print-{self._runs}.pdf"
        self._run(page, 1280, 900, [f"--print-to-pdf={target}", "--no-pdf-header-footer"])
        return target.read_bytes()

    def _run(self, page: Path, width: int, height: int, wanted: Sequence[str]) -> str:
        self._runs += 1
        profile = self._folder / f"profile-{self._runs}"
        done = subprocess.run(
            [
                self._program, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", *wanted,
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )  # fmt: skip
        shutil.rmtree(profile, ignore_errors=True)
        return done.stdout


def find_browser() -> str | None:
    """The first browser of the Chromium family on the path."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def read_png(path: Path) -> npt.NDArray[np.uint8]:
    """An image of 8 bits a channel, not interlaced: [height, width, channels]."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, packed, head = 8, b"", b""
    while place < len(data):
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + length]
        head, packed = (body if kind == b"IHDR" else head), packed + (body if kind == b"IDAT" else b"")
        place += length + 12
    width, height = int.from_bytes(head[:4]), int.from_bytes(head[4:8])
    channels = {2: 3, 6: 4}[head[9]]
    assert (head[8], head[12]) == (8, 0)
    lines = np.frombuffer(zlib.decompress(packed), dtype=np.uint8).reshape(height, 1 + width * channels)
    above = np.zeros((width, channels), dtype=np.uint8)
    image = np.empty((height, width, channels), dtype=np.uint8)
    for y, line in enumerate(lines):
        above = _unfilter(int(line[0]), line[1:].reshape(width, channels), above)
        image[y] = above
    return image


def _unfilter(kind: int, line: npt.NDArray[np.uint8], above: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """One line of a PNG without its filter (0 none, 1 left, 2 above, 3 mean, 4 Paeth)."""
    if kind == 0:
        return line
    if kind == 1:
        return np.cumsum(line, axis=0, dtype=np.uint8)
    if kind == 2:
        return line + above
    width, channels = line.shape
    raw, up = line.tolist(), above.tolist()
    left, corner = [0] * channels, [0] * channels
    done: list[list[int]] = []
    for x in range(width):
        pixel = []
        for c in range(channels):
            a, b, d = left[c], up[x][c], corner[c]
            guess = (a + b) // 2 if kind == 3 else _nearest(a, b, d)
            pixel.append((raw[x][c] + guess) % 256)
        done.append(pixel)
        left, corner = pixel, up[x]
    return np.array(done, dtype=np.uint8)


def _nearest(left: int, above: int, corner: int) -> int:
    """Paeth's predictor: which of the three is nearest to left + above - corner; the first of equals."""
    return min((left, above, corner), key=lambda value: abs(left + above - corner - value))
