"""What surrounds a synthetic lesion: the view, the skin, and the artefacts of dermoscopy drawn over both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from fewmask.data.synthetic_lesion import Floats, Lesion, Pigment, pigment, spectral_noise

# Absorption of red, green and blue light by one unit of pigment (our choice, after the shape of the published spectra:
# melanin absorbs the more the shorter the wave, blood absorbs green most; the veil is melanin seen through deep skin).
MELANIN = np.array([0.62, 1.02, 1.3], np.float32)
BLOOD = np.array([0.14, 0.95, 0.72], np.float32)
VEIL = np.array([0.95, 0.6, 0.25], np.float32)
BARE_SKIN = np.array([0.97, 0.92, 0.88], np.float32)
OVERSAMPLE = 2  # strokes are drawn this much larger and averaged down


@dataclass(frozen=True, slots=True)
class Skin:
    """What stays the same on one patient between two pictures: base pigment and how patchy and freckled the skin is."""

    melanin: float
    blood: float
    patchiness: float
    num_freckles: int


def random_skin(rng: np.random.Generator) -> Skin:
    """Draw a skin, fair to brown (melanin is drawn so that fair skin is the most frequent, as in public sets)."""
    return Skin(
        melanin=float(rng.beta(1.1, 3.0) * 0.8),
        blood=float(rng.uniform(0.02, 0.5)),
        patchiness=float(rng.uniform(0.008, 0.045)),
        num_freckles=int(rng.integers(1, 14) * (rng.random() < 0.45)),
    )


def picture(
    lesion: Lesion, skin: Skin, rng: np.random.Generator, size: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return one view of a lesion: image uint8 (h, w, 3) and its exact mask bool (h, w), never empty."""
    stain = pigment(lesion, _random_view(lesion, rng, size), size)
    light = _skin_colour(skin, stain, rng, size)
    _draw_strokes(light, rng)
    if rng.random() < 0.3:
        _draw_bubbles(light, rng)
    light *= _illumination(rng, size)[..., None]
    light *= (rng.uniform(0.95, 1.2) * rng.uniform([0.93, 0.93, 0.9], [1.07, 1.04, 1.16])).astype(np.float32)
    light = ndimage.gaussian_filter(light, (*[float(rng.uniform(0.3, 0.9)) * min(size) / 192] * 2, 0), truncate=3)
    light += rng.uniform(0.006, 0.02) * rng.standard_normal(light.shape, dtype=np.float32)
    return (np.clip(light, 0, 1) * 255 + 0.5).astype(np.uint8), stain.mask


