"""DICOM files as pictures: windows, inversion, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fewmask.data.reading import image_size, read_image, read_mask
from tests.data.conftest import picture, refused

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def write_dicom(path: Path, values: np.ndarray, **fields: object) -> Path:
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Rows, dataset.Columns = values.shape[-2:] if values.ndim == 2 else values.shape[1:3]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = values.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    dataset.PixelData = values.tobytes()
    for key, value in fields.items():
        setattr(dataset, key, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_dicom_window_is_the_standards_formula(tmp_path):
    stored = np.arange(0, 4000, 10, dtype=np.int16).reshape(20, 20)
    path = write_dicom(
        tmp_path / "ct.dcm", stored, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400
    )
    hounsfield = stored.astype(float) - 1024
    # DICOM PS3.3 C.11.2.1.2.1, linear
    expected = ((hounsfield - (40 - 0.5)) / (400 - 1) + 0.5).clip(0, 1) * 255
    image = read_image(path)
    assert image.shape == (20, 20, 3)
    assert np.abs(image[..., 0] - expected).max() <= 1
    assert image_size(path) == (20, 20)


def test_dicom_without_window_monochrome1_and_no_suffix(tmp_path):
    eight = picture()[..., 0].copy()
    assert np.array_equal(read_image(write_dicom(tmp_path / "a.dcm", eight))[..., 1], eight)
    inverted = write_dicom(tmp_path / "1.2.3", eight, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(read_image(inverted)[..., 1], 255 - eight)
    deep = np.linspace(500, 1500, 100).astype(np.uint16).reshape(10, 10)
    image = read_image(write_dicom(tmp_path / "b.dcm", deep))
    assert (image.min(), image.max()) == (0, 255)


def test_dicom_refusals(tmp_path):
    frames = np.zeros((3, 4, 4), np.uint8)
    assert refused(write_dicom(tmp_path / "film.dcm", frames, NumberOfFrames=3), "3 frames")
    assert refused(write_dicom(tmp_path / "huge.dcm", np.zeros((2, 2), np.uint8), Rows=60000, Columns=60000), "million")
    assert refused(write_dicom(tmp_path / "cut.dcm", np.zeros((2, 2), np.uint8), Rows=500, Columns=500), "decoded")
    assert refused(write_dicom(tmp_path / "mask.dcm", np.zeros((2, 2), np.uint8)), "PNG", read_mask)


def test_dicom_without_pydicom_says_what_to_install(tmp_path, monkeypatch):
    path = write_dicom(tmp_path / "a.dcm", np.zeros((2, 2), np.uint8))
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    assert refused(path, r"pip install fewmask\[dicom\]")


@pytest.mark.skipif(not (SHARED / "siim_sample").is_dir(), reason="the SIIM sample is not here")
def test_real_dicom_files_are_read():
    files = sorted((SHARED / "siim_sample").glob("*.dcm"))
    assert len(files) == 10
    for file in files[:3]:
        image = read_image(file)
        assert image.shape == (*image_size(file), 3) == (1024, 1024, 3)
        assert image.std() > 20
