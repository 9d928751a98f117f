"""What a pre-trained encoder tells apart: its features as a map, and the images it holds to be alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from fewmask.report.pictures import data_uri, inside
from fewmask.report.plot import Axis, scatter
from fewmask.report.reading import Stage
from fewmask.report.wording import count, fixed, percent
from fewmask.types import UserError

FILE = "features.json"
THUMBNAIL_SIDE = 112
MAX_COLOURS = 8
UNKNOWN = "no label"
OTHERS = "other labels"
MIN_POINTS = 3


def features(stage: Stage | None) -> dict[str, Any] | None:
    """Return the map of a stage's features, its facts and the nearest neighbours; None where it left none.

    Raises UserError when features.json does not hold what it should, or names a picture that is not there.
    """
    if stage is None or stage.features is None:
        return None
    try:
        found = stage.features
        return {
            "charts": [feature_map(found)] if len(found["images"]) >= MIN_POINTS else [],
            "facts": facts(found),
            "neighbours": [_row(stage.folder, query) for query in found["queries"]],
        }
    except (LookupError, TypeError, ValueError, AttributeError):
        path = stage.folder / FILE
        raise UserError(f"{path} does not hold the features of a stage; delete it, or pre-train again.") from None


def feature_map(found: dict[str, Any]) -> dict[str, Any]:
    """Return the chart of the images on the first two principal components, a colour for each frequent label."""
    styles = label_styles([image["label"] for image in found["images"]])
    points, dots = [], []
    for image in found["images"]:
        group = _group(image["label"], styles)
        points.append((float(image["x"]), float(image["y"]), f"{image['name']}: {image['label'] or UNKNOWN}"))
        dots.append(styles[group])
    x = _axis([point[0] for point in points], "First", found["explained"][0])
    y = _axis([point[1] for point in points], "Second", found["explained"][1])
    legend = [{"name": name, "style": style, "dot": True} for name, style in styles.items()]
    return {
        "title": "Map of the features",
        "svg": scatter("Map of the features", points, x, y, styles=dots),
        "note": "Each dot is an image, placed by the two directions in which the encoder's features differ most.",
        "legend": legend if set(styles) != {UNKNOWN} else [],
    }


def label_styles(labels: list[str | None]) -> dict[str, str]:
    """Return the style of each label by its name, most frequent first; rare labels share one, unknown ones another."""
    tally = Counter(label for label in labels if label)
    ordered = sorted(tally, key=lambda label: (-tally[label], label))
    styles = {label: f"label{number}" for number, label in enumerate(ordered[:MAX_COLOURS], start=1)}
    if len(ordered) > MAX_COLOURS:
        styles[OTHERS] = "others"
    return {**styles, **({UNKNOWN: "unknown"} if None in labels else {})}


def facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return how many images are shown and labelled, and what the map holds of their differences."""
    images = found["images"]
    num_labelled = sum(image["label"] is not None for image in images)
    shown = f"{count(len(images))} of {count(found['num_candidates'])}"
    return [
        ("Images shown", shown),
        ("With a class label", count(num_labelled)),
        ("Variance on the map", percent(sum(found["explained"]))),
    ]


def _group(label: str | None, styles: dict[str, str]) -> str:
    if label is None:
        return UNKNOWN
    return label if label in styles else OTHERS


def _axis(values: list[float], name: str, share: float) -> Axis:
    air = 0.06 * (max(values) - min(values)) or 1.0  # not `span`, which may begin at zero: a map has no origin
    return Axis(min(values) - air, max(values) + air, f"{name} component ({percent(share)})")


def _row(folder: Path, query: dict[str, Any]) -> list[dict[str, Any]]:
    return [_thumbnail(folder, query, ""), *(_thumbnail(folder, n, fixed(n["cosine"], 3)) for n in query["neighbours"])]


def _thumbnail(folder: Path, image: dict[str, Any], cosine: str) -> dict[str, Any]:
    uri, width, height = data_uri(inside(folder, image["image"], FILE), THUMBNAIL_SIDE)
    return {"name": image["name"], "label": image["label"] or "", "cosine": cosine, "uri": uri, "width": width,
            "height": height}  # fmt: skip
