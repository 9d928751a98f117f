"""Images that no run of a table has learnt from: which of another data set these are."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fewmask import __version__
from fewmask.commands.provenance import public_id
from fewmask.data.cache import num_cores
from fewmask.data.contents import content_hashes, default_cache_folder, fingerprint
from fewmask.data.hashing import Sketch, near_duplicates, sketch
from fewmask.data.manifest import load_cases
from fewmask.data.reading import read_image
from fewmask.engine.run import read_json, write_json
from fewmask.engine.stage import Progress
from fewmask.types import Case, UserError


def choose_unseen(
    folder: Path, data: Path, cases: Sequence[Case], learnt: Collection[str], num_unseen: int = 0
) -> tuple[list[Case], dict[str, Any]]:
    """Return the cases of `folder` that no mask was learnt from, and what to tell of them.

    `cases` are all of the folder `data` and its additions; `learnt` holds the content and the public identifiers of
    images that given teachers have learnt from. An image is known by its content, by its public identifier, and by
    showing the same photograph (`near_duplicates`; but for those of `learnt`, of which no picture is at hand). Of
    what is left `num_unseen` are drawn, always the same; 0 takes all. Raises a UserError where none is left.
    """
    masked = [case for case in load_cases(folder) if case.mask is not None]
    hashes = content_hashes([*masked, *cases])

    def known_as(case: Case) -> set[str]:
        # A public set that was saved anew has other bytes and the same names.
        return {hashes[case.image], public_id(case.image) or hashes[case.image]}

    trained_on = set(learnt).union(*(known_as(case) for case in cases if case.mask is not None))
    body = set[str]().union(*(known_as(case) for case in cases if case.mask is None))
    fresh = sorted((case for case in masked if trained_on.isdisjoint(known_as(case))), key=lambda case: case.name)
    shown = same_photographs(fresh, cases) if fresh else {}
    copies = {case.name for case in fresh if any(cases[other].mask is not None for other in shown.get(case.name, ()))}
    fresh = [case for case in fresh if case.name not in copies]
    if not fresh:
        raise UserError(f"{folder} holds no image with a mask that is not among {data}; name another --unseen.")
    chosen = fresh
    if 0 < num_unseen < len(fresh):
        chosen = sorted(random.Random(0).sample(fresh, num_unseen), key=lambda case: case.name)
    return chosen, {
        "name": folder.resolve().name,
        "num_cases": len(chosen),
        "num_masked": len(masked),
        "num_trained_on": len(masked) - len(fresh),
        "num_in_body": sum(case.name in shown or not body.isdisjoint(known_as(case)) for case in chosen),
    }


def same_photographs(cases: Sequence[Case], others: Sequence[Case]) -> dict[str, list[int]]:
    """Return, by name, which of the others (their numbers) show the same photograph as a case, copied in some way.

    Every picture is read, minutes for ten thousand; the answer is kept in the cache folder.
    """
    place = default_cache_folder() / "same-photographs"
    path = place / f"{fingerprint(cases)}-{fingerprint(others)}-{__version__}.json"
    numbers = {case.name: number for number, case in enumerate(others)}
    with contextlib.suppress(UserError):  # none there, or a damaged one: it is looked for again
        return {name: [numbers[other] for other in those] for name, those in read_json(path).items()}
    hashes = content_hashes([*cases, *others])
    unique = list({hashes[case.image]: case for case in (*cases, *others)}.items())  # each picture is read once
    alike: dict[str, set[str]] = {content: {content} for content, _ in unique}
    for i, j in near_duplicates(_sketches([case for _, case in unique])):
        for one, other in ((i, j), (j, i)):
            alike[unique[one][0]].add(unique[other][0])
    holders: dict[str, list[int]] = {}
    for number, case in enumerate(others):
        holders.setdefault(hashes[case.image], []).append(number)
    found = {
        case.name: those
        for case in cases
        if (those := sorted(n for content in alike[hashes[case.image]] for n in holders.get(content, ())))
    }
    with contextlib.suppress(OSError, UserError):  # a cache that cannot be written is done without
        place.mkdir(parents=True, exist_ok=True)
        write_json(path, {name: [others[number].name for number in those] for name, those in found.items()})
    return found


def _sketches(cases: Sequence[Case]) -> list[Sketch]:
    line, sketches = Progress("copies of unseen images"), []
    with ThreadPoolExecutor(num_cores()) as pool:
        for one in pool.map(lambda case: sketch(read_image(case.image)), cases):
            sketches.append(one)
            line.count(len(sketches), len(cases))
    line.close(f"{len(cases)} images compared", only_if_shown=True)
    return sketches
