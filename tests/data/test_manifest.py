"""Pairing by folder and by manifest: what is silently wrong elsewhere is one sentence here."""

from __future__ import annotations

import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewmask.data import contents
from fewmask.data.manifest import (
    content_hashes,
    fingerprint,
    load_cases,
    skipped_files,
    unlisted_pictures,
    write_cases,
)
from fewmask.types import Case, UserError
from tests.data.conftest import disc, make_folder, picture, save

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "DATA", num_labelled=3, num_unlabelled=2)


def with_manifest(root: Path, text: str, encoding: str = "utf-8") -> Path:
    (root / "manifest.csv").write_bytes(text.encode(encoding))
    return root


def test_images_are_paired_by_stem_and_the_rest_is_unlabelled(data):
    cases = load_cases(data)
    assert [case.name for case in cases] == ["000", "001", "002", "003", "004"]
    assert [case.mask.name if case.mask else None for case in cases] == ["000.png", "001.png", "002.png", None, None]
    assert all(case.group == case.name and case.split is None and case.label is None for case in cases)


@pytest.mark.parametrize("ending", ["_segmentation", "_Segmentation", "_mask", "_MASK"])
def test_common_endings_of_masks(data, ending):
    (data / "masks" / "001.png").rename(data / "masks" / f"001{ending}.png")
    assert load_cases(data)[1].mask == data / "masks" / f"001{ending}.png"


def test_an_exact_name_counts_before_an_ending(tmp_path):
    save(tmp_path / "images" / "a_mask.jpg", picture())
    save(tmp_path / "masks" / "a_mask.png", disc())
    assert [case.mask for case in load_cases(tmp_path)] == [tmp_path / "masks" / "a_mask.png"]


def test_folders_become_part_of_the_name(tmp_path):
    for patient in ("p1", "p2"):
        save(tmp_path / "images" / patient / "x.png", picture())
        save(tmp_path / "masks" / patient / "x.png", disc())
    cases = load_cases(tmp_path)
    assert [case.name for case in cases] == ["p1__x", "p2__x"]
    assert [case.mask.parent.name for case in cases] == ["p1", "p2"]


def test_names_match_across_unicode_forms(tmp_path):
    save(tmp_path / "images" / (unicodedata.normalize("NFD", "é") + ".png"), picture())
    save(tmp_path / "masks" / (unicodedata.normalize("NFC", "é") + ".png"), disc())
    (case,) = load_cases(tmp_path)
    assert case.mask is not None
    assert case.name == unicodedata.normalize("NFC", "é")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("images/000.jpg", "000.jpg.*000.png.*rename or remove"),
        ("images/A.png images/a.png", "capitals"),
        ("images/e\u0301.png images/\u00e9.jpg", "accents"),
        ("masks/900.png masks/901.png", "without an image: '900.png', '901.png'"),
        ("masks/000_mask.png", "masks of one image"),
        ("masks/000.gif", "000.gif.*000.png"),
        ("images/000_segmentation.png", "named as a mask"),
        ("images/000_superpixels.png", "named as a mask"),
        ("images/scan.nii.gz images/phone.heic", "'phone.heic', 'scan.nii.gz' of a kind"),
    ],
)
def test_what_is_ambiguous_is_refused(data, extra, words):
    for name in extra.split():
        shutil.copy(data / "images" / "004.png", data / name)
    with pytest.raises(UserError, match=words):
        load_cases(data)


def test_clutter_is_ignored_and_documents_are_listed(data):
    for name in ("images/.DS_Store", "images/Thumbs.db", "images/._000.png", "masks/.hidden.png", "masks/desktop.ini"):
        (data / name).write_bytes(b"x")
    (data / "images" / "README.txt").write_text("about")
    (data / "images" / "LICENSE").write_text("terms")
    assert len(load_cases(data)) == 5
    assert skipped_files(data) == [data / "images" / "LICENSE", data / "images" / "README.txt"]


def test_dicom_numbers_without_suffix_keep_their_last_part(tmp_path):
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        (tmp_path / "images" / f"1.2.840.{number}").write_bytes(b"\0" * 128 + b"DICM")
    assert [case.name for case in load_cases(tmp_path)] == ["1.2.840.1", "1.2.840.2"]


