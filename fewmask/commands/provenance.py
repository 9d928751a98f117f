"""What ready-made teachers have learnt from, so that none of it is scored as if it had never been seen."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from fewmask.commands.prepare import public_id
from fewmask.data.contents import content_hashes
from fewmask.engine.run import read_json
from fewmask.types import Case, UserError

LEARNT = ("labelled", "validation")  # a model is chosen by what validates it


def learnt_by_teachers(teachers: Sequence[Path], tests: Sequence[Case]) -> tuple[set[str], list[str]]:
    """Return the content of the images whose masks the teachers have learnt from, and a sentence for each teacher.

    Known are those of teachers that lie in their run folder. Raises a UserError where a test image is among them, by
    content or by public identifier.
    """
    hashes = {value: case.name for case, value in zip(tests, _contents(tests), strict=True)}
    learnt: set[str] = set()
    remarks = []
    for teacher in teachers:
        run = run_of(teacher)
        if run is None:
            remarks.append(f"Teacher {teacher.name}: given, and what it has learnt from is not recorded beside it.")
            continue
        uses: dict[str, str] = read_json(run / "contents.json")
        theirs = {content for content, use in uses.items() if use in LEARNT}
        known = _public_ids(run / "cases.csv")
        seen = {hashes[content] for content in theirs & hashes.keys()}
        seen |= {case.name for case in tests if public_id(case.image) in known}
        if seen:
            raise UserError(
                f"The teacher {teacher} has learnt from {len(seen)} of the test images, such as {min(seen)}; give one "
                "that was trained with the same split."
            )
        learnt |= theirs
        remarks.append(f"Teacher {teacher.name}: given, and trained on {len(theirs)} masks, none of a test image.")
    return learnt, remarks


def run_of(teacher: Path) -> Path | None:
    """Return the run folder that a teacher lies in, None where there is none that tells what it has learnt from."""
    # A candidate of a selection lies two folders deeper than a run's own segmenter.
    places = [teacher, *teacher.parents[:4]] if teacher.is_file() else [teacher]
    return next((place for place in places if (place / "contents.json").is_file()), None)


def _contents(cases: Sequence[Case]) -> list[str]:
    hashes = content_hashes(cases)
    return [hashes[case.image] for case in cases]


def _public_ids(path: Path) -> set[str]:
    """Return the public identifiers of the images that a run's cases.csv says it has learnt from."""
    if not path.is_file():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        found = {public_id(Path(row["image"])) for row in csv.DictReader(file) if row["use"] in LEARNT}
    return {identifier for identifier in found if identifier is not None}
