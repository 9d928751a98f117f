"""Importers of public sets: tiny copies of the publishers' layouts become the layout that the loader reads."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fewmask.data import rle
from fewmask.data.manifest import load_cases
from fewmask.data.reading import image_size, read_mask
from fewmask.data.sources import SOURCES, layout
from fewmask.types import Case, UserError
from tests.data.conftest import disc, picture, save

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def pair(images: Path, masks: Path, name: str, seed: int, suffix: str = "_segmentation.png") -> None:
    save(images / f"{name}.jpg", picture(seed))
    save(masks / f"{name}{suffix}", disc(radius=6 + seed).astype(np.uint8) * 255)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def make_isic2016(raw: Path) -> None:
    for number, part in enumerate(("Training", "Test")):
        # The training archive of 2016 nests its folder in one of the same name for some unpackers.
        folder = raw / f"ISBI2016_ISIC_Part1_{part}_Data"
        nested = folder / folder.name if part == "Training" else folder
        pair(
            nested, raw / f"ISBI2016_ISIC_Part1_{part}_GroundTruth", f"ISIC_000000{number}", number, "_Segmentation.png"
        )
    write(raw / "ISBI2016_ISIC_Part3_Training_GroundTruth.csv", "ISIC_0000000,malignant")
    write(raw / "ISBI2016_ISIC_Part3_Test_GroundTruth.csv", "ISIC_0000001,0.0")


def make_isic2017(raw: Path) -> None:
    for number, part in enumerate(("Training", "Validation", "Test_v2")):
        name = f"ISIC_000000{number}"
        pair(raw / f"ISIC-2017_{part}_Data", raw / f"ISIC-2017_{part}_Part1_GroundTruth", name, number)
        save(raw / f"ISIC-2017_{part}_Data" / f"{name}_superpixels.png", picture(9))
        truth = ("1.0,0.0", "0.0,1.0", "0.0,0.0")[number]
        write(
            raw / f"ISIC-2017_{part}_Part3_GroundTruth.csv", "image_id,melanoma,seborrheic_keratosis", f"{name},{truth}"
        )


def make_isic2018(raw: Path) -> None:
    for number, part in enumerate(("Training", "Validation", "Test")):
        images, masks = raw / f"ISIC2018_Task1-2_{part}_Input", raw / f"ISIC2018_Task1_{part}_GroundTruth"
        pair(images, masks, f"ISIC_000000{number}", number)
        write(images / "LICENSE.txt", "CC-0")


def make_isic2019(raw: Path) -> None:
    for number, name in enumerate(("ISIC_0000000", "ISIC_0000001_downsampled", "ISIC_0000002")):
        save(raw / "ISIC_2019_Training_Input" / f"{name}.jpg", picture(number))
    write(
        raw / "ISIC_2019_Training_GroundTruth.csv",
        "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK",
        "ISIC_0000000,0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0",
        "ISIC_0000001_downsampled,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0",
        "ISIC_0000002,0.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0,0.0",
    )
    write(
        raw / "ISIC_2019_Training_Metadata.csv",
        "image,age_approx,anatom_site_general,lesion_id,sex",
        "ISIC_0000000,55.0,anterior torso,BCN_0001,female",
        "ISIC_0000001_downsampled,30.0,,,female",
        "ISIC_0000002,30.0,,BCN_0001,female",
    )


def make_ham10000(raw: Path) -> None:
    for number in range(3):
        images = raw / f"HAM10000_images_part_{1 + number // 2}"
        pair(images, raw / "HAM10000_segmentations_lesion_tschandl", f"ISIC_002430{number}", number)
    write(
        raw / "HAM10000_metadata.csv",
        "lesion_id,image_id,dx,dx_type,age,sex,localization",
        "HAM_0000118,ISIC_0024300,bkl,histo,80.0,male,scalp",
        "HAM_0000118,ISIC_0024301,bkl,histo,80.0,male,scalp",
        "HAM_0002730,ISIC_0024302,nv,histo,,male,scalp",
    )


def make_ph2(raw: Path) -> None:
    for number, name in enumerate(("IMD003", "IMD009", "IMD061")):
        case = raw / "PH2 Dataset images" / name
        save(case / f"{name}_Dermoscopic_Image" / f"{name}.bmp", picture(number))
        save(case / f"{name}_lesion" / f"{name}_lesion.bmp", disc())
        save(case / f"{name}_roi" / f"{name}_R1_Label1.bmp", disc())
    write(
        raw / "PH2_dataset.txt",
        "||   Name || Histological Diagnosis || Clinical Diagnosis || Asymmetry | Pigment Network | ... || Colors ||",
        "|| IMD003 ||                        ||                  0 ||         0 |               T | ... ||      4 ||",
        "|| IMD009 ||                        ||                  1 ||         0 |               T | ... ||      3 ||",
        "|| IMD061 ||              Melanoma  ||                  2 ||         2 |              AT | ... ||   3  4 ||",
        "",
        "Legends:",
    )


def make_siim_acr(raw: Path) -> None:
    dicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    for number in range(4):
        name = f"1.2.3.{number}"
        file = dicom.Dataset()
        file.PatientID, file.Rows, file.Columns = f"patient{number // 2}", 40, 60
        file.SOPClassUID, file.SOPInstanceUID = SecondaryCaptureImageStorage, name
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 8, 8, 7, 0
        file.PixelData = picture(number)[..., 0].tobytes()
        file.file_meta = dicom.dataset.FileMetaDataset()
        file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = raw / "dicom-images-train" / f"study{number}" / f"{name}.dcm"
        path.parent.mkdir(parents=True)
        file.save_as(path, enforce_file_format=True)
    left, right = disc(), disc()
    left[:, 30:] = False
    right[:, :30] = False
    write(
        raw / "train-rle.csv",
        "ImageId, EncodedPixels",
        f"1.2.3.0, {rle.encode(left)}",
        f"1.2.3.0, {rle.encode(right)}",
        "1.2.3.1, -1",
        f"1.2.3.2,{rle.encode(right)}",
    )


MAKERS: dict[str, Callable[[Path], None]] = {
    name.removeprefix("make_"): value for name, value in list(globals().items()) if name.startswith("make_")
}


def imported(name: str, tmp_path: Path) -> dict[str, Case]:
    MAKERS[name](tmp_path / "raw")
    return {case.name: case for case in load_cases(SOURCES[name](tmp_path / "raw", tmp_path / "data"))}


def facts(cases: dict[str, Case]) -> dict[str, tuple[str | None, str, str | None, bool]]:
    return {case.name: (case.split, case.group, case.label, case.mask is not None) for case in cases.values()}


def test_every_source_is_tested() -> None:
    assert MAKERS.keys() == SOURCES.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_every_mask_fits_its_image(name: str, tmp_path: Path) -> None:
    for case in imported(name, tmp_path).values():
        if case.mask is not None:
            assert read_mask(case.mask).mask.shape == image_size(case.image)


@pytest.mark.parametrize("name", SOURCES)
def test_an_import_cut_short_is_completed_and_a_repeated_one_changes_nothing(name: str, tmp_path: Path) -> None:
    imported(name, tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    (tmp_path / "data" / "manifest.csv").unlink()
    next((tmp_path / "data" / "images").iterdir()).unlink()
    SOURCES[name](tmp_path / "raw", tmp_path / "data")
    assert {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_part_is_named(name: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path / "raw")
    optional = {"HAM10000_segmentations_lesion_tschandl", "dicom-images-train"}
    for folder in sorted(path for path in (tmp_path / "raw").iterdir() if path.is_dir() and path.name not in optional):
        shutil.move(folder, tmp_path / "away")
        with pytest.raises(UserError, match=f"no folder '{folder.name}'"):
            SOURCES[name](tmp_path / "raw", tmp_path / "data")
        assert not (tmp_path / "data" / "manifest.csv").exists()
        shutil.move(tmp_path / "away", folder)


@pytest.mark.parametrize("name", SOURCES)
def test_a_folder_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        SOURCES[name](tmp_path / "nowhere", tmp_path / "data")


def test_isic2016(tmp_path: Path) -> None:
    assert facts(imported("isic2016", tmp_path)) == {
        "ISIC_0000000": ("train", "ISIC_0000000", "malignant", True),
        "ISIC_0000001": ("test", "ISIC_0000001", "benign", True),
    }


def test_isic2017_passes_over_superpixels(tmp_path: Path) -> None:
    assert facts(imported("isic2017", tmp_path)) == {
        "ISIC_0000000": ("train", "ISIC_0000000", "melanoma", True),
        "ISIC_0000001": ("val", "ISIC_0000001", "seborrheic_keratosis", True),
        "ISIC_0000002": ("test", "ISIC_0000002", "nevus", True),
    }


def test_isic2018(tmp_path: Path) -> None:
    assert {name: row[0] for name, row in facts(imported("isic2018", tmp_path)).items()} == {
        "ISIC_0000000": "train",
        "ISIC_0000001": "val",
        "ISIC_0000002": "test",
    }


def test_isic2019_keeps_the_archives_ids(tmp_path: Path) -> None:
    assert facts(imported("isic2019", tmp_path)) == {
        "ISIC_0000000": (None, "BCN_0001", "nv", False),
        "ISIC_0000001": (None, "ISIC_0000001", "mel", False),
        "ISIC_0000002": (None, "BCN_0001", "scc", False),
    }


@pytest.mark.parametrize("with_masks", [True, False])
def test_ham10000_without_its_segmentations_is_unlabelled(tmp_path: Path, with_masks: bool) -> None:
    make_ham10000(tmp_path / "raw")
    if not with_masks:
        shutil.rmtree(tmp_path / "raw" / "HAM10000_segmentations_lesion_tschandl")
    cases = load_cases(SOURCES["ham10000"](tmp_path / "raw", tmp_path / "data"))
    assert facts({case.name: case for case in cases}) == {
        "ISIC_0024300": (None, "HAM_0000118", "bkl", with_masks),
        "ISIC_0024301": (None, "HAM_0000118", "bkl", with_masks),
        "ISIC_0024302": (None, "HAM_0002730", "nv", with_masks),
    }


def test_ham10000_reads_dataverses_table(tmp_path: Path) -> None:
    make_ham10000(tmp_path / "raw")
    table = tmp_path / "raw" / "HAM10000_metadata.csv"
    rows = list(csv.reader(table.read_text().splitlines()))
    (tmp_path / "raw" / "HAM10000_metadata.tab").write_text("\n".join("\t".join(f'"{c}"' for c in row) for row in rows))
    table.unlink()
    cases = load_cases(SOURCES["ham10000"](tmp_path / "raw", tmp_path / "data"))
    assert [case.label for case in cases] == ["bkl", "bkl", "nv"]


def test_ph2(tmp_path: Path) -> None:
    assert {name: row[2] for name, row in facts(imported("ph2", tmp_path)).items()} == {
        "IMD003": "common_nevus",
        "IMD009": "atypical_nevus",
        "IMD061": "melanoma",
    }


def test_siim_acr_unites_the_rows_of_an_image(tmp_path: Path) -> None:
    cases = imported("siim_acr", tmp_path)
    assert facts(cases) == {
        "1.2.3.0": (None, "patient0", "pneumothorax", True),
        "1.2.3.1": (None, "patient0", "no_pneumothorax", True),
        "1.2.3.2": (None, "patient1", "pneumothorax", True),
        "1.2.3.3": (None, "patient1", None, False),
    }
    masks = [read_mask(cases[f"1.2.3.{number}"].mask or Path()).mask for number in range(3)]
    assert np.array_equal(masks[0], disc())
    assert not masks[1].any()
    assert 0 < masks[2].sum() < disc().sum()


def test_siim_acr_names_what_is_damaged(tmp_path: Path) -> None:
    make_siim_acr(tmp_path / "raw")
    table = tmp_path / "raw" / "train-rle.csv"
    text = table.read_text()
    table.write_text(text + "1.2.3.2, 5 6 7\n")
    with pytest.raises(UserError, match=r"train-rle\.csv' has a damaged mask for '1\.2\.3\.2'"):
        SOURCES["siim_acr"](tmp_path / "raw", tmp_path / "data")
    table.write_text(text + "9.9.9, -1\n")
    with pytest.raises(UserError, match=r"lacks 1 DICOM files .* '9\.9\.9\.dcm'"):
        SOURCES["siim_acr"](tmp_path / "raw", tmp_path / "data")


@pytest.mark.skipif(not (SHARED / "siim_sample").is_dir(), reason="the SIIM-ACR sample is not in ../shared/data")
def test_siim_acr_sample(tmp_path: Path) -> None:
    cases = load_cases(SOURCES["siim_acr"](SHARED / "siim_sample", tmp_path))
    shares = [read_mask(case.mask).mask.mean() for case in cases if case.mask is not None]
    assert len(cases) == len(shares) == 10
    assert sum(share > 0 for share in shares) == 5
    assert all(image_size(case.image) == (1024, 1024) for case in cases)
    assert len({case.group for case in cases}) == 10


@pytest.mark.parametrize("name", ["isic2016", "isic2018"])
def test_an_image_without_its_mask_is_named(name: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path / "raw")
    next((tmp_path / "raw").rglob("*0000001_*egmentation.png")).unlink()
    with pytest.raises(UserError, match=r"ISIC_0000001\.jpg' has no mask"):
        SOURCES[name](tmp_path / "raw", tmp_path / "data")


def test_two_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    entries = [layout.Entry(name, save(tmp_path / f"{i}.png", picture(i))) for i, name in enumerate(("a", "A"))]
    with pytest.raises(UserError, match="second picture named 'A'"):
        layout.lay_out(tmp_path / "raw", tmp_path / "data", entries)


def test_a_folder_of_the_users_own_is_not_written_into(tmp_path: Path) -> None:
    make_isic2018(tmp_path / "raw")
    own = tmp_path / "own"
    write(own / "manifest.csv", "image", "images/mine.png")
    before = (own / "manifest.csv").read_text()
    for out, words in (
        (own, r"another origin \('manifest\.csv'"),
        (own / "manifest.csv", "is a file"),
        (tmp_path / "raw", "raw download"),
        (tmp_path / "raw" / "imported", "raw download"),
    ):
        with pytest.raises(UserError, match=words):
            SOURCES["isic2018"](tmp_path / "raw", out)
    assert [path.name for path in own.iterdir()] == ["manifest.csv"]
    assert (own / "manifest.csv").read_text() == before
    assert not (tmp_path / "raw" / "imported").exists()


@pytest.mark.parametrize(
    ("name", "table", "words"),
    [
        ("isic2017", "ISIC-2017_Training_Part3_GroundTruth.csv", r"'x1' in column 'melanoma'"),
        ("isic2019", "ISIC_2019_Training_GroundTruth.csv", r"'x1' in column 'MEL'"),
    ],
)
def test_a_garbled_number_in_a_table_is_named(name: str, table: str, words: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path / "raw")
    path = tmp_path / "raw" / table
    path.write_text(path.read_text().replace("1.0", "x1").replace(",0.0,1.0", ",x1,1.0").replace("0.0,x1", "x1,x1"))
    with pytest.raises(UserError, match=words) as caught:
        SOURCES[name](tmp_path / "raw", tmp_path / "data")
    assert table in str(caught.value)


def test_a_table_that_is_no_text_is_named(tmp_path: Path) -> None:
    make_isic2016(tmp_path / "raw")
    (tmp_path / "raw" / "ISBI2016_ISIC_Part3_Training_GroundTruth.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"Part3_Training_GroundTruth\.csv' cannot be read as a text table"):
        SOURCES["isic2016"](tmp_path / "raw", tmp_path / "data")


def test_files_are_linked_and_copied_where_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "a.png", picture())
    layout.place(source, tmp_path / "link.png")
    assert source.samefile(tmp_path / "link.png")

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    layout.place(source, tmp_path / "copy.png")
    assert not source.samefile(tmp_path / "copy.png")
    assert source.read_bytes() == (tmp_path / "copy.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "copy.png", "link.png"]
