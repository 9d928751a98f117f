"""What a table's teacher and student take to run: one finished network of each is exported and measured, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fewmask.commands.distillation import load_teacher
from fewmask.commands.grid import TEACHER, Order, cells
from fewmask.commands.jobs import model_files
from fewmask.commands.select import SELECTION
from fewmask.commands.tables import Student
from fewmask.deploy.export import export_onnx
from fewmask.deploy.latency import network_alone, time_calls
from fewmask.deploy.predictor import Predictor
from fewmask.deploy.run_files import THRESHOLD
from fewmask.engine.run import read_json, write_json

PHOTO = 256


def known_costs(out: Path) -> dict[str, dict[str, Any]]:
    """Return what `note_costs` has written into a table's folder so far."""
    path = out / "cost.json"
    return read_json(path) if path.exists() else {}


def note_costs(order: Order) -> None:
    """Write cost.json of the first finished teacher and student of a table that distils, unless that is done.

    Latency is of a quiet machine only where the machine is quiet; delete cost.json to have it measured again.
    """
    known = known_costs(order.out)
    for name, files in (("teacher", teacher_files(order)), ("student", student_files(order))):
        if name not in known and files:
            known[name] = measure_cost(files, order.out / "cost" / name)
            write_json(order.out / "cost.json", known)


def teacher_files(order: Order) -> list[Path]:
    """Return the model files that teach one cell, none while no teacher is finished."""
    if order.grid.teachers:
        return model_files(order.teachers(order.fractions[0], 0))
    if order.what.selects:
        selected = (order.selection(fraction, seed) for _, fraction, seed in cells(order))
        done = next((folder for folder in selected if (folder / SELECTION).exists()), None)
        return model_files([done]) if done else []
    folders = (order.folder(TEACHER, fraction, seed) for _, fraction, seed in cells(order))
    return _first(folder / "finetune" for folder in folders) if order.what.distils else []


def student_files(order: Order) -> list[Path]:
    """Return the model file of the first finished student, none while there is none."""
    students = [cell for cell in cells(order) if isinstance(order.rows[cell[0]], Student)]
    return _first(order.folder(*cell) / "distill" for cell in students)


def _first(stages: Iterable[Path]) -> list[Path]:
    files = (stage / "model.safetensors" for stage in stages if (stage / "stage.json").exists())
    return [file for file in (next(files, None),) if file is not None]


def measure_cost(files: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Export each model file into the folder; return "num_networks", the largest "size" in pixels, and sums over them.

    "num_parameters", "gmacs" at the network's own size and "gmacs_256" at 256x256 (None where that is no size of it),
    "megabytes" of the ONNX files, and median milliseconds on one thread: "ms" from a decoded 256x256 photo to its mask,
    "ms_network" from a prepared tensor to logits at the network's own size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return add_costs([_cost(file, folder / f"model{number}.onnx") for number, file in enumerate(files)])


def add_costs(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what networks cost together, as `measure_cost` does; a figure that one of them lacks is None."""
    total = {key: _sum([cost[key] for cost in costs]) for key in costs[0] if key != "size"}
    return {"num_networks": len(costs), "size": max(cost["size"] for cost in costs), **total}


def _cost(file: Path, out: Path) -> dict[str, Any]:
    segmenter = load_teacher(file)
    facts = export_onnx(segmenter, segmenter.encoder.size, out, {"model": file.name}, THRESHOLD)
    kept = ("size", "num_parameters", "gmacs", "gmacs_256", "megabytes")
    predictor, (network, _) = Predictor(out, threads=1), network_alone(out, 1)
    photo = np.random.default_rng(0).integers(0, 256, (PHOTO, PHOTO, 3), dtype=np.uint8)
    times = {"ms": _milliseconds(lambda: predictor(photo)), "ms_network": _milliseconds(network)}
    return {**{key: facts[key] for key in kept}, **times}


def _milliseconds(call: Callable[[], Any]) -> float:
    return 1e3 * float(np.median(time_calls(call, seconds=1.0, max_calls=100)))


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
