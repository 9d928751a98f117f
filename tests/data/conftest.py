"""Pictures and folders for the tests of the data room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewmask.data.reading import read_image
from fewmask.types import Case, UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWMASK_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(seed: int = 0, height: int = 40, width: int = 60) -> np.ndarray:
    """Return a smooth colour picture, uint8 (h, w, 3), another one for each seed."""
    y, x = np.mgrid[:height, :width].astype(float)
    phase = np.arange(3) + seed
    waves = np.sin(x[..., None] / 7 + phase) + np.cos(y[..., None] / 5 - phase)
    return ((waves + 2) * 63).astype(np.uint8)


def disc(height: int = 40, width: int = 60, radius: float = 12) -> np.ndarray:
    """Return a disc in the middle, bool (h, w)."""
    y, x = np.mgrid[:height, :width]
    return (y - height / 2) ** 2 + (x - width / 2) ** 2 < radius**2


def save(path: Path, values: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def refused(path: Path, word: str, read: Callable[[Path], object] = read_image) -> str:
    """Check that reading raises a UserError of one line that names the file and matches `word`; return its message."""
    with pytest.raises(UserError, match=word) as caught:
        read(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    return message


def make_folder(root: Path, num_labelled: int, num_unlabelled: int = 0) -> Path:
    """Write DATA/images and DATA/masks with cases named 000, 001, ..."""
    for number in range(num_labelled + num_unlabelled):
        save(root / "images" / f"{number:03}.png", picture(number))
        if number < num_labelled:
            save(root / "masks" / f"{number:03}.png", disc(radius=8 + number % 5))
    return root


def make_case(name: str, **fields: object) -> Case:
    """Return a labelled case without files."""
    return Case(name, Path(f"{name}.jpg"), **{"mask": Path(f"{name}.png"), "group": name, **fields})  # type: ignore[arg-type]
