"""Splits hold groups together, follow the manifest, and depend on the seed alone."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fewmask.data.manifest import load_cases
from fewmask.data.splits import assign_folds, assign_splits, hold_out_fold, label_subset
from fewmask.types import Case, UserError
from tests.data.conftest import make_case

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def split_of(cases: list[Case]) -> dict[str, str | None]:
    return {case.name: case.split for case in cases}


def counts(cases: list[Case]) -> Counter:
    return Counter(case.split for case in cases if case.mask is not None)


case_lists = st.lists(
    st.tuples(st.integers(0, 8), st.sampled_from(["a", "b", None]), st.booleans()), min_size=3, max_size=30
).map(
    lambda rows: [
        make_case(f"c{n}", group=f"g{group}", label=label, **({} if labelled else {"mask": None}))
        for n, (group, label, labelled) in enumerate(rows)
    ]
)
links = st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=3).map(
    lambda pairs: [(f"c{a}", f"c{b}") for a, b in pairs]
)


@given(cases=case_lists, linked=links, seed=st.integers(0, 99))
def test_blocks_stay_whole_every_label_counts_and_order_does_not(cases, linked, seed):
    try:
        done = assign_splits(cases, seed=seed, linked=linked)
    except UserError:
        assume(len({case.group for case in cases if case.mask is not None}) - len(linked) >= 2)
        raise
    splits = split_of(done)
    assert [case.name for case in done] == [case.name for case in cases]
    groups: dict[str, set] = {}
    for case in done:
        assert (case.split is None) == (case.mask is None)
        if case.mask is not None:
            groups.setdefault(case.group, set()).add(case.split)
    assert all(len(found) == 1 for found in groups.values())
    for a, b in linked:
        if splits.get(a) and splits.get(b):
            assert splits[a] == splits[b]
    assert {"train", "val"} <= set(counts(done))
    shuffled = random.Random(seed).sample(cases, len(cases))
    assert split_of(assign_splits(shuffled, seed=seed, linked=linked)) == splits


@given(cases=case_lists, links=st.lists(st.integers(0, 29), max_size=5), seed=st.integers(0, 99))
def test_images_without_a_mask_move_no_other_whatever_they_show(cases, links, seed):
    cases = [case for case in cases if case.mask is not None]
    assume(len({case.group for case in cases}) >= 2)
    names = [case.name for case in cases]
    others = [make_case(f"a{n}", mask=None) for n in range(5)]  # before all others by name
    linked = [(f"a{n}", names[k % len(names)]) for n, k in enumerate(links)]
    alone = split_of(assign_splits(cases, seed=seed))
    among = split_of(assign_splits([*cases, *others], seed=seed, linked=linked))
    assert {name: among[name] for name in names} == alone


@given(seed=st.integers(0, 999), num=st.integers(20, 200))
def test_single_images_are_drawn_in_the_asked_shares(seed, num):
    cases = [make_case(f"c{n}", label="ab"[n % 5 == 0]) for n in range(num)]
    found = counts(assign_splits(cases, seed=seed, val_fraction=0.2, test_fraction=0.1))
    assert abs(found["val"] - 0.2 * num) <= 1.5
    assert abs(found["test"] - 0.1 * num) <= 1.5


def test_another_seed_is_another_split():
    cases = [make_case(f"c{n}") for n in range(50)]
    assert split_of(assign_splits(cases, seed=0)) != split_of(assign_splits(cases, seed=1))


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_spread_evenly(seed):
    cases = [make_case(f"c{n}", label="rare" if n < 20 else "common") for n in range(200)]
    done = assign_splits(cases, seed=seed)
    assert Counter(case.split for case in done if case.label == "rare") == {"train": 14, "val": 3, "test": 3}


def test_labels_that_are_all_different_do_not_empty_a_split():
    cases = [make_case(f"c{n}", label=f"l{n}") for n in range(40)]
    found = counts(assign_splits(cases))
    assert found == {"train": 28, "val": 6, "test": 6}


@pytest.mark.parametrize(
    ("num", "expected"),
    [(2, {"train": 1, "val": 1}), (3, {"train": 1, "val": 1, "test": 1}), (4, {"train": 2, "val": 1, "test": 1})],
)
def test_tiny_sets(num, expected):
    for seed in range(10):
        assert counts(assign_splits([make_case(f"c{n}") for n in range(num)], seed=seed)) == expected


def test_too_few_masks_is_one_sentence():
    with pytest.raises(UserError, match="no masks"):
        assign_splits([make_case("a", mask=None)])
    with pytest.raises(UserError, match="at least two"):
        assign_splits([make_case("a"), make_case("b", mask=None)])
    with pytest.raises(UserError, match="at least two"):
        assign_splits([make_case("a", group="p"), make_case("b", group="p")])
    with pytest.raises(UserError, match="above 0"):
        assign_splits([make_case("a"), make_case("b")], val_fraction=0)


def test_masks_that_all_hang_together_are_said_to(tmp_path):
    cases = [make_case(name) for name in "abc"]
    with pytest.raises(UserError, match=r"All 3 masks .* count as one: .*near-copies.*audit\.json"):
        assign_splits(cases, linked=[("a", "b"), ("b", "c")])


def test_full_manifest_is_kept_and_the_undecided_train_or_follow_their_group():
    cases = [
        make_case("a", split="train"),
        make_case("b", split="val"),
        make_case("c", split="test", group="p"),
        make_case("d", group="p"),
        make_case("e"),
        make_case("f"),
        make_case("u", mask=None),
        make_case("v", mask=None, split="test"),
    ]
    done = split_of(assign_splits(cases, linked=[("f", "b")]))
    assert list(done.values()) == ["train", "val", "test", "test", "train", "val", None, "test"]


@pytest.mark.parametrize(("given_split", "drawn"), [("test", "val"), ("val", "test")])
def test_only_the_missing_split_is_drawn_out_of_train(given_split, drawn):
    cases = [make_case(f"t{n}", split="train", group=f"g{n // 2}") for n in range(80)]
    cases += [make_case(f"o{n}", split=given_split) for n in range(30)]
    done = assign_splits(cases, linked=[("t0", "o0")])
    assert all(case.split == given_split for case in done if case.name.startswith("o"))
    assert 10 <= counts(done)[drawn] <= 13
    # what is linked to a given split may not be drawn into the other one, nor leave train, where it was put
    assert split_of(done)["t0"] == "train"
    by_group: dict[str, set] = {}
    for case in done:
        by_group.setdefault(case.group, set()).add(case.split)
    assert all(len(found) == 1 for found in by_group.values())


def test_a_group_torn_by_the_manifest_is_refused():
    cases = [make_case("a", group="p9", split="train"), make_case("b", group="p9", split="test"), make_case("c")]
    with pytest.raises(UserError, match=r"p9.*train \('a'\).*test \('b'\)"):
        assign_splits(cases)


@given(num=st.integers(1, 120), seed=st.integers(0, 99), data=st.data())
def test_label_subsets_are_nested_and_never_empty(num, seed, data):
    cases = [make_case(f"c{n}", label="abc"[n % 7 % 3], split="train") for n in range(num)]
    small, large = sorted(data.draw(st.tuples(st.floats(0.001, 1), st.floats(0.001, 1))))
    inner, outer = (label_subset(cases, fraction, seed) for fraction in (small, large))
    assert {case.name for case in inner} <= {case.name for case in outer}
    assert len(inner) == max(1, round(small * num))
    assert label_subset(cases, 1.0, seed) == cases
    shuffled = random.Random(seed).sample(cases, num)
    assert {case.name for case in label_subset(shuffled, small, seed)} == {case.name for case in inner}


@given(fraction=st.floats(0.01, 1), seed=st.integers(0, 9))
def test_label_subsets_hold_labels_in_proportion(fraction, seed):
    cases = [make_case(f"c{n}", label="a" if n % 4 else "b") for n in range(200)]
    kept = label_subset(cases, fraction, seed)
    assert abs(sum(case.label == "b" for case in kept) - len(kept) / 4) <= 1


def test_label_subset_takes_labelled_cases_only_and_a_share_of_one():
    cases = [make_case("a"), make_case("u", mask=None)]
    assert [case.name for case in label_subset(cases, 0.01, 0)] == ["a"]
    assert label_subset([make_case(f"c{n}") for n in range(40)], 0.1, 0) != label_subset(
        [make_case(f"c{n}") for n in range(40)], 0.1, 1
    )
    for fraction in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(UserError, match="label_fraction"):
            label_subset(cases, fraction, 0)


@pytest.mark.skipif(not (SHARED / "ham10000").is_dir(), reason="HAM10000 is not here")
def test_lesions_of_ham10000_stay_together_and_diagnoses_are_balanced():
    cases = assign_splits(load_cases(SHARED / "ham10000"), seed=3)
    found = counts(cases)
    assert abs(found["val"] / len(cases) - 0.15) < 0.003
    assert abs(found["test"] / len(cases) - 0.15) < 0.003
    lesions: dict[str, set] = {}
    for case in cases:
        lesions.setdefault(case.group, set()).add(case.split)
    assert all(len(splits) == 1 for splits in lesions.values())
    labels = Counter(case.label for case in cases)
    for label, num in labels.items():
        share = sum(case.label == label and case.split == "test" for case in cases) / num
        assert abs(share - 0.15) < 0.03, label


@given(cases=case_lists, linked=links, num_folds=st.integers(2, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_each_group_is_in_one_fold_and_no_fold_is_empty(cases, linked, num_folds, seed):
    try:
        folds = assign_folds(cases, num_folds, seed, linked)
    except UserError:
        assume(len({case.group for case in cases if case.mask is not None}) - len(linked) >= num_folds)
        raise
    assert folds.keys() == {case.name for case in cases if case.mask is not None}
    assert set(folds.values()) == set(range(num_folds))
    groups: dict[str, set] = {}
    for case in cases:
        if case.mask is not None:
            groups.setdefault(case.group, set()).add(folds[case.name])
    assert all(len(found) == 1 for found in groups.values())
    for a, b in linked:
        if a in folds and b in folds:
            assert folds[a] == folds[b]
    shuffled = random.Random(seed).sample(cases, len(cases))
    assert assign_folds(shuffled, num_folds, seed, linked) == folds


@given(sizes=st.lists(st.integers(1, 6), min_size=6, max_size=30), num_folds=st.integers(2, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_folds_differ_by_no_more_than_the_largest_group(sizes, num_folds, seed):
    cases = [make_case(f"c{g}_{n}", group=f"g{g}") for g, size in enumerate(sizes) for n in range(size)]
    found = Counter(assign_folds(cases, num_folds, seed).values())
    assert max(found.values()) - min(found.values()) <= max(sizes)


@given(num=st.integers(20, 150), num_folds=st.integers(2, 5), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_labels_are_spread_over_the_folds(num, num_folds, seed):
    cases = [make_case(f"c{n}", label="rare" if n % 4 == 0 else "common") for n in range(num)]
    folds = assign_folds(cases, num_folds, seed)
    for label in ("rare", "common"):
        found = Counter(folds[case.name] for case in cases if case.label == label)
        assert max(found.values()) - min(found[fold] for fold in range(num_folds)) <= 2


def test_every_image_is_held_out_by_one_fold_and_validation_is_drawn_from_the_others():
    cases = [make_case(f"c{n}", group=f"g{n // 2}") for n in range(40)] + [make_case("u", mask=None)]
    tested = []
    for fold in range(5):
        done = assign_splits(hold_out_fold(cases, 5, fold))
        tested += [case.name for case in done if case.split == "test"]
        assert counts(done) == {"train": 28, "val": 4, "test": 8}
        assert split_of(done)["u"] is None
    assert sorted(tested) == sorted(case.name for case in cases if case.mask is not None)
    assert assign_folds(cases, 5, 0) != assign_folds(cases, 5, 1)


@pytest.mark.parametrize(
    ("num_folds", "fold", "message"),
    [(5, 5, "data.fold is 5"), (0, 1, "there are 0 folds"), (1, 0, "at least 2"), (4, 0, "of 3 separate patients")],
)
def test_folds_that_cannot_be_are_told(num_folds, fold, message):
    with pytest.raises(UserError, match=message):
        hold_out_fold([make_case(name) for name in "abc"], num_folds, fold)


def test_folds_of_data_with_splits_are_refused():
    with pytest.raises(UserError, match=r"'b' in val.*data\.num_folds"):
        hold_out_fold([make_case("a"), make_case("b", split="val"), make_case("c")], 2, 0)


@pytest.mark.skipif(not (SHARED / "cxr_lungs").is_dir(), reason="the X-rays are not here")
def test_patients_of_the_xrays_stay_together():
    cases = load_cases(SHARED / "cxr_lungs")
    folds = assign_folds(cases, 5, 0)
    assert max(Counter(folds.values()).values()) - min(Counter(folds.values()).values()) <= 3
    patients: dict[str, set] = {}
    for case in cases:
        patients.setdefault(case.group, set()).add(folds[case.name])
    assert all(len(found) == 1 for found in patients.values())
