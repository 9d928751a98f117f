"""What a run prepares of its data, and what it need not do again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fewmask.commands import prepare as module
from fewmask.config import load_recipe
from fewmask.engine.run import Run
from fewmask.types import Case, UserError
from tests.commands.conftest import TINY, read_rows, write_rows


@pytest.fixture
def prepared(monkeypatch, tmp_path):
    """Prepare a folder's data for a run; returns the number of audits made so far."""
    made = []
    audit = module.audit
    monkeypatch.setattr(module, "audit", lambda *args, **kwargs: made.append(1) or audit(*args, **kwargs))

    def call(data, name):
        recipe = load_recipe("run", TINY, given={"data.root": str(data)})
        with Run(tmp_path / name, "run", recipe.resolved()) as run:
            module.prepare(run, recipe)
        return len(made)

    return call


def test_another_run_on_the_same_data_is_not_audited_again(prepared, data, tmp_path):
    assert prepared(data, "first") == 1
    assert prepared(data, "second") == 1
    first, second = ((tmp_path / name / "audit.json").read_bytes() for name in ("first", "second"))
    assert first == second


def test_changed_data_are_audited_again(prepared, data):
    assert prepared(data, "first") == 1
    picture = sorted((data / "images").iterdir())[0]
    shutil.copy(sorted((data / "images").iterdir())[1], picture.with_name(f"extra{picture.suffix}"))
    (data / "manifest.csv").unlink()
    assert prepared(data, "second") == 2


def test_copies_of_copies_and_renamed_public_images_are_known():
    def case(name, split=None):
        return Case(name, Path(f"images/{name}.jpg"), split=split)

    cases = [case("t", "test"), case("ISIC_0000002", "test"), case("a"), case("b"), case("c", "train"), case("free")]
    cases += [case("ISIC_0000002_downsampled"), case("ISIC_0000003"), case("v", "val")]
    linked = [("a", "t"), ("a", "b"), ("c", "b"), ("v", "t")]
    assert module.copies_of_test(cases, linked) == {"a", "b", "c", "ISIC_0000002_downsampled"}


def test_a_damaged_memory_of_an_audit_is_made_again(prepared, data):
    assert prepared(data, "first") == 1
    for path in (module.default_cache_folder() / "audits").iterdir():
        path.write_text("{")
    assert prepared(data, "second") == 2


def put_into(data, splits):
    """Give the images with a mask these splits in turn, those without none; return how many have which."""
    rows = read_rows(data / "manifest.csv")
    masked = [row for row in rows if row["mask"]]
    for number, row in enumerate(masked):
        row["split"], row["group"] = splits[number % len(splits)], row["image"]
    write_rows(data / "manifest.csv", rows)
    return len(masked), len(rows) - len(masked)


def made_ready(data, folder, **kwargs):
    recipe = load_recipe("run", TINY, given={"data.root": str(data)})
    with Run(folder, "run", recipe.resolved()) as run:
        return module.prepare(run, recipe, **kwargs)


@pytest.mark.parametrize(
    ("splits", "told"),
    [
        (["test"], "There are 0 masks of separate patients to train on"),
        (["val"], "There are 0 masks of separate patients to train on"),
        (["val", "test"], "No training image has a mask: the manifest puts all 12 masks into val and test"),
    ],
)
def test_pretraining_needs_no_mask_to_train_on_and_leaves_given_splits_alone(splits, told, data, tmp_path):
    num_masked, num_unlabelled = put_into(data, splits)
    ready = made_ready(data, tmp_path / "run", needs_masks=False)
    assert (len(ready.body), ready.labelled) == (num_unlabelled, [])
    assert ready.excluded["test"] == num_masked * splits.count("test") // len(splits)
    with pytest.raises(UserError, match=told):
        made_ready(data, tmp_path / "trained")


def test_two_masks_of_near_copies_are_too_few_and_pretraining_does_without(data, tmp_path):
    rows = read_rows(data / "manifest.csv")
    one, two, *others = (row for row in rows if row["mask"])
    shutil.copy(data / one["image"], data / two["image"])
    two["group"] = "another lesion, it says"
    for row in others:
        row["mask"] = ""
    write_rows(data / "manifest.csv", rows)
    ready = made_ready(data, tmp_path / "run", needs_masks=False)
    assert (len(ready.body), ready.labelled, ready.validation) == (len(rows), [], [])
    with pytest.raises(UserError, match="All 2 masks to draw splits from count as one"):
        made_ready(data, tmp_path / "trained")


def test_what_a_test_image_is_linked_to_is_not_learnt_from_where_no_split_can_be_drawn(data, tmp_path):
    rows = read_rows(data / "manifest.csv")
    masked, bare = ([row for row in rows if bool(row["mask"]) == kind] for kind in (True, False))
    for row in rows:
        row["group"] = row["image"]
    for row in masked[2:]:
        row["mask"] = ""
    tested, undecided = masked[:2]
    tested["split"] = "test"
    shutil.copy(data / tested["image"], data / bare[0]["image"])  # a copy, of the patient of the other mask
    bare[0]["group"] = undecided["group"] = "patient"
    write_rows(data / "manifest.csv", rows)
    ready = made_ready(data, tmp_path / "run", needs_masks=False)
    assert len(ready.body) == len(rows) - 3
    assert ready.excluded == {"validation": len(ready.validation), "test": 2, "near_duplicates": 1, "same_group": 0}


def test_test_images_patients_are_not_learnt_from_where_no_split_can_be_drawn(data, tmp_path):
    rows = read_rows(data / "manifest.csv")
    masked, bare = ([row for row in rows if bool(row["mask"]) == kind] for kind in (True, False))
    for row in masked[1:]:
        row["split"] = "test"
    for row in (masked[0], bare[0], masked[1]):
        row["group"] = "patient"  # one that has no split, one without a mask, one test image
    write_rows(data / "manifest.csv", rows)
    ready = made_ready(data, tmp_path / "run", needs_masks=False)
    assert len(ready.body) == len(bare) - 1
