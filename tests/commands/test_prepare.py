"""What a run prepares of its data, and what it need not do again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fewmask.commands import prepare as module
from fewmask.config import load_recipe
from fewmask.engine.run import Run
from fewmask.types import Case
from tests.commands.conftest import TINY


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
