"""A run folder as a real chain leaves it, with drawn pictures and made-up but consistent numbers."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

PIECES = frozenset({"audit", "manifest", "pretrain", "finetune", "metrics", "cases", "pictures", "export"})
LABELS = ("melanoma", "nevus", "keratosis")
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path, drawn: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Return a function that gives a run folder: make_run(name, seed=0, without=("pretrain",), splits=("val",))."""

    def make(name: str = "isic-mae", **settings: Any) -> Path:
        key = repr(sorted(settings.items()))
        if key not in drawn:
            drawn[key] = write_run(tmp_path_factory.mktemp("drawn") / "run", **settings)
        return Path(shutil.copytree(drawn[key], tmp_path / name))

    return make


@pytest.fixture(scope="session")
def drawn() -> dict[str, Path]:
    """Run folders written so far, by their settings: drawing one takes longer than copying it."""
    return {}


def write_run(
    folder: Path,
    seed: int = 0,
    without: Sequence[str] = (),
    splits: Sequence[str] = ("val", "test"),
    num_cases: int = 90,
    num_steps: int = 40,
    status: str = "done",
) -> Path:
    """Write a run folder without the named pieces (see PIECES)."""
    assert not set(without) - PIECES
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    write(folder / "run.json", run_facts(seed, status))
    pieces = PIECES - set(without)
    if "audit" in pieces:
        write(folder / "audit.json", audit_facts())
    if "manifest" in pieces:
        write_manifest(folder / "cases.csv", num_cases)
    if "pretrain" in pieces:
        write_stage(folder / "pretrain", rng, num_steps, "mae")
        write_previews(folder / "pretrain" / "preview", rng)
    if "finetune" in pieces:
        write_stage(folder / "finetune", rng, num_steps, "segment")
    if "metrics" in pieces:
        write(folder / "metrics.json", {split: split_metrics(rng, num_cases) for split in splits})
    for split in splits:
        if "cases" in pieces:
            write_case_rows(folder / f"cases_{split}.csv", rng, num_cases)
        if "pictures" in pieces:
            write_pictures(folder / "pictures" / split, rng)
    if "export" in pieces:
        write(folder / "export.json", export_facts())
    return folder


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def run_facts(seed: int, status: str) -> dict[str, Any]:
    method = {"name": "mae", "mask_ratio": 0.75}
    return {
        "verb": "run",
        "command": f"fewmask run isic --out runs/isic-mae data.label_fraction=0.1 run.seed={seed}",
        "config": {
            "run": {"seed": seed, "time": "1h30m", "device": "auto", "out": "/home/ada/runs/isic-mae"},
            "data": {"root": "/home/ada/isic", "manifest": "manifest_isic2017.csv", "label_fraction": 0.1},
            "model": {"encoder": "efficientnet_lite0", "weights": "packaged", "segmenter": "unet", "size": 256},
            "pretrain": {"method": method, "epochs": 40, "lr": 0.00015, "betas": [0.9, 0.95]},
            "finetune": {"method": {"name": "segment"}, "epochs": 60, "lr": 0.001 * (1 + seed)},
        },
        "versions": {"python": "3.11.9", "fewmask": "0.1.0", "torch": "2.15.0", "timm": "1.0.31", "numpy": "2.3.5"},
        "git": "4f1c09ab7d21",
        "threads": 2,
        "data": {"root": "/home/ada/isic", "fingerprint": "9b1fd0c2a7e4553e8801", "num_cases": 11180},
        "started": "2026-03-04 15:48:12",
        "finished": "2026-03-04 17:20:41",
        "status": status,
        "seconds": 5549.2,
    }


def audit_facts() -> dict[str, Any]:
    small = [f"ISIC_00{number}.jpg" for number in range(12100, 12114)]
    return {
        "errors": [],
        "warnings": [
            {"code": "small-image", "files": small, "message": "14 images are smaller than the working size of 256."},
            {"code": "gray-mask", "files": ["ISIC_0010382.png"], "message": "A mask holds values between 0 and 255."},
        ],
        "notes": [{"code": "exif", "files": [], "message": "Orientation tags were applied to 3 images."}],
        "counts": {"images": 11180, "masks": 2450, "unlabelled": 8730},
        "duplicates": [["ISIC_0013416", "ISIC_0015251", "byte"], ["HAM_0027419", "ISIC_0012090", "near"]],
    }


