"""From a recipe's [data] section to what the stages train on: audited, split, de-duplicated, cached."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewmask import __version__
from fewmask.commands.provenance import given_models, learnt_before, public_id, run_of
from fewmask.config import DataSection, Recipe
from fewmask.data.audit import audit, components
from fewmask.data.cache import CachedDataset, build_cache
from fewmask.data.contents import content_hashes, default_cache_folder, fingerprint
from fewmask.data.manifest import load_cases, write_cases
from fewmask.data.splits import TooFewMasksError, assign_splits, follow_given, hold_out_fold, label_subset
from fewmask.engine.run import Run, read_json, write_json
from fewmask.engine.stage import Progress
from fewmask.report.wording import counted
from fewmask.types import Case, UserError


@dataclass
class Prepared:
    """The data of a run: indices point into `dataset`, which holds no test image."""

    cases: list[Case]
    dataset: CachedDataset
    labelled: list[int]
    validation: list[int]
    body: list[int]
    excluded: dict[str, int]

    def of_split(self, split: str) -> list[Case]:
        """Return the cases with a mask in a split."""
        return [case for case in self.cases if case.split == split and case.mask is not None]


def prepare(run: Run, recipe: Recipe, needs_masks: bool = True) -> Prepared:
    """Load, audit, split and cache the data; writes audit.json and cases.csv into the run.

    Unless `needs_masks`, data without any mask are not split, and masks too few to be split are left aside. Raises a
    UserError when the audit finds errors, when the data are not those the run has learnt from, when there are too few
    masks to train and to validate on, or when a model that the recipe names has learnt from a test image.
    """
    settings = recipe.data
    if settings.root is None:
        raise UserError("No data were named; give the folder, for example data.root=my_images.")
    cases = load_cases(settings.root, Path(settings.manifest) if settings.manifest else None, settings.unlabelled)
    facts = _facts(cases, settings)
    run.compare_data(facts)
    found = audited(run.folder / "audit.json", cases, facts["fingerprint"], cache_folder(recipe), needs_masks)
    run.record_data(facts)
    linked = [(a, b) for a, b, _ in found["duplicates"]]
    if settings.num_folds or settings.fold:
        cases = hold_out_fold(cases, settings.num_folds, settings.fold, settings.split_seed, linked)
    if needs_masks or any(case.mask for case in cases):
        cases = split(cases, settings, linked, needs_masks)
    trainable = [case for case in cases if case.split == "train" and case.mask is not None]
    drawn_by = recipe.run.seed if settings.label_seed is None else settings.label_seed
    chosen = {case.name for case in label_subset(trainable, settings.label_fraction, drawn_by)}
    if needs_masks and not chosen:
        raise UserError(
            f"No training image has a mask: the manifest puts all {facts['num_masks']} masks into val and test. Put "
            "some into train, or empty its column 'split'."
        )
    if len(chosen) < len(trainable):
        Progress("check").close(f"{len(chosen)} of {len(trainable)} training masks are used, by data.label_fraction")
    copies = copies_of_test(cases, linked)
    uses = _uses(cases, chosen, copies)
    write_cases(run.folder / "cases.csv", [(case, uses[case.name]) for case in cases])
    models = [model for model in given_models(recipe) if run_of(model) != run.folder]
    before = learnt_before(models, [case for case in cases if case.split == "test"])
    for sentence in before.sentences:
        Progress("check").close(sentence)
    run.record_data({**facts, "given": before.sentences, "test_images_seen": len(before.seen)})
    _remember(run.folder, cases, uses, before.learnt)
    kept = [case for case in cases if case.split != "test"]
    if not kept:
        raise UserError(
            "The manifest puts every image into test, and nothing is left to learn from: put some into train, or empty "
            "its column 'split'."
        )
    dataset = cached(kept, recipe)
    index = {case.name: number for number, case in enumerate(kept)}
    return Prepared(
        cases=cases,
        dataset=dataset,
        labelled=[index[name] for name in sorted(chosen)],
        validation=[index[c.name] for c in kept if c.split == "val" and c.mask is not None],
        body=[index[c.name] for c in kept if uses[c.name] in ("labelled", "unlabelled") and c.name not in copies],
        excluded={
            "validation": sum(use == "validation" for use in uses.values()),
            "test": sum(use == "excluded-test" for use in uses.values()),
            "near_duplicates": len(copies),
            "same_group": sum(use == "excluded-group" for use in uses.values()),
        },
    )


def split(
    cases: Sequence[Case], settings: DataSection, linked: Sequence[tuple[str, str]], needs_masks: bool
) -> list[Case]:
    """Return the cases in their splits; where masks are too few to draw one and are not needed, without those masks."""
    try:
        return assign_splits(
            cases,
            seed=settings.split_seed,  # not run.seed: several seeds are scored on the same images
            val_fraction=settings.val_fraction,
            test_fraction=settings.test_fraction,
            linked=linked,
        )
    except TooFewMasksError:
        if needs_masks:
            raise
        kept = follow_given(cases, linked)
        if lost := sum(case.mask is None for case in kept) - sum(case.mask is None for case in cases):
            noun = "1 mask is" if lost == 1 else f"{lost} masks are"
            Progress("check").close(f"{noun} too few to set any aside, and left out")
        return kept


def audited(
    path: Path, cases: Sequence[Case], print_: str, memory: Path | None = None, needs_masks: bool = True
) -> dict[str, Any]:
    """Return the audit of the cases; errors end the run, but for too few masks where none are needed.

    It is taken from `path`, or from `memory` (the cache folder, shared by all runs), where it was made before for the
    same data; auditing ten thousand images takes minutes.
    """
    if path.exists() and (found := read_json(path)).get("fingerprint") == print_:
        return found
    remembered = memory / "audits" / f"{print_}-{__version__}.json" if memory is not None else path
    with contextlib.suppress(UserError):  # none there, or a damaged one: the audit is made again
        if (found := read_json(remembered)).get("fingerprint") == print_:
            write_json(path, found)
            return found
    line = Progress("check")
    result = audit(cases, on_progress=line.count)
    if not needs_masks and (few := [finding for finding in result.errors if finding.code == "too-few-masks"]):
        result.errors = [finding for finding in result.errors if finding not in few]
        result.warnings += few
        remembered = path  # who needs masks may not take this answer for theirs
    found = {**json.loads(json.dumps(result.to_json())), "fingerprint": print_}
    named = {"image": cases, "error": result.errors, "warning": result.warnings}
    told = f" ({', '.join(finding.code for finding in result.warnings)})" if result.warnings else ""
    line.close(", ".join(counted(len(things), name) for name, things in named.items()) + told)
    if result.errors:
        write_json(path.with_name("audit-failed.json"), found)
        listed = "\n  ".join(finding.message for finding in result.errors[:20])
        more = f"\n  ... and {len(result.errors) - 20} more" if len(result.errors) > 20 else ""
        raise UserError(f"The data have {len(result.errors)} errors; mend them and run this again:\n  {listed}{more}")
    write_json(path, found)
    path.with_name("audit-failed.json").unlink(missing_ok=True)
    if remembered != path:
        with contextlib.suppress(OSError, UserError):  # a cache that cannot be written is done without
            remembered.parent.mkdir(parents=True, exist_ok=True)
            write_json(remembered, found)
    return found


def cached(cases: Sequence[Case], recipe: Recipe) -> CachedDataset:
    """Return the decoded cache of the cases at the recipe's size, built where it does not exist yet."""
    line = Progress("cache")
    dataset = build_cache(cases, recipe.model.size, cache_folder(recipe), on_progress=line.count)
    line.close(f"{len(cases)} images decoded", only_if_shown=True)
    return dataset


