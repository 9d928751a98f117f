"""`fewmask demo`: the whole chain on images drawn here, so that a stranger can watch it happen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fewmask.commands.chain import run
from fewmask.data.synthetic import make_dataset
from fewmask.engine.stage import Progress

NUM_LABELLED, NUM_UNLABELLED = 120, 480


def demo(out: Path, overrides: Iterable[str]) -> int:
    """Draw a data set into `out/data` and run the chain of the recipe `demo` on it; a second call resumes."""
    line = Progress("draw")
    data = make_dataset(out / "data", NUM_LABELLED, NUM_UNLABELLED)
    line.close(f"{NUM_LABELLED} images with masks and {NUM_UNLABELLED} without, in {data}")
    return run(data, out, overrides=overrides, recipe_name="demo")
