"""Bad input and faults: one clear sentence, exit 1, nothing lost. Faults of single rooms are tested beside them."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.commands.conftest import DISTILLING, TINY, read_rows, write_rows


def images(data):
    return sorted((data / "images").iterdir())


def masks(data):
    return sorted((data / "masks").iterdir())


def gigapixel(path):
    """Write a PNG whose header promises 10^10 pixels."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)


def nan_tiff(path):
    import tifffile

    tifffile.imwrite(path, np.full((64, 80), np.nan, np.float32))


def replace_image(data, suffix, write):
    """Put another file in the place of the first image, whatever its format, and in the manifest."""
    old = images(data)[0]
    new = old.with_suffix(suffix)
    old.unlink()
    write(new)
    manifest = data / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(old.name, new.name))
    return new.name


def grow_mask(data, change):
    path = masks(data)[0]
    Image.fromarray(change(np.asarray(Image.open(path)))).save(path)
    return path.name


def drop_manifest(data):
    (data / "manifest.csv").unlink()


def add_row(data, row):
    with (data / "manifest.csv").open("a") as file:
        file.write(row + "\n")


def spoil_zero_byte(data):
    images(data)[0].write_bytes(b"")
    return images(data)[0].name


def spoil_truncated(data):
    path = images(data)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path.name


def spoil_html(data):
    images(data)[0].write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    return images(data)[0].name


def spoil_gigapixel(data):
    return replace_image(data, ".png", gigapixel)


def spoil_nan(data):
    return replace_image(data, ".tif", nan_tiff)


def spoil_off_by_one(data):
    return grow_mask(data, lambda mask: mask[:-1])


def spoil_transposed(data):
    return grow_mask(data, lambda mask: np.ascontiguousarray(mask.T))


def spoil_colour_mask(data):
    rng = np.random.default_rng(0)
    return grow_mask(data, lambda mask: rng.integers(0, 255, (*mask.shape, 3), dtype=np.uint8))


def spoil_many_values(data):
    return grow_mask(data, lambda mask: (np.indices(mask.shape).sum(0) * 3 % 250).astype(np.uint8))


def spoil_zero_byte_mask(data):
    masks(data)[0].write_bytes(b"")
    return masks(data)[0].name


def spoil_missing_mask(data):
    name = masks(data)[0].name
    masks(data)[0].unlink()
    return name


def spoil_missing_image(data):
    name = images(data)[0].name
    images(data)[0].unlink()
    return name


def spoil_extra_mask(data):
    drop_manifest(data)
    shutil.copy(masks(data)[0], data / "masks" / "nobody.png")
    return "nobody"


def spoil_two_images_one_stem(data):
    drop_manifest(data)
    path = images(data)[0]
    Image.open(path).save(path.with_suffix(".png"))
    return path.stem


def spoil_case_collision(data):
    drop_manifest(data)
    path = images(data)[0]
    shutil.copy(path, path.with_name(path.stem.upper() + path.suffix))
    return path.stem.upper()


def spoil_unicode_collision(data):
    drop_manifest(data)
    for name in ("caf\u00e9.jpg", "cafe\u0301.jpg"):
        shutil.copy(images(data)[0], data / "images" / name)
    return "caf"


def spoil_unknown_split(data):
    text = (data / "manifest.csv").read_text().splitlines()
    cells = text[1].split(",")
    cells[text[0].split(",").index("split")] = "trian"
    (data / "manifest.csv").write_text("\n".join([text[0], ",".join(cells), *text[2:]]) + "\n")
    return "trian"


def spoil_escape(data):
    add_row(data, "../secret.jpg,,,,")
    return "secret.jpg"


def spoil_absolute(data):
    add_row(data, f"{data / 'elsewhere.jpg'},,,,")
    return "elsewhere.jpg"


def spoil_duplicate_row(data):
    lines = (data / "manifest.csv").read_text().splitlines()
    add_row(data, lines[1])
    return lines[1].split(",")[0]


def spoil_no_image_column(data):
    text = (data / "manifest.csv").read_text()
    (data / "manifest.csv").write_text(text.replace("image,", "picture,", 1))
    return "image"