def cache_folder(recipe: Recipe) -> Path:
    """Return where decoded images, audits and teachers' predictions are kept for later runs."""
    return recipe.data.cache or default_cache_folder()


def _facts(cases: Sequence[Case], settings: DataSection) -> dict[str, Any]:
    return {
        "root": str(settings.root and settings.root.resolve()),
        "manifest": settings.manifest,
        "unlabelled": [str(path) for path in settings.unlabelled],
        "fingerprint": fingerprint(cases),
        "licence": settings.licence,
        "num_cases": len(cases),
        "num_masks": sum(case.mask is not None for case in cases),
    }


def copies_of_test(cases: Sequence[Case], linked: Sequence[tuple[str, str]]) -> set[str]:
    """Return the names of training and unlabelled cases that show a test image, by content or by public identifier.

    A copy of a copy is one too: of a large group of copies the audit lists pairs with the first alone.
    """
    tests = [case for case in cases if case.split == "test"]
    roots = components(linked)
    shown = {roots[case.name] for case in tests if case.name in roots}
    found = {name for name, root in roots.items() if root in shown}
    known = {public_id(case.image) for case in tests} - {None}
    found |= {case.name for case in cases if public_id(case.image) in known}
    return {case.name for case in cases if case.name in found and case.split not in ("test", "val")}


def _uses(cases: Sequence[Case], chosen: set[str], copies: set[str]) -> dict[str, str]:
    """Say for each case what it may be used for: nothing of a test image's patient is learnt from.

    A labelled training image keeps its mask in fine-tuning even if it is a copy: the split was given so, and `check`
    warns of it. It takes no part in pre-training.
    """
    patients = {case.group for case in cases if case.split == "test" and case.group}
    uses = {}
    for case in cases:
        if case.split == "test":
            uses[case.name] = "excluded-test"
        elif case.split == "val":
            uses[case.name] = "validation"
        elif case.name in chosen:
            uses[case.name] = "labelled"
        elif case.name in copies:
            uses[case.name] = "excluded-duplicate"
        else:
            uses[case.name] = "excluded-group" if case.group in patients else "unlabelled"
    return uses


def _remember(folder: Path, cases: Sequence[Case], uses: dict[str, str], before: Collection[str]) -> None:
    """Write contents.json: what each image was used for, by its content, so that `evaluate` knows it anywhere.

    `before` is the content of what the models that this run starts from have learnt: it is not new to this run either.
    """
    hashes = content_hashes(cases)
    own = {hashes[case.image]: uses[case.name] for case in cases}
    write_json(folder / "contents.json", dict.fromkeys(sorted(before), "labelled") | own)