def _random_view(lesion: Lesion, rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    """Return the map (2, 3) from (column, row, 1) to lesion coordinates: turned, mirrored, scaled, not far off."""
    radius = lesion.radius * rng.uniform(0.85, 1.15) * min(size)
    angle = rng.uniform(0, 2 * np.pi)
    spread = np.array([0.18, 0.15]) * np.clip(rng.normal(0, 0.5, 2), -1, 1)
    centre = np.array(size[::-1]) * (0.5 + spread)
    mirror = rng.choice([-1, 1])
    cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
    turn = np.array([[mirror * cos, mirror * sin], [-sin, cos]])
    return np.column_stack([turn, -turn @ centre]).astype(np.float32)


def _skin_colour(skin: Skin, stain: Pigment, rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    """Return the light (h, w, 3) that skin and lesion send back, by Beer and Lambert's law."""
    patches = spectral_noise(rng, size, 2.4, 5)
    furrows = spectral_noise(rng, size, 1.2, 25)
    melanin = skin.melanin + skin.patchiness * (1.2 * patches + 0.8 * furrows) + stain.melanin
    blood = skin.blood * (1 + 0.12 * patches) + stain.blood
    _add_freckles(melanin, skin, rng)
    absorbed = melanin[..., None] * MELANIN + blood[..., None] * BLOOD + stain.veil[..., None] * VEIL
    light: Floats = BARE_SKIN * np.exp(-absorbed)
    return light


def _add_freckles(melanin: Floats, skin: Skin, rng: np.random.Generator) -> None:
    """Add faint spots that belong to the skin and not to the mask, in place."""
    height, width = melanin.shape
    for _ in range(skin.num_freckles):
        row, column = rng.uniform(0, height), rng.uniform(0, width)
        radius = rng.uniform(0.012, 0.045) * min(height, width)
        strength = rng.uniform(0.08, 0.3)
        rows = slice(max(int(row - 3 * radius), 0), int(row + 3 * radius) + 2)
        columns = slice(max(int(column - 3 * radius), 0), int(column + 3 * radius) + 2)
        y, x = np.ogrid[rows, columns]
        y, x = y[: height - rows.start], x[:, : width - columns.start]
        spot = np.exp(-((((y - row) ** 2 + (x - column) ** 2) / radius**2) ** 1.5))
        melanin[rows, columns] += (strength * spot).astype(np.float32)


def _draw_strokes(light: Floats, rng: np.random.Generator) -> None:
    """Draw hair and, at times, a ruler's ticks over skin and lesion, in place; each kind has one colour a picture."""
    height, width = light.shape[:2]
    kinds = []
    if rng.random() < 0.6:
        dark = rng.random() < 0.8
        colour = rng.uniform([0.05, 0.03, 0.02], [0.26, 0.18, 0.14]) if dark else rng.uniform(0.55, 0.8, 3)
        kinds.append((_hair, colour, rng.uniform(0.55, 0.95)))
    if rng.random() < 0.15:
        kinds.append((_ruler, rng.uniform(0.08, 0.25, 3), rng.uniform(0.5, 0.85)))
    for draw, colour, opacity in kinds:
        canvas = Image.new("L", (width * OVERSAMPLE, height * OVERSAMPLE))
        draw(ImageDraw.Draw(canvas), canvas.size, rng)
        cover = np.asarray(canvas.reduce(OVERSAMPLE), np.float32)[..., None] * np.float32(opacity / 255)
        light += cover * (colour.astype(np.float32) - light)


def _hair(draw: ImageDraw.ImageDraw, size: tuple[int, int], rng: np.random.Generator) -> None:
    """Draw curved tapering hairs that lie roughly one way; few on most pictures, a thicket on some."""
    width, height = size
    short = min(size)
    lie = rng.uniform(0, np.pi)
    steps = np.linspace(0, 1, 14)[:, None]
    for _ in range(int(np.clip(rng.lognormal(1.9, 0.9), 1, 45))):
        angle = rng.normal(lie, 0.5)
        start = rng.uniform([-0.1 * width, -0.1 * height], [1.1 * width, 1.1 * height])
        chord = short * rng.uniform(0.25, 1.1) * np.array([np.cos(angle), np.sin(angle)])
        bend = start + chord / 2 + chord[::-1] * np.array([-1, 1]) * rng.normal(0, 0.18)
        points = (1 - steps) ** 2 * start + 2 * steps * (1 - steps) * bend + steps**2 * (start + chord)
        thick = short * rng.uniform(0.005, 0.012)
        for step in range(len(points) - 1):
            taper = 1 - 0.7 * step / len(points)
            draw.line([tuple(points[step]), tuple(points[step + 1])], 255, max(1, round(thick * taper)))


def _ruler(draw: ImageDraw.ImageDraw, size: tuple[int, int], rng: np.random.Generator) -> None:
    """Draw a ruler's ticks along the lower or upper border, every fifth longer."""
    width, height = size
    spacing = rng.uniform(0.035, 0.07) * width
    base = rng.choice([0.04, 0.96]) * height
    inward = 1 if base < height / 2 else -1
    tilt = rng.normal(0, 0.02)
    thick = max(1, round(0.006 * min(size)))
    for tick in range(int(width / spacing) + 1):
        x = tick * spacing
        y = base + tilt * x
        length = (0.075 if tick % 5 == 0 else 0.045) * height
        draw.line([(x, y), (x - tilt * length, y + inward * length)], 255, thick)


def _draw_bubbles(light: Floats, rng: np.random.Generator) -> None:
    """Draw bubbles of the immersion gel, in place: a bright rim, a dark ring inside it and a highlight."""
    height, width = light.shape[:2]
    for _ in range(int(rng.integers(1, 9))):
        radius = rng.uniform(0.012, 0.06) * min(height, width)
        row, column = rng.uniform(0, height), rng.uniform(0, width)
        y, x = np.ogrid[
            max(int(row - 2 * radius), 0) : min(int(row + 2 * radius) + 2, height),
            max(int(column - 2 * radius), 0) : min(int(column + 2 * radius) + 2, width),
        ]
        distance = np.hypot(y - row, x - column) / radius
        rim = 0.28 * np.exp(-(((distance - 1) / 0.14) ** 2)) - 0.14 * np.exp(-(((distance - 0.75) / 0.14) ** 2))
        shine = 0.35 * np.exp(-((np.hypot(y - row + 0.4 * radius, x - column + 0.4 * radius) / (0.2 * radius)) ** 2))
        light[y[0, 0] : y[-1, 0] + 1, x[0, 0] : x[0, -1] + 1] += (rim + shine)[..., None].astype(np.float32)


def _illumination(rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    """Return the gain (h, w) of an uneven lamp, darker in the corners and, at times, black outside a round edge."""
    height, width = size
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * np.float32(height / width)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None]
    slope = rng.normal(0, 0.07, 2)
    distance = np.hypot(y - rng.normal(0, 0.05), x - rng.normal(0, 0.05))
    gain = 1 + slope[0] * y + slope[1] * x - rng.uniform(0, 0.28) * distance**2
    if rng.random() < 0.22:
        edge = rng.uniform(0.93, 1.12)
        gain = gain * (0.03 + 0.97 / (1 + np.exp(np.clip((distance - edge) / rng.uniform(0.008, 0.05), -30, 30))))
    return gain.astype(np.float32)