def write_manifest(path: Path, num_cases: int) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "mask", "split", "group", "label", "use"])
        uses = [("train", "labelled"), ("train", "unlabelled"), ("train", "excluded-duplicate")]
        uses += [("val", "validation"), ("test", "excluded-test"), ("", "unlabelled"), ("", "excluded-group")]
        for number in range(num_cases):
            split, use = uses[number % len(uses)]
            rows.writerow([f"images/{number}.jpg", f"masks/{number}.png", split, f"g{number // 2}", "", use])


def write_stage(folder: Path, rng: np.random.Generator, num_steps: int, method: str) -> None:
    num_epochs = 10
    steps_per_epoch, lines = num_steps / num_epochs, []
    for step in range(1, num_steps + 1):
        t = step / num_steps
        noise = float(rng.normal(0, 0.03))
        parts = {"reconstruction": 0.6 * math.exp(-3 * t) + 0.15, "distillation": 0.3 * math.exp(-2 * t) + 0.1}
        terms = parts if method == "mae" else {"bce": parts["reconstruction"] / 2, "soft_dice": parts["distillation"]}
        lr = 1e-3 * min(t / 0.05, 0.5 + 0.5 * math.cos(math.pi * t))
        loss = abs(sum(terms.values()) + noise * math.exp(-t))
        step_line = {"kind": "step", "step": step, "epoch": step / steps_per_epoch, "progress": t, "loss": loss}
        lines.append({**step_line, **terms, "lr": lr, "images_per_s": 71.3, "data_wait": 0.042})
        if step % (num_steps // num_epochs) == 0:
            score = {} if method == "mae" else {"score": 0.84 - 0.5 * math.exp(-5 * t) + noise / 4, "dice": 0.8}
            epoch = step // (num_steps // num_epochs)
            lines.append({"kind": "epoch", "epoch": epoch, "step": step, "loss": loss, **score, "seconds": 2000 * t})
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    facts = {"stage": folder.name, "method": method, "epochs": num_epochs, "steps": num_steps, "seconds": 2712.4}
    more = {"num_images": 10533, "batch_size": 64, "device": "cpu", "status": "done"}
    write(folder / "stage.json", {**facts, **more, "excluded": {"test": 529, "near_duplicates": 7, "same_group": 13}})


def write_previews(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    for number in range(4):
        image, _ = draw_case(rng, 128)
        shown = np.kron(rng.random((6, 8)) < 0.25, np.ones((16, 16), bool))
        Image.fromarray(image).save(folder / f"original_{number:02d}.png")
        masked = np.where(shown[..., None], image, 128).astype(np.uint8)
        Image.fromarray(masked).save(folder / f"masked_{number:02d}.png")
        blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(3))
        blurred.save(folder / f"reconstruction_{number:02d}.png")


def summary(rng: np.random.Generator, mean: float, spread: float) -> dict[str, float]:
    mean = mean + float(rng.normal(0, spread / 4))
    return {"mean": mean, "low": mean - spread, "high": mean + spread, "median": mean + spread / 2, "std": 4 * spread}


def all_metrics(rng: np.random.Generator) -> dict[str, Any]:
    means = {"dice": 0.842, "iou": 0.756, "boundary_iou": 0.512, "sensitivity": 0.861, "specificity": 0.972}
    means |= {"dice_256": 0.843, "iou_256": 0.757}
    return {
        **{key: summary(rng, mean, 0.012) for key, mean in means.items()},
        "hd95_256": summary(rng, 14.2, 1.3),
        "hd95_percent": summary(rng, 3.9, 0.36),
    }


def split_metrics(rng: np.random.Generator, num_cases: int) -> dict[str, Any]:
    counts = {"num_cases": num_cases, "num_groups": num_cases - 10, "missed": 3, "false_alarms": 0, "empty_truth": 0}
    return {**counts, **all_metrics(rng), "positives": None, "empties": None}


def write_case_rows(path: Path, rng: np.random.Generator, num_cases: int) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "group", "label", "dice", "iou", "truth_fraction"])
        for number in range(num_cases):
            share = float(np.clip(rng.lognormal(-2, 0.9), 0.004, 0.8))
            dice = float(np.clip(rng.beta(9, 1.4) - 0.05 / (share + 0.1) * rng.random(), 0, 1))
            label = LABELS[int(rng.integers(3))]
            rows.writerow([f"ISIC_{number:07d}", f"L{number // 2}", label, dice, dice / (2 - dice), share])