@pytest.mark.parametrize(
    ("folder", "words"),
    [("images", "so give the folder that it lies in, {root}"), ("photos", "such as img_0.png; move them to")],
)
def test_a_folder_of_pictures_is_told_where_it_belongs(tmp_path, folder, words):
    save(tmp_path / folder / "img_0.png", picture())
    save(tmp_path / folder / "._img.png", picture())  # a Mac's clutter
    with pytest.raises(UserError, match=words.format(root=tmp_path)):
        load_cases(tmp_path / folder)


def test_missing_layout_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="missing"):
        load_cases(tmp_path / "nowhere")
    save(tmp_path / "x.png", picture())
    with pytest.raises(UserError, match="images"):
        load_cases(tmp_path)
    with pytest.raises(UserError, match="a file"):
        load_cases(tmp_path / "x.png")
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="no images"):
        load_cases(tmp_path)


def test_manifest_in_every_dialect(data):
    rows = [
        "Image,mask,SPLIT,group,label,age",
        "images/000.png,masks/001.png,Train,p1,nv,45",
        "",
        "images\\001.png,,validation,,,",
        '"images/003.png",,TEST,p2',
    ]
    expected = [
        Case("000", data / "images/000.png", data / "masks/001.png", "train", "p1", "nv"),
        Case("001", data / "images/001.png", None, "val", "001", None),
        Case("003", data / "images/003.png", None, "test", "p2", None),
    ]
    for separator, newline, encoding in ((",", "\n", "utf-8"), (";", "\r\n", "utf-8-sig"), ("\t", "\n", "utf-8-sig")):
        text = newline.join(rows).replace(",", separator)
        assert load_cases(with_manifest(data, text, encoding)) == expected


def test_named_manifest_wins_over_the_default_one_and_a_missing_mask_column_pairs_by_name(data):
    with_manifest(data, "image\nimages/000.png\n")
    (data / "other.csv").write_text("image,split\nimages/001.png,test\nimages/004.png,\n")
    assert [case.name for case in load_cases(data)] == ["000"]
    cases = load_cases(data, Path("other.csv"))
    assert [(case.name, case.split, case.mask and case.mask.name) for case in cases] == [
        ("001", "test", "001.png"),
        ("004", None, None),
    ]
    assert load_cases(data, data / "other.csv") == cases


def test_same_stem_in_two_folders_gets_the_folder_in_its_name(data):
    save(data / "more" / "000.png", picture(9))
    cases = load_cases(with_manifest(data, "image\nimages/000.png\nmore/000.png\n"))
    assert [case.name for case in cases] == ["000", "more__000"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "column named 'image'"),
        ("picture,mask\nimages/000.png,\n", "column named 'image'"),
        ("image,image\nimages/000.png,\n", "at most once"),
        ("image\n", "no images"),
        ("image,split\nimages/000.png,train\nimages/001.png,extra\n", "line 3 has split 'extra'"),
        ("image\nimages/000.png\n\nimages/000.png\n", "line 4 lists 'images/000.png' again, after line 2"),
        ("image\nimages/none.png\n", "line 2, column image, names 'images/none.png', which is not there"),
        ("image,mask\nimages/000.png,masks/none.png\n", "line 2, column mask,"),
        ("image,mask\n,masks/000.png\n", "line 2, column image, is empty"),
        ("image,mask\nimages/000.png,images/000.png\n", "line 2 .*as image and mask"),
        ("image\n../DATA/images/000.png\n", "line 2.*outside"),
        ("image\n/etc/hostname\n", "line 2.*outside"),
        ("image\nC:\\images\\000.png\n", "line 2.*outside"),
        ("image,mask\nimages/000.png,masks/../../DATA/masks/000.png\n", "line 2.*outside"),
        ("image,mask\nimages/000.png,,too,many\n", "line 2 has more cells"),
        (
            "image,mask\nimages/000.png,masks/000.png\nimages/001.png,masks/000.png\n",
            "line 3 lists 'masks/000.png' again, after line 2",
        ),
        ("group,image\np1\n", "line 2, column image, is empty"),
        ('image\n"images/000.png\n', "line 2 is not valid CSV|line 3 is not valid CSV"),
        ("image\nimages/0\x0000.png\n", "line 2"),
    ],
)
def test_every_fault_of_a_manifest_is_named_with_its_line(data, text, words):
    with pytest.raises(UserError, match=words) as caught:
        load_cases(with_manifest(data, text))
    assert "\n" not in str(caught.value)


