"""A procedural pigmented lesion: its outline and its pigment, both fixed in the lesion's own frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.floating]
Pattern = Literal["network", "globular", "homogeneous"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

TILE = 128  # texels of a noise tile along each side
EDGE = 0.7  # how far below one half the pigment's soft edge is where the mask ends, in logits
TILE_SPECTRA = ((2.6, 6.0), (3.0, 4.0), (1.6, 6.0))  # slope and cutoff of outline, slow colour and grain
TILE_SPAN = 5.0  # mean radii a tile covers: more than any lesion is wide


@dataclass(frozen=True, slots=True)
class Lesion:
    """All that stays the same between two pictures of one lesion; lengths in mean radii, densities in natural logs.

    `harmonics` (2, k): amplitude and phase of the outline's Fourier terms 2..k+1. `tiles` (3, TILE, TILE):
    unit-variance noise for the outline, the slow colour and the fine grain. `globules` (g, 4): x, y, radius,
    strength.
    """

    pattern: Pattern
    radius: float
    elongation: float
    harmonics: Floats
    roughness: float
    softness: float
    melanin: float
    blood: float
    veil: float
    unevenness: float
    regression: float
    spacing: float
    relief: float
    globules: Floats
    tiles: Floats


@dataclass(frozen=True, slots=True)
class Pigment:
    """What a lesion adds to the skin: densities `melanin`, `blood` and `veil` (h, w), and the exact `mask` (h, w)."""

    melanin: Floats
    blood: Floats
    veil: Floats
    mask: NDArray[np.bool_]


def spectral_noise(rng: np.random.Generator, shape: tuple[int, int], slope: float, cutoff: float = 1.0) -> Floats:
    """Return periodic noise (h, w) of zero mean and unit variance whose amplitude falls as 1 / (cutoff + cycles)^slope.

    `cutoff` counts cycles along the short side; below it the spectrum is flat, so a large one makes small blobs.
    """
    white = rng.standard_normal(shape, dtype=np.float32)
    short = min(shape)
    rows = np.fft.fftfreq(shape[0]).astype(np.float32)[:, None] * short
    columns = np.fft.rfftfreq(shape[1]).astype(np.float32)[None] * short
    spectrum = np.fft.rfft2(white) / (cutoff**2 + rows**2 + columns**2) ** (slope / 2)
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, s=shape).astype(np.float32)
    return noise / max(float(noise.std()), 1e-6)


def random_lesion(rng: np.random.Generator) -> Lesion:
    """Draw a lesion; one in four is faint, one in six has partly lost its pigment (regression)."""
    pattern = PATTERNS[int(rng.choice(3, p=[0.4, 0.3, 0.3]))]
    faint = rng.random() < 0.28
    num_harmonics = 7
    irregularity = rng.uniform(0.03, 0.3)
    order = np.arange(2, 2 + num_harmonics)
    amplitudes = irregularity * rng.uniform(0.2, 1, num_harmonics) / (order - 1) ** 1.1
    phases = rng.uniform(0, 2 * np.pi, num_harmonics)
    melanin = rng.uniform(0.22, 0.5) if faint else rng.uniform(0.6, 1.9)
    return Lesion(
        pattern=pattern,
        radius=float(np.clip(rng.lognormal(np.log(0.27), 0.38), 0.11, 0.52)),
        elongation=float(rng.uniform(1, 1.7)),
        harmonics=np.stack([amplitudes, phases]).astype(np.float32),
        roughness=float(rng.uniform(0.02, 0.11)),
        softness=float(rng.uniform(0.05, 0.3)),
        melanin=float(melanin),
        blood=float(rng.uniform(-0.05, 0.45)),
        veil=float(rng.uniform(0.2, 0.7) * (rng.random() < 0.25 and not faint)),
        unevenness=float(rng.uniform(0.15, 0.5)),
        regression=float(rng.uniform(0.5, 0.95) * (rng.random() < 0.17)),
        spacing=float(rng.uniform(0.085, 0.15)),
        relief=float(rng.uniform(0.25, 0.5)),
        globules=_random_globules(rng, pattern),
        tiles=np.stack([spectral_noise(rng, (TILE, TILE), *spectrum) for spectrum in TILE_SPECTRA]),
    )


def _random_globules(rng: np.random.Generator, pattern: Pattern) -> Floats:
    count = int(rng.integers(25, 80)) if pattern == "globular" else int(rng.integers(0, 6))
    distance = np.sqrt(rng.uniform(0, 1.1, count))
    angle = rng.uniform(0, 2 * np.pi, count)
    radius = rng.uniform(0.04, 0.09, count)
    strength = rng.uniform(0.6, 1.6, count)
    return np.stack([distance * np.cos(angle), distance * np.sin(angle), radius, strength], 1).astype(np.float32)


def coordinates(view: Floats, size: tuple[int, int]) -> tuple[Floats, Floats]:
    """Return the lesion coordinates x, y (h, w) of each pixel; `view` (2, 3) maps (column, row, 1) to (x, y)."""
    rows = np.arange(size[0], dtype=np.float32)[:, None]
    columns = np.arange(size[1], dtype=np.float32)[None]
    x, y = (across * columns + down * rows + shift for across, down, shift in view)
    return x, y


def sample_tile(tile: Floats, view: Floats, size: tuple[int, int]) -> Floats:
    """Return the tile (TILE, TILE), centred on the lesion, as seen in a view (h, w): bilinear, 0 beyond its border."""
    scaled = view.astype(np.float64) * (TILE / TILE_SPAN)
    offset = TILE / 2 - 0.5 * (scaled[:, 0] + scaled[:, 1])  # Pillow counts pixels from their corners
    affine = np.column_stack([scaled[:, :2], scaled[:, 2] + offset]).ravel()
    seen = Image.fromarray(tile).transform(size[::-1], Image.Transform.AFFINE, tuple(affine), Image.Resampling.BILINEAR)
    return np.asarray(seen)


def pigment(lesion: Lesion, view: Floats, size: tuple[int, int]) -> Pigment:
    """Return the pigment that a view (2, 3) of the lesion shows (see `coordinates`).

    The mask is where the outline's level function is positive, which is where the pigment's soft edge reaches a third
    of its full density (readers outline the faint skirt too): exact by construction, whatever is drawn over it later.
    """
    x, y = coordinates(view, size)
    outline, slow, grain = (sample_tile(tile, view, size) for tile in lesion.tiles)
    level = _level(lesion, x, y) + lesion.roughness * outline
    cover = _logistic(level * (4 / lesion.softness) - EDGE)
    density = lesion.melanin * np.exp(lesion.unevenness * slow)
    density *= 1 + lesion.relief * (0.25 * grain + _relief(lesion, view, x, y, slow))
    if lesion.regression:
        density *= 1 - lesion.regression * _logistic(4 * (slow - 0.6))
    return Pigment(
        melanin=(cover * np.maximum(density, 0.4 * lesion.melanin * (1 - lesion.regression))).astype(np.float32),
        blood=(cover * lesion.blood * (1 - 0.4 * slow)).astype(np.float32),
        veil=(cover * lesion.veil * np.clip(slow, 0, 1.5)).astype(np.float32),
        mask=level > 0,
    )


def _logistic(x: Floats) -> Floats:
    return 1 / (1 + np.exp(np.clip(-x, -30, 30)))


def _level(lesion: Lesion, x: Floats, y: Floats) -> Floats:
    """Return how far inside the smooth outline each point lies along its ray, in mean radii; negative outside."""
    stretch = lesion.elongation**0.5
    across, along = x / stretch, y * stretch
    angles = np.linspace(-np.pi, np.pi, 513, dtype=np.float32)
    amplitudes, phases = lesion.harmonics
    orders = np.arange(2, 2 + len(amplitudes), dtype=np.float32)
    outline = 1 + (amplitudes * np.cos(orders * angles[:, None] + phases)).sum(1)
    turn = ((np.arctan2(along, across) + np.pi) * (512 / (2 * np.pi))).astype(np.int64)
    return np.maximum(outline, 0.3)[turn] - np.hypot(across, along)


def _relief(lesion: Lesion, view: Floats, x: Floats, y: Floats, slow: Floats) -> Floats:
    """Return the pattern (h, w), about -1..1: a warped honeycomb, or globules on plain ground."""
    if lesion.pattern == "network":
        warp = [sample_tile(np.roll(lesion.tiles[0], 41, axis), view, x.shape) for axis in (0, 1)]
        return np.clip(0.7 + 0.4 * slow, 0.15, 1.2) * _honeycomb(lesion.spacing, x, y, warp)
    return _globular(lesion.globules, view, x, y)


def _honeycomb(spacing: float, x: Floats, y: Floats, warp: list[Floats]) -> Floats:
    """Return dark lines (1) around pale holes (-1): three plane waves 60 degrees apart, bent by noise (h, w)."""
    wave = 2 * np.pi / spacing
    x, y = wave * (x + 0.3 * spacing * warp[0]), wave * (y + 0.3 * spacing * warp[1])
    half, third = 0.5 * x, np.float32(3**0.5 / 2) * y
    holes = np.cos(x) + np.cos(half + third) + np.cos(half - third)
    return np.clip(0.3 - 0.75 * holes, -1, 1)


def _globular(globules: Floats, view: Floats, x: Floats, y: Floats) -> Floats:
    """Return round dark spots on a ground of zeros; only the pixels near each spot are visited."""
    relief = np.zeros_like(x)
    inverse = np.linalg.inv(view[:, :2])
    pixels_per_radius = float(np.sqrt(abs(np.linalg.det(inverse))))
    for gx, gy, radius, strength in globules:
        column, row = inverse @ (np.array([gx, gy]) - view[:, 2])
        reach = 1.6 * radius * pixels_per_radius + 2
        rows = slice(max(int(row - reach), 0), max(int(row + reach) + 1, 0))
        columns = slice(max(int(column - reach), 0), max(int(column + reach) + 1, 0))
        squared = (x[rows, columns] - gx) ** 2 + (y[rows, columns] - gy) ** 2
        relief[rows, columns] += strength * np.exp(-((squared / radius**2) ** 2))
    return relief