def write_pictures(folder: Path, rng: np.random.Generator, size: int = 96) -> None:
    folder.mkdir(parents=True)
    index = []
    for kind, num, dice, shift in (("best", 4, 0.97, 1), ("median", 4, 0.88, 3), ("worst", 8, 0.3, 14)):
        for rank in range(1, num + 1):
            image, truth = draw_case(rng, size)
            prediction = np.roll(truth, (shift, -shift), axis=(0, 1))
            stem = f"{kind}_{rank:02d}"
            files = {"image": f"{stem}.jpg", "truth": f"{stem}_truth.png", "prediction": f"{stem}_prediction.png"}
            Image.fromarray(image).save(folder / files["image"], quality=88)
            Image.fromarray(truth.astype(np.uint8) * 255).save(folder / files["truth"])
            Image.fromarray(prediction.astype(np.uint8) * 255).save(folder / files["prediction"])
            name = f"ISIC_00{int(rng.integers(10000, 99999))}"
            index.append({"name": name, "kind": kind, "rank": rank, "dice": dice - rank / 200, **files})
    write(folder / "index.json", index)


def draw_case(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a skin-like picture uint8 (h, w, 3) with a dark blob, and its mask bool (h, w); h is 3/4 of w."""
    height = size * 3 // 4
    y, x = np.mgrid[:height, :size] / size
    centre = rng.uniform([0.28, 0.4], [0.47, 0.6])
    angle = np.arctan2(y - centre[0], x - centre[1])
    wobble = sum(rng.normal(0, 0.05 / k) * np.cos(k * angle + rng.uniform(0, 6)) for k in (2, 3, 5, 7))
    depth = rng.uniform(0.13, 0.22) * (1 + 2 * wobble) - np.hypot(y - centre[0], x - centre[1])
    skin = np.array([222, 176, 154]) + rng.normal(0, 6, 3)
    blob = np.array([120, 74, 58]) + rng.normal(0, 14, 3)
    weight = 1 / (1 + np.exp(-depth * 60))[..., None]
    grain = rng.normal(0, 5, (height, size, 1)) - 40 * (np.hypot(y - 0.375, x - 0.5)[..., None] ** 2)
    return np.clip(skin * (1 - weight) + blob * weight + grain, 0, 255).astype(np.uint8), depth > 0


def split_with_empties(rng: np.random.Generator) -> dict[str, Any]:
    """Return metrics of 50 images, 20 of them with an empty mask, 3 of those with a false alarm."""
    counts = {"num_cases": 50, "num_groups": 50, "missed": 1, "false_alarms": 3, "empty_truth": 20}
    positives = {"num_cases": 30, "num_groups": 30, **all_metrics(rng)}
    return {**counts, **all_metrics(rng), "positives": positives, "empties": {"num_cases": 20, "correct": 17}}


def export_facts() -> dict[str, Any]:
    row = {"height": 256, "width": 256, "threads": 1, "p50_ms": 14.26, "p95_ms": 16.9, "calls": 100}
    size = {"size_bytes": 9_412_000, "num_parameters": 4_730_000, "size": 128, "gmacs": 0.0724, "gmacs_256": 0.2896}
    rows = [row, {**row, "threads": 2, "p50_ms": 9.1}, {**row, "network_only": True, "p50_ms": 11.04}]
    return {"file": "/home/ada/runs/model.onnx", **size, "latency": rows}