def test_all_faults_of_a_manifest_are_told_at_once_and_many_are_cut(data):
    rows = ["images/none.png,", "images/000.png,masks/none.png", "images/001.png,"]
    with pytest.raises(UserError) as caught:
        load_cases(with_manifest(data, "\n".join(["image,mask", *rows])))
    lines = str(caught.value).split("\n")
    assert [line.split(", ")[0].split(" ")[-2:] for line in lines] == [["line", "2"], ["line", "3"]]
    rows = [f"images/none{number}.png," for number in range(25)]
    with pytest.raises(UserError, match="There are 5 more such lines") as caught:
        load_cases(with_manifest(data, "\n".join(["image,mask", *rows])))
    assert str(caught.value).count("\n") == 20


def test_linked_folders_are_searched_once_and_circles_end(data, tmp_path):
    save(tmp_path / "elsewhere" / "deep" / "z.png", picture(50))
    (data / "images" / "a_link").symlink_to(tmp_path / "elsewhere")
    save(data / "images" / "own" / "y.png", picture(51))
    (data / "images" / "another").symlink_to(data / "images" / "own")
    (data / "images" / "own" / "circle").symlink_to(data / "images")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    assert [case.name for case in load_cases(data)][5:] == ["a_link__deep__z", "own__y"]


def test_manifest_must_be_text_and_inside(data, tmp_path):
    with pytest.raises(UserError, match="UTF-8"):
        load_cases(with_manifest(data, "image\nimages/000.png", "utf-16"))
    with pytest.raises(UserError, match="is not there"):
        load_cases(data, Path("absent.csv"))
    (tmp_path / "out.csv").write_text("image\nimages/000.png\n")
    with pytest.raises(UserError, match="outside"):
        load_cases(data, tmp_path / "out.csv")


def test_unlabelled_folders_keep_group_and_label_but_not_mask_and_split(data, tmp_path):
    other = make_folder(tmp_path / "body", 2)
    with_manifest(other, "image,mask,split,group,label\nimages/000.png,masks/000.png,test,p7,nv\nimages/001.png,,,,\n")
    plain = tmp_path / "plain"
    save(plain / "deep" / "er" / "z.png", picture())
    cases = load_cases(data, unlabelled=[other, plain])
    assert cases[:5] == load_cases(data)
    assert [(c.name, c.mask, c.split, c.group, c.label) for c in cases[5:]] == [
        ("body__000", None, None, "p7", "nv"),
        ("body__001", None, None, "body__001", None),
        ("deep__er__z", None, None, "deep__er__z", None),
    ]


def test_a_picture_named_twice_counts_once(data):
    assert load_cases(data, unlabelled=[data, data / "images"]) == load_cases(data)


def test_folders_of_one_name_do_not_collide(data, tmp_path):
    bodies = [make_folder(tmp_path / parent / "body", 1) for parent in ("x", "y")]
    names = [case.name for case in load_cases(data, unlabelled=bodies)[5:]]
    assert names == ["body__000", "body_2__000"]


