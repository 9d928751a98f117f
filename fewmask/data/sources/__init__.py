"""Importers of public data sets, a function each: raw folder as downloaded -> DATA layout with manifest.csv."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fewmask.data.sources import ham10000, isic2016, isic2017, isic2018, isic2019, ph2, siim_acr

SOURCES: dict[str, Callable[[Path, Path], Path]] = {
    "ham10000": ham10000.import_raw,
    "isic2016": isic2016.import_raw,
    "isic2017": isic2017.import_raw,
    "isic2018": isic2018.import_raw,
    "isic2019": isic2019.import_raw,
    "ph2": ph2.import_raw,
    "siim_acr": siim_acr.import_raw,
}
