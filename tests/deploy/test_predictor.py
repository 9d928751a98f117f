"""The predictor: closed-form answers, one sentence for every mistake, and no torch."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import fewmask
from fewmask.deploy.predictor import Predictor
from fewmask.types import UserError
from tests.deploy.darkness import GAIN, SIZE, dark_square, darkness_network, write_darkness


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_darkness(tmp_path_factory.mktemp("model") / "model.onnx", threshold=0.5, metrics={"dice": 0.9})


@pytest.mark.parametrize(("height", "width"), [(SIZE, SIZE), (2 * SIZE, 3 * SIZE), (300, 201)])
def test_a_dark_quarter_is_found_where_it_is(model: Path, height: int, width: int) -> None:
    image, truth = dark_square(height, width)
    predictor = fewmask.load(model)
    probability = predictor(image)
    assert probability.shape == (height, width)
    assert probability.dtype == np.float32
    logit = GAIN * (0.485 - 10 / 255) / 0.229
    assert probability[0, 0] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
    mask = predictor.mask(image)
    # The edge may be off by half of a pixel of the network's grid.
    assert (mask != truth).mean() <= (height + width) / 2 * (max(height, width) / SIZE) / (height * width)


def test_a_path_an_array_and_a_view_give_the_same(model: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    predictor = Predictor(model)
    expected = predictor(image)
    assert np.array_equal(predictor(tmp_path / "a.png"), expected)
    assert np.array_equal(predictor(str(tmp_path / "a.png")), expected)
    assert np.array_equal(predictor(np.asfortranarray(image)), expected)
    assert np.array_equal(predictor(image[:, ::-1]), predictor(image[:, ::-1].copy()))
    assert np.array_equal(predictor.mask(image), expected >= 0.5)
    assert predictor.metadata["metrics"] == {"dice": 0.9}


def test_a_photo_on_its_side_is_read_upright(model: Path, tmp_path: Path) -> None:
    image, _ = dark_square(64, 96)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(np.rot90(image).copy()).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(Predictor(model).mask(tmp_path / "turned.png"), Predictor(model).mask(image))


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((5, 5, 3), np.float32), "uint8"),
        (np.zeros((5, 5), np.uint8), "shape"),
        (np.zeros((5, 5, 4), np.uint8), "shape"),
        (np.zeros((0, 5, 3), np.uint8), "at least one pixel"),
        ([[1, 2, 3]], "not list"),
    ],
)
def test_a_wrong_array_is_a_sentence(model: Path, image: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Predictor(model)(image)


def test_a_wrong_file_is_a_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no file"):
        fewmask.load(tmp_path / "missing.onnx")
    for name, content in {"empty": b"", "text": b"hello" * 99, "png": b"\x89PNG\r\n\x1a\n" + bytes(60)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be opened as an ONNX model"):
            fewmask.load(tmp_path / name)
    onnx.save(darkness_network(), tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="not one made by fewmask"):
        fewmask.load(tmp_path / "foreign.onnx")
    whole = write_darkness(tmp_path / "whole.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError):
        fewmask.load(tmp_path / "cut.onnx")
    assert capfd.readouterr() == ("", "")


def test_damaged_metadata_is_a_sentence(tmp_path: Path) -> None:
    path = write_darkness(tmp_path / "m.onnx")
    damaged = onnx.load(path)
    next(entry for entry in damaged.metadata_props if entry.key == "threshold").value = "half"
    onnx.save(damaged, path)
    with pytest.raises(UserError, match="damaged metadata"):
        Predictor(path)


def run_without_torch(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code where importing torch, or anything that stands on it, fails as if it were not installed."""
    block = """
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {"torch", "torchvision", "timm", "segmentation_models_pytorch", "onnx"}:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Absent())
    """
    program = textwrap.dedent(block) + textwrap.dedent(code)
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_an_exported_file_needs_no_torch(model: Path, tmp_path: Path) -> None:
    image, _ = dark_square(70, 50)
    Image.fromarray(image).save(tmp_path / "a.png")
    code = """
        import fewmask, numpy as np
        predictor = fewmask.load(sys.argv[1])
        np.save(sys.argv[3], predictor(sys.argv[2]))
        from fewmask.commands.predict import predict
        from pathlib import Path
        raise SystemExit(predict(Path(sys.argv[1]), [sys.argv[2]], Path(sys.argv[4]), True, None, False))
    """
    done = run_without_torch(code, str(model), str(tmp_path / "a.png"), str(tmp_path / "p.npy"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert np.array_equal(np.load(tmp_path / "p.npy"), Predictor(model)(image))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a.png")) > 0, Predictor(model).mask(image))


def test_a_run_folder_without_torch_is_a_sentence(tmp_path: Path) -> None:
    code = """
        import fewmask
        from fewmask.types import UserError
        try:
            fewmask.load(sys.argv[1])
        except UserError as error:
            print(error)
    """
    done = run_without_torch(code, str(tmp_path))
    assert "needs torch" in done.stdout, done.stderr


def test_importing_the_package_imports_neither_numpy_nor_torch() -> None:
    code = "import sys, fewmask; print({'numpy', 'torch', 'onnxruntime', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