def test_empty_or_mixed_unlabelled_folders_are_refused(data, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        load_cases(data, unlabelled=[tmp_path / "empty"])
    save(tmp_path / "mixed" / "a.png", picture())
    save(tmp_path / "mixed" / "a_mask.png", disc())
    with pytest.raises(UserError, match="named as a mask"):
        load_cases(data, unlabelled=[tmp_path / "mixed"])


@pytest.mark.parametrize("name", ["masks", "Mask", "labels", "GroundTruth", "Part1_GroundTruth"])
def test_masks_beside_pictures_are_not_taken_as_images(data, tmp_path, name):
    save(tmp_path / "flat" / "x.png", picture())
    save(tmp_path / "flat" / name / "x.png", disc())
    with pytest.raises(UserError, match="folder named as one of masks"):
        load_cases(data, unlabelled=[tmp_path / "flat"])
    save(data / "images" / name / "000.png", disc())
    with pytest.raises(UserError, match="folder named as one of masks"):
        load_cases(data)


def test_pictures_a_manifest_leaves_out_are_listed(data):
    cases = load_cases(with_manifest(data, "image,mask\nimages/000.png,masks/000.png\nimages/003.png,\n"))
    left = [file.relative_to(data).as_posix() for file in unlisted_pictures(data, cases)]
    assert left == ["images/001.png", "images/002.png", "images/004.png", "masks/001.png", "masks/002.png"]
    (data / "manifest.csv").unlink()
    assert unlisted_pictures(data, load_cases(data)) == []


def test_fingerprint_ignores_order_and_sees_every_field(data):
    cases = load_cases(data)
    first = fingerprint(cases)
    assert fingerprint(cases[::-1]) == first
    changed = [
        [cases[0].in_split("test"), *cases[1:]],
        cases[:-1],
        [Case("000", cases[0].image, cases[1].mask, group="000"), *cases[1:]],
        [Case("000", cases[0].image, cases[0].mask, group="p"), *cases[1:]],
        [Case("000", cases[0].image, cases[0].mask, group="000", label="nv"), *cases[1:]],
        [Case("other", cases[0].image, cases[0].mask, group="000"), *cases[1:]],
    ]
    assert len({first, *map(fingerprint, changed)}) == 1 + len(changed)
    save(data / "images" / "004.png", picture(99))
    assert fingerprint(load_cases(data)) != first


def test_fingerprint_does_not_depend_on_where_the_data_lie(data, tmp_path):
    before = fingerprint(load_cases(data))
    assert fingerprint(load_cases(Path(shutil.move(data, tmp_path / "moved")))) == before


def test_hashes_are_remembered_until_the_file_changes(data, monkeypatch):
    read = []
    original = contents._hash
    monkeypatch.setattr(contents, "_hash", lambda file: (read.append(file), original(file))[1])
    cases = load_cases(data)
    first = content_hashes(cases)
    assert len(read) == len(first) == 8
    assert content_hashes(cases) == first
    assert len(read) == 8
    path = data / "images" / "000.png"
    path.write_bytes(path.read_bytes() + b"x")
    assert content_hashes(cases)[path] != first[path]
    assert len(read) == 9


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"a": 1}', b"\xff\xfe"])
def test_a_damaged_memory_is_done_without(data, damage):
    folder = contents.default_cache_folder()
    first = content_hashes(load_cases(data))
    (folder / "hashes.json").write_bytes(damage)
    assert content_hashes(load_cases(data)) == first


def test_an_unwritable_cache_folder_does_not_stop_hashing(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEWMASK_CACHE", str(tmp_path / "file" / "below"))
    assert len(content_hashes(load_cases(data))) == 8


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert contents.default_cache_folder() == Path(os.environ["FEWMASK_CACHE"])
    monkeypatch.delenv("FEWMASK_CACHE")
    assert contents.default_cache_folder() == Path("xdg") / "fewmask"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert contents.default_cache_folder() == Path.home() / ".cache" / "fewmask"


names = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=8
)


@given(rows=st.lists(st.tuples(names, st.sampled_from(["train", "val", "test", None]), names), max_size=5))
def test_written_cases_read_back(tmp_path_factory, rows):
    import csv

    path = tmp_path_factory.mktemp("cases") / "cases.csv"
    cases = [Case(name, Path(name), None, split, group, None) for name, split, group in rows]
    write_cases(path, [(case, "unlabelled") for case in cases])
    with path.open(encoding="utf-8", newline="") as file:
        back = list(csv.DictReader(file))
    assert [(row["image"], row["split"] or None, row["group"], row["use"]) for row in back] == [
        (case.image.as_posix(), case.split, case.group, "unlabelled") for case in cases
    ]
    assert sorted(path.parent.iterdir()) == [path]


def test_what_is_written_can_be_read_by_others_and_a_failure_leaves_nothing(data, tmp_path, monkeypatch):
    cases = load_cases(data)
    path = tmp_path / "run" / "cases.csv"
    write_cases(path, [(case, "labelled") for case in cases])
    content_hashes(cases)
    for file in (path, contents.default_cache_folder() / "hashes.json"):
        assert file.stat().st_mode & 0o777 == 0o644

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_cases(path, [])
    (data / "images" / "000.png").touch()
    content_hashes(cases)
    assert list(path.parent.iterdir()) == [path]
    assert [file.name for file in contents.default_cache_folder().iterdir()] == ["hashes.json"]


@pytest.mark.skipif(not (SHARED / "ham10000").is_dir(), reason="HAM10000 is not here")
def test_real_sets_load():
    ham = load_cases(SHARED / "ham10000")
    assert len(ham) == 8586
    assert len({case.label for case in ham}) == 7
    assert len({case.group for case in ham}) < len(ham)
    official = load_cases(SHARED / "isic", Path("manifest_isic2017.csv"))
    assert np.unique([case.split for case in official], return_counts=True)[1].tolist() == [529, 1800, 121]
    everything = load_cases(SHARED / "isic", unlabelled=[SHARED / "ham10000", SHARED / "siim_sample"])
    assert len(everything) == 2594 + 8586 + 10
    assert len({case.name for case in everything}) == len(everything)