def spoil_torn_group(data):
    lines = (data / "manifest.csv").read_text().splitlines()
    head = lines[0].split(",")
    rows = [dict(zip(head, line.split(","), strict=True)) for line in lines[1:]]
    labelled = [row for row in rows if row["mask"]]
    for row in rows:
        row["group"] = row["group"] or "x"
    labelled[0].update(split="train", group="patient_7")
    labelled[1].update(split="test", group="patient_7")
    text = [",".join(row[name] for name in head) for row in rows]
    (data / "manifest.csv").write_text("\n".join([lines[0], *text]) + "\n")
    return "patient_7"


def spoil_no_masks(data):
    drop_manifest(data)
    shutil.rmtree(data / "masks")
    return "mask"


def spoil_one_mask(data):
    drop_manifest(data)
    for path in masks(data)[1:]:
        path.unlink()
    return "two"


def spoil_empty_folder(data):
    shutil.rmtree(data)
    data.mkdir()
    return "images"


def spoil_no_folder(data):
    shutil.rmtree(data)
    return str(data)


def spoil_file_as_folder(data):
    shutil.rmtree(data)
    data.write_text("not a folder")
    return str(data)


def spoil_tiny_image(data):
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(images(data)[0])
    return images(data)[0].name


SPOILS = [value for name, value in sorted(globals().items()) if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__.removeprefix("spoil_"))
def test_bad_data_end_the_run_with_a_sentence_that_names_the_culprit(spoil, data, tmp_path, fewmask):
    culprit = spoil(data)
    code, out, err = fewmask("run", data, "--out", tmp_path / "run", *TINY)
    assert code == 1, out + err
    message = err[err.rindex("fewmask: ") :]
    assert culprit in message, message
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "pretrain").exists()


SETTINGS = [
    ("model.encoder=vit_tiny_patch17", "vit_tiny_patch17"),
    ("model.size=30", "30"),
    ("model.segmenter=unet", "CNN"),
    ("model.segmenter=unett", "Did you mean 'unet'"),
    ("model.weights=nowhere", "nowhere"),
    ("model.encoder_settings.deep=3", "deep"),
    ("pretrain.method.mask_ratio=1.0", "A mask ratio of 1.0"),
    ("pretrain.method.mask_ratio=0.01", "mask ratio of 0.01"),
    ("pretrain.method.name=maee", "Did you mean 'mae'"),
    ("pretrain.method.ratio=0.5", "Unknown setting 'pretrain.method.ratio'"),
    ("finetune.method.average=1.5", "average"),
    ("finetune.epochs=2.5", "finetune.epochs"),
    ("data.val_fraction=0.9", "val_fraction"),
    ("run.device=tpu", "run.device"),
    ("nonsense", "key=value"),
    ("finetune.betas=[2, 3]", "finetune.betas"),
    ("finetune.lr=inf", "finetune.lr"),
    ("model.encoder_settings.size=64", "model.encoder_settings.size"),
    ("run.precision=fp16", "run.precision=fp16 needs a CUDA device"),
    ("run.out=elsewhere", "contradicts the command line"),
    ("pretrain.share=0", "pretrain.share"),
]


@pytest.mark.parametrize(("setting", "words"), SETTINGS, ids=[setting for setting, _ in SETTINGS])
def test_bad_settings_end_with_a_sentence(setting, words, drawn, tmp_path, fewmask):
    code, out, err = fewmask("run", drawn, "--out", tmp_path / "run", *DISTILLING, "distill.epochs=0", setting)
    assert code == 1, out + err
    assert words in err[err.rindex("fewmask: ") :]
    assert "Traceback" not in err


def test_one_image_a_batch_that_cannot_be_normalised(drawn, tmp_path, fewmask):
    given = (f"data.root={drawn}", f"run.out={tmp_path / 'run'}", "run.device=cpu")
    network = ("model.encoder=efficientnet_lite0", "model.weights=none", "model.size=32", "finetune.batch_size=1")
    code, _, err = fewmask("finetune", "unet", *given, *network, "finetune.epochs=1")
    assert code == 1
    assert "raise finetune.batch_size to at least 2" in err
    assert "Traceback" not in err


