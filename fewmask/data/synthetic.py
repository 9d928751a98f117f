"""A made-up dermoscopy data set for the demonstration, the tests and the benchmarks.

The pictures are drawn, not learnt: nobody's photograph is in them. All constants are our choice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewmask.data.cache import num_cores
from fewmask.data.sources.layout import write_manifest, write_mask
from fewmask.data.synthetic_lesion import random_lesion
from fewmask.data.synthetic_scene import picture, random_skin
from fewmask.types import SPLITS, UserError

GENERATOR = 1  # part of the stamp: raise it when the same seed would draw other pictures
STAMP = "synthetic.json"
MIN_SIDE = 32


@dataclass(frozen=True, slots=True)
class _Shot:
    """The place of one picture in the set: which lesion it shows, which view of it, and what the manifest says."""

    index: int
    lesion: int
    view: int
    labelled: bool
    split: str

    @property
    def name(self) -> str:
        return f"synthetic_{self.index:05d}"


def render(rng: np.random.Generator, size: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return a picture of a random lesion, uint8 (h, w, 3), and its exact mask, bool (h, w), for `size` (h, w)."""
    lesion, skin = random_lesion(rng), random_skin(rng)
    return picture(lesion, skin, rng, size)


def make_dataset(
    out: Path,
    num_labelled: int,
    num_unlabelled: int,
    size: tuple[int, int] = (192, 256),
    seed: int = 0,
    workers: int | None = None,
    fractions: tuple[float, float, float] | None = None,
) -> Path:
    """Write images/*.jpg, masks/*.png and manifest.csv of a made-up data set of `size` (h, w) pictures; return `out`.

    A group is a lesion of one to three pictures, each another view under another light; labelled and unlabelled
    pictures share no group. `label` is the lesion's pattern. The split column is empty unless `fractions` gives
    train, val and test their shares of the labelled lesions. The same arguments give the same files whatever
    `workers` is (None: one thread a core). A set cut short is completed, one of other arguments is replaced, a whole
    one is left alone. Raises UserError where `out` holds anything else, or for sizes and counts that make no data
    set.
    """
    stamp = {
        "generator": GENERATOR, "num_labelled": num_labelled, "num_unlabelled": num_unlabelled,
        "size": list(size), "seed": seed, "fractions": list(fractions) if fractions else None,
    }  # fmt: skip
    if num_labelled < 0 or num_unlabelled < 0 or num_labelled + num_unlabelled == 0 or seed < 0 or min(size) < MIN_SIDE:
        raise UserError(
            f"Cannot make {num_labelled} + {num_unlabelled} pictures of {size[1]} x {size[0]} pixels from seed {seed}."
        )
    shots = _shots(num_labelled, num_unlabelled, seed, fractions)
    if _is_complete(out, stamp, shots):
        return out
    _claim(out, stamp)
    with ThreadPoolExecutor(workers or num_cores()) as pool:
        labels = list(pool.map(partial(_write, out, size, seed), shots))
    write_manifest(out / "manifest.csv", (_row(shot, label) for shot, label in zip(shots, labels, strict=True)))
    return out


def _shots(
    num_labelled: int, num_unlabelled: int, seed: int, fractions: tuple[float, float, float] | None
) -> list[_Shot]:
    """Return the plan of the set: how many views each lesion has, and where its group goes."""
    rng = np.random.default_rng([seed, 0])
    lesions = _views(rng)
    shots: list[_Shot] = []
    for labelled, count in ((True, num_labelled), (False, num_unlabelled)):
        start = len(shots)
        part = list(islice(lesions, count))
        # A lesion cut by the end of the labelled part must not go on in the unlabelled one.
        lesions = _views(rng, part[-1][0] + 1 if part else 0)
        splits = _assign(sorted({lesion for lesion, _ in part}), fractions, rng) if labelled else {}
        shots += [_Shot(start + i, *place, labelled, splits.get(place[0], "")) for i, place in enumerate(part)]
    return shots


def _views(rng: np.random.Generator, first: int = 0) -> Iterator[tuple[int, int]]:
    """Yield (lesion, view) without end; three lesions in five have one picture, the others two or three."""
    lesion = first
    while True:
        for view in range(int(rng.choice([1, 2, 3], p=[0.6, 0.28, 0.12]))):
            yield lesion, view
        lesion += 1


def _assign(
    lesions: list[int], fractions: tuple[float, float, float] | None, rng: np.random.Generator
) -> dict[int, str]:
    if fractions is None:
        return {}
    edges = np.rint(np.cumsum(fractions) / sum(fractions) * len(lesions)).astype(int)
    order = rng.permutation(lesions)
    return {
        int(lesion): split for split, part in zip(SPLITS, np.split(order, edges[:-1]), strict=True) for lesion in part
    }


def _write(out: Path, size: tuple[int, int], seed: int, shot: _Shot) -> str:
    """Draw one picture unless it is there already; return the lesion's pattern."""
    of_lesion = np.random.default_rng([seed, 1, shot.lesion])
    lesion, skin = random_lesion(of_lesion), random_skin(of_lesion)
    if all(path.exists() for path in _files(out, shot)):
        return lesion.pattern
    image, mask = picture(lesion, skin, np.random.default_rng([seed, 2, shot.lesion, shot.view]), size)
    target = out / "images" / f"{shot.name}.jpg"
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    Image.fromarray(image).save(part, "JPEG", quality=92)
    part.replace(target)
    if shot.labelled:
        write_mask(out / "masks" / f"{shot.name}.png", mask)
    return lesion.pattern


def _files(out: Path, shot: _Shot) -> list[Path]:
    image = out / "images" / f"{shot.name}.jpg"
    return [image, out / "masks" / f"{shot.name}.png"] if shot.labelled else [image]


def _row(shot: _Shot, label: str) -> tuple[str, ...]:
    mask = f"masks/{shot.name}.png" if shot.labelled else ""
    return f"images/{shot.name}.jpg", mask, shot.split, f"lesion_{shot.lesion:05d}", label


def _is_complete(out: Path, stamp: dict[str, object], shots: list[_Shot]) -> bool:
    """Tell whether the set is there whole: the manifest is written last and taken away first."""
    if not (out / "manifest.csv").exists() or _read_stamp(out) != stamp:
        return False
    return all(path.exists() for shot in shots for path in _files(out, shot))


def _read_stamp(out: Path) -> object:
    try:
        return json.loads((out / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _claim(out: Path, stamp: dict[str, object]) -> None:
    """Make `out` a place to write this set to: refuse what is not ours, clear away what has other arguments."""
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file; name a folder for the synthetic data.")
    if out.exists() and any(out.iterdir()) and not (out / STAMP).exists():
        raise UserError(f"'{out}' is not empty and holds no synthetic data; name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.csv").unlink(missing_ok=True)
    if _read_stamp(out) != stamp:
        for pattern in ("images/synthetic_*.jpg", "masks/synthetic_*.png"):
            for path in out.glob(pattern):
                path.unlink()
        part = out / f".{STAMP}.part"
        part.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
        part.replace(out / STAMP)
    for folder in ("images", "masks"):
        (out / folder).mkdir(exist_ok=True)
        for part in (out / folder).glob(".synthetic_*.part"):
            part.unlink()
