"""Checkpoints: one safetensors file each, atomic, the newest readable one wins. Nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fewmask.disk import flush
from fewmask.engine.run import is_main
from fewmask.types import UserError

KEEP = 2


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimiser: Optimizer, state: dict[str, Any]) -> Path:
    """Write `folder/step_NNNNNNNNN.safetensors` and drop all but the newest two.

    `state` is JSON-able and must hold all that is not a tensor: the step (from which data order and random numbers
    follow, see `engine.run.seed_step`), time spent, the best score. Raises a UserError when the disk is full.
    """
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    saved = optimiser.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for index, slots in saved["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser/{index}/{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    header = {"step": step, "state": state, "groups": saved["param_groups"], "plain": plain}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:09d}.safetensors"
    write_tensors(path, tensors, {"fewmask_checkpoint": json.dumps(header)})
    for old in checkpoints(folder)[KEEP:]:
        old.unlink(missing_ok=True)
    return path


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, force it to disk, and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    owned = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    try:
        save_file(owned, temporary, metadata=header)
        with temporary.open("rb+") as handle:
            flush(handle)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"Cannot write {path} ({error}); free some disk space and run the same command again: it resumes."
        ) from None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a stage, newest first."""
    return sorted(folder.glob("step_*.safetensors"), reverse=True)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return (model state, optimiser state, header); ValueError when the file is torn or foreign."""
    try:
        with safe_open(path, "pt") as handle:
            header = json.loads((handle.metadata() or {})["fewmask_checkpoint"])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(str(error)) from None
    slots: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in header["plain"].items()}
    for name, value in tensors.items():
        if name.startswith("optimiser/"):
            _, index, slot = name.split("/", 2)
            slots.setdefault(int(index), {})[slot] = value
    model = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
    return model, {"state": slots, "param_groups": header["groups"]}, header


def restore_newest(folder: Path, model: nn.Module, optimiser: Optimizer) -> tuple[dict[str, Any] | None, list[str]]:
    """Load the newest readable checkpoint into model and optimiser.

    Returns its header (None where there is none) and a sentence for each file that had to be passed over. Raises a
    UserError when checkpoints exist and none of them can be read, so that finished work is never redone silently.
    """
    remarks: list[str] = []
    found = checkpoints(folder)
    for path in found:
        try:
            state, optimiser_state, header = load_checkpoint(path)
            model.load_state_dict(state)
            optimiser.load_state_dict(optimiser_state)
            _match_layout(optimiser)
        except (ValueError, RuntimeError) as error:
            remarks.append(f"{path.name} is damaged and was passed over ({str(error).splitlines()[0]}).")
            continue
        for damaged in found[: found.index(path)] if is_main() else ():  # by name they are newest, and push out others
            damaged.replace(damaged.with_suffix(".damaged"))
        return header, remarks
    if found:
        raise UserError(f"No checkpoint in {folder} can be read; delete that folder to train this stage anew.")
    return None, remarks


def _match_layout(optimiser: Optimizer) -> None:
    """Give the optimiser's tensors the memory layout of their parameters, which a fused step takes for granted."""
    for parameter, slots in optimiser.state.items():
        for name, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                slots[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