def test_a_read_only_place_for_the_run(drawn, tmp_path, fewmask):
    (tmp_path / "file").write_text("")
    code, _, err = fewmask("run", drawn, "--out", tmp_path / "file" / "run", *TINY)
    assert code == 1
    assert "Cannot write into" in err


def test_data_that_changed_between_two_calls(data, tmp_path, fewmask):
    assert fewmask("run", data, "--out", tmp_path / "run", *TINY)[0] == 0
    picture = np.asarray(Image.open(images(data)[0])).copy()
    picture[:20] = 0
    Image.fromarray(picture).save(images(data)[0])
    before = (tmp_path / "run" / "model.onnx").read_bytes()
    code, _, err = fewmask("run", data, "--out", tmp_path / "run", *TINY)
    assert code == 1
    assert "The data changed since" in err
    assert (tmp_path / "run" / "model.onnx").read_bytes() == before


def test_data_may_be_mended_before_anything_was_learnt(data, tmp_path, fewmask):
    given = ("data.root=" + str(data), "run.out=" + str(tmp_path / "run"), "run.device=cpu", "model.size=32")
    network = ("model.encoder=vit_micro_patch8", "pretrain.epochs=1", "pretrain.min_epoch_steps=1")
    rows = read_rows(data / "manifest.csv")
    write_rows(data / "manifest.csv", [row | {"split": "test"} for row in rows if row["mask"]])
    code, _, err = fewmask("pretrain", "mae", *given, *network)
    assert code == 1
    assert "nothing is left to learn from" in err
    write_rows(data / "manifest.csv", rows)
    assert fewmask("pretrain", "mae", *given, *network)[0] == 0


@pytest.mark.usefixtures("unexported")
def test_other_settings_for_the_same_run(drawn, tmp_path, fewmask):
    assert fewmask("run", drawn, "--out", tmp_path / "run", *TINY)[0] == 0
    code, _, err = fewmask("run", drawn, "--out", tmp_path / "run", *TINY, "run.seed=5")
    assert code == 1
    assert "run.seed=0, and you asked for 5" in err
    for inside in (drawn / "images" / "run", drawn / "masks"):
        code, _, err = fewmask("run", drawn, "--out", inside, *TINY)
        assert code == 1
        assert "its pictures would be taken for data; choose another output folder" in err
        assert not (inside / "run.json").exists()
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text()[:50])
    code, _, err = fewmask("run", drawn, "--out", tmp_path / "run", *TINY)
    assert code == 1
    assert "run.json cannot be read" in err


@pytest.mark.usefixtures("unexported")
def test_a_full_disk_while_saving_loses_nothing(drawn, tmp_path, monkeypatch, fewmask):
    import fewmask.engine.checkpoint as checkpoint

    real = checkpoint.save_file

    def full(tensors, path, metadata=None):
        real(tensors, path, metadata=metadata)
        os.truncate(path, 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, _, err = fewmask("run", drawn, "--out", tmp_path / "run", *TINY)
    assert code == 1
    assert "No space left on device" in err
    assert "it resumes" in err
    assert not list((tmp_path / "run").rglob("*.tmp"))
    monkeypatch.setattr(checkpoint, "save_file", real)
    code, _, err = fewmask("run", drawn, "--out", tmp_path / "run", *TINY)
    assert code == 0, err


def test_commands_without_a_run(tmp_path, drawn, fewmask):
    for words in (("evaluate", tmp_path / "no", drawn), ("export", tmp_path / "no"), ("report", tmp_path / "no")):
        code, _, err = fewmask(*words)
        assert code == 1, words
        assert str(tmp_path / "no") in err


def test_wrong_usage_is_exit_code_2(fewmask):
    assert fewmask("run")[0] == 2
    assert fewmask("fly")[0] == 2
    assert fewmask("demo", "--nonsense")[0] == 2


def test_check_lists_all_faults_at_once_as_json(data, fewmask):
    first, second = images(data)[:2]
    first.write_bytes(b"")
    second.write_text("<html></html>")
    code, out, _ = fewmask("check", data, "--json")
    assert code == 1
    named = json.dumps(json.loads(out)["errors"])
    assert first.name in named
    assert second.name in named
