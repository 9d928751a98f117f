"""What an encoder has learnt, to be looked at: a map of its features, nearest neighbours, and a probe on the way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.commands.prepare import Prepared
from fewmask.data.cache import CachedDataset
from fewmask.engine.fit import Watch
from fewmask.engine.run import write_json
from fewmask.engine.stage import Progress, Stage
from fewmask.evaluate.probe import Probe, global_features, whole_images
from fewmask.models import Encoder
from fewmask.models.norms import renew_statistics
from fewmask.processes import num_processes, process_index
from fewmask.types import UserError

NUM_IMAGES = 500
NUM_QUERIES = 6
NUM_NEIGHBOURS = 5
THUMBNAIL = 112
NUM_PROBED = 2000
DRAW_SEED = 0
BATCH_SIZE = 32


def probe_for(stage: Stage, data: Prepared, body: Sequence[int], every: int, size: int) -> Probe | None:
    """Return what scores the features while they are learnt, on at most 2,000 labelled images of `body`.

    None where `every` is 0, and where the labels do not allow it, which the log is told in a sentence.
    """
    labelled = draw([i for i in body if data.dataset.labels[i] >= 0], NUM_PROBED)
    if not every:
        return None
    groups = {case.name: case.group or case.name for case in data.cases}
    try:
        return Probe(data.dataset, labelled, size, [groups[data.dataset.names[i]] for i in labelled])
    except UserError:
        text = "no probe: the images pre-trained on have class labels of fewer than two classes or patients"
        with stage.logging():
            stage.log("remark", text=text)
        Progress(stage.name).close(text)
        return None


def as_kept(probe: Probe, dataset: CachedDataset, indices: Sequence[int]) -> Watch:
    """Return a probe that sees an encoder as it will be kept, with what `know_whole_images` gives it."""

    def watch(product: nn.Module) -> dict[str, float]:
        if isinstance(product, Encoder):  # any other product keeps what it came to know
            know_whole_images(product, dataset, indices, probe.size)
        return probe(product)

    return watch


def know_whole_images(encoder: Encoder, dataset: CachedDataset, indices: Sequence[int], size: int) -> None:
    """Make an encoder's batch normalisations know images as they are, from at most 500 (ours).

    What they came to know in training is images with parts painted over, turned or recoloured, and whoever uses
    the encoder as it is would get features that are off by half of their size and more (EfficientNet-Lite0 and SimMIM's
    masks). Nothing changes where there are fewer than two images for each process.
    """
    rows, world = np.asarray(draw(indices, NUM_IMAGES), dtype=np.int64), num_processes()
    share = min(len(rows), BATCH_SIZE) // world
    if share < 2:
        return
    batches = rows[: len(rows) // (share * world) * share * world].reshape(-1, world, share)
    own = batches[:, process_index()].flatten()
    renew_statistics(encoder, whole_images(dataset.images, own, size, next(encoder.parameters()).device, share))


def describe_features(
    folder: Path, encoder: Encoder, dataset: CachedDataset, indices: Sequence[int], size: int
) -> dict[str, Any]:
    """Write `features.json` and `neighbours/*.png` into a stage's folder, and return what the file holds.

    At most 500 of the images, drawn by a fixed seed: "images" with name, label (None where unknown) and place x, y on
    their first two principal components (our choice: no further library); "explained", the shares of the variance
    those hold; "queries", up to six images with the five nearest others by cosine.
    """
    rows = np.asarray(draw(indices, NUM_IMAGES), dtype=np.int64)
    features = global_features(encoder, dataset.images, rows, size)
    places, explained = principal_components(features)
    images = [
        {**entry, "x": significant(x), "y": significant(y)}
        for entry, (x, y) in zip(entries(dataset, rows), places.tolist(), strict=True)
    ]
    facts = {
        "num_candidates": len(indices),
        "size": size,
        "explained": [round(share, 4) for share in explained],
        "images": images,
        "queries": queries(folder, dataset, rows, features),
    }
    write_json(folder / "features.json", facts)
    return facts


def draw(indices: Sequence[int], limit: int) -> list[int]:
    """Return at most `limit` of the indices, rising; the same ones for the same indices."""
    if len(indices) <= limit:
        return sorted(indices)
    return sorted(np.random.default_rng(DRAW_SEED).choice(np.asarray(indices), limit, replace=False).tolist())


def principal_components(features: Tensor) -> tuple[Tensor, list[float]]:
    """Return the places (n, 2) of features (n, d) on their first two principal components, and the shares of variance.

    The sign is chosen so that the largest loading of a component is positive; what is not there is zero.
    """
    centred = (features - features.mean(0)).double()
    left, strength, loading = torch.linalg.svd(centred, full_matrices=False)
    largest = loading.gather(1, loading.abs().argmax(1, keepdim=True)).squeeze(1)
    places = left * strength * torch.where(largest < 0, -1.0, 1.0)
    variance = strength.square()
    shares = (variance / variance.sum().clamp(min=1e-30)).tolist()
    missing = max(0, 2 - places.shape[1])
    return F.pad(places[:, :2], (0, missing)), [*shares[:2], *[0.0] * missing]


def neighbours(features: Tensor, queries: Sequence[int], k: int) -> list[list[tuple[int, float]]]:
    """Return for each query, a row of features (n, d), the `k` nearest other rows with their cosines, nearest first."""
    unit = F.normalize(features.float(), dim=1)
    cosine = unit[list(queries)] @ unit.T
    cosine[torch.arange(len(queries)), list(queries)] = -torch.inf
    value, index = cosine.topk(min(k, len(unit) - 1), dim=1)
    return [list(zip(i, v, strict=True)) for i, v in zip(index.tolist(), value.tolist(), strict=True)]


def queries(folder: Path, dataset: CachedDataset, rows: NDArray[np.int64], features: Tensor) -> list[dict[str, Any]]:
    """Return the queries with their neighbours, and write a thumbnail of each image that takes part."""
    if len(rows) < 2:
        return []
    chosen = np.random.default_rng(DRAW_SEED).permutation(len(rows))[:NUM_QUERIES].tolist()
    found = neighbours(features, chosen, NUM_NEIGHBOURS)
    (folder / "neighbours").mkdir(exist_ok=True)
    shown = {place for query, near in zip(chosen, found, strict=True) for place in (query, *(i for i, _ in near))}
    known = {place: entries(dataset, rows[[place]])[0] for place in shown}
    for place in sorted(shown):
        known[place]["image"] = thumbnail(folder, int(rows[place]), dataset.images[rows[place]])
    return [
        {**known[query], "neighbours": [{**known[i], "cosine": round(cosine, 4)} for i, cosine in near]}
        for query, near in zip(chosen, found, strict=True)
    ]


def entries(dataset: CachedDataset, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return name and label of rows of the data set."""
    labels = [dataset.label_names[label] if label >= 0 else None for label in dataset.labels[rows].tolist()]
    return [{"name": dataset.names[row], "label": label} for row, label in zip(rows.tolist(), labels, strict=True)]


def thumbnail(folder: Path, row: int, image: NDArray[np.uint8]) -> str:
    """Write a small picture of an image uint8 (c, c, 3); return its path relative to the stage's folder."""
    name = f"neighbours/image_{row:06d}.png"
    temporary = folder / f"neighbours/.image_{row:06d}.{os.getpid()}.tmp"
    try:
        picture = Image.fromarray(image)
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        picture.save(temporary, "PNG")
        temporary.replace(folder / name)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write {folder / name} ({error}); free some disk space and run this again.") from None
    return name


def significant(value: float) -> float:
    """Return a value with five significant digits, as the file keeps it."""
    return float(f"{value:.5g}")
