"""fewmask predict: masks, overlays and areas for images, folders and patterns."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fewmask.types import UserError

if TYPE_CHECKING:
    from fewmask.deploy.files import Job
    from fewmask.deploy.predictor import ImagePredictor

COLUMNS = (
    "image", "mask", "height", "width", "area_px", "area_percent", "mean_probability_inside", "threshold",
)  # fmt: skip
_PLAIN_EVERY = 5.0
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
"""What stops one answer from being written stops the next one too."""


class _CannotWriteError(UserError):
    """Nothing can be written, so going on would only repeat the sentence for every image."""


class Progress(Protocol):
    """Told after every image, how many are done and which comes next."""

    def __call__(self, num_done: int) -> None: ...


def predict(model: Path, paths: list[str], out: Path, overlay: bool, threshold: float | None, as_json: bool) -> int:
    """Write OUT/NAME.png (0 and 255, native size) for every image, OUT/areas.csv, and OUT/overlays/NAME.jpg if asked.

    `paths` are files, folders (searched to the bottom) and glob patterns; a file below a folder keeps its sub-folder.
    `threshold` None takes the model's own. A file that cannot be read does not stop the others: it is named at the
    end and the exit code is 1. Raises UserError where nothing is found, an answer would overwrite an input or a mask
    that this did not write, or nothing can be written (at once: the images after it would fare no better).
    """
    from fewmask.deploy.files import find_images
    from fewmask.deploy.open_model import open_model

    if threshold is not None and not 0 < threshold < 1:
        raise UserError(f"A threshold of {threshold} makes no mask; give a probability between 0 and 1.")
    found = find_images(paths, out)
    _refuse_overwriting(found.jobs, paths, out)
    predictor = open_model(model)
    limit = predictor.threshold if threshold is None else threshold
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    with _progress(len(found.jobs), as_json) as report, _saved_areas(out, rows):
        for num_done, job in enumerate(found.jobs, start=1):
            try:
                rows.append(_predict_one(predictor, job, out, overlay, limit))
            except _CannotWriteError:
                raise
            except UserError as error:
                failures.append({"image": str(job.image), "error": str(error)})
            report(num_done)
    left_out = {"num_not_images": found.num_other, "num_in_out": found.num_own, "num_masks": found.num_masks}
    _summarise(out, rows, failures, left_out, as_json)
    return 1 if failures else 0


def _predict_one(predictor: ImagePredictor, job: Job, out: Path, overlay: bool, threshold: float) -> dict[str, Any]:
    from fewmask.data.reading import read_image
    from fewmask.deploy.pictures import describe_mask, mask_png, overlay_jpeg

    image = read_image(job.image)
    probability = predictor(image)
    mask = probability >= threshold
    target = out / f"{job.name}.png"
    try:
        drawn = overlay_jpeg(image, mask) if overlay else None
    except UserError as error:
        raise UserError(f"'{job.image}' has no overlay, so no mask was written either: {error}") from None
    _write(target, mask_png(mask))
    if drawn is not None:
        _write(out / "overlays" / f"{job.name}.jpg", drawn)
    return {"image": str(job.image), "mask": str(target), **describe_mask(probability, threshold)}


def _refuse_overwriting(jobs: tuple[Job, ...], paths: list[str], out: Path) -> None:
    from fewmask.deploy.pictures import is_ours

    inputs = {job.image.resolve() for job in jobs}
    if any(Path(path).resolve() == out.resolve() for path in paths):
        raise UserError(f"{out} is a folder of inputs, where masks would be taken for images; choose another --out.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a folder for --out.")
    for job in jobs:
        for target in (out / f"{job.name}.png", out / "overlays" / f"{job.name}.jpg"):
            if target.resolve() in inputs:
                raise UserError(f"The answer for {job.image} would overwrite the input {target}; choose another --out.")
        if (mask := out / f"{job.name}.png").exists() and not is_ours(mask):
            raise UserError(
                f"{mask} is there already, and 'fewmask predict' did not write it (a mask drawn by hand?); choose "
                "another --out, or move it away."
            )


@contextmanager
def _saved_areas(out: Path, rows: list[dict[str, Any]]) -> Iterator[None]:
    """Write areas.csv at the end, also when the user interrupts or the disk is full.

    Only a mask whose image was being worked on at that moment, or whose overlay could not be written, lacks its row.
    """
    try:
        yield
    except BaseException:
        with suppress(UserError):  # the first error is the one to tell
            _write_areas(out, rows)
        raise
    _write_areas(out, rows)


def _write_areas(out: Path, rows: list[dict[str, Any]]) -> None:
    if rows:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        _write(out / "areas.csv", text.getvalue().encode())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        kind = _CannotWriteError if error.errno in _HOPELESS else UserError
        raise kind(f"Cannot write {path}: {error.strerror}; choose another --out or free some space.") from None


def _summarise(
    out: Path, rows: list[dict[str, Any]], failures: list[dict[str, str]], left_out: dict[str, int], as_json: bool
) -> None:
    if as_json:
        print(json.dumps({"out": str(out), "predictions": rows, "failures": failures, **left_out}, indent=1))
        return
    if rows:
        print(f"{_count(len(rows), 'mask')} in {out}, areas in {out / 'areas.csv'}")
    if left_out["num_not_images"]:
        print(f"{_count(left_out['num_not_images'], 'file')} not an image by name or content: left alone")
    if left_out["num_in_out"]:
        print(f"{_count(left_out['num_in_out'], 'file')} below {out}: left alone, as answers of an earlier call")
    if left_out["num_masks"]:
        print(f"{_count(left_out['num_masks'], 'mask')} of a data folder: left alone")
    for failure in failures:
        print(f"Not predicted: {failure['error']}", file=sys.stderr)
    if failures:
        print(f"{_count(len(failures), 'image')} could not be predicted; see above.", file=sys.stderr)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


@contextmanager
def _progress(num_images: int, silent: bool) -> Iterator[Progress]:
    """Yield what is called after every image: a bar on a terminal, a line now and then elsewhere."""
    if silent or num_images < 2:
        yield lambda num_done: None
    elif not sys.stderr.isatty():
        yield _PlainProgress(num_images)
    else:
        # Imported here: a single photo should not wait for it.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("predict"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("predict", total=num_images)
            yield lambda num_done: bar.update(task, completed=num_done)


class _PlainProgress:
    """Lines for a log file, at most one every few seconds."""

    def __init__(self, num_images: int) -> None:
        self.num_images, self.start = num_images, time.monotonic()
        self.last = self.start

    def __call__(self, num_done: int) -> None:
        now = time.monotonic()
        if now - self.last < _PLAIN_EVERY:
            return
        self.last = now
        left = (now - self.start) / num_done * (self.num_images - num_done)
        print(f"{num_done}/{self.num_images} images, {left:.0f} s left", file=sys.stderr)
