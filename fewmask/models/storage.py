"""The file a model is kept in: safetensors, with a description in its header that is enough to build it again."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fewmask.disk import flush
from fewmask.types import UserError

HEADER_KEY = "fewmask"


class ModelFile(NamedTuple):
    """The description in a model file's header, and its tensors."""

    spec: dict[str, Any]
    tensors: dict[str, Tensor]


def write_model_file(path: Path, spec: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a model file; it appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # channels_last tensors are dense but not contiguous, which the format does not know.
    content = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {HEADER_KEY: json.dumps(spec)})
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            flush(file)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_model_file(path: Path) -> ModelFile:
    """Read a model file; a missing, damaged or foreign one raises a UserError."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as a model ({error}); give the path of a fewmask model.") from None
    try:
        spec = json.loads(header or "")
        complete = spec["kind"] in ("encoder", "segmenter") and isinstance(spec["encoder"]["name"], str)
        complete = complete and isinstance(spec["size"], int)
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(f"{path}: is a safetensors file that fewmask did not write; give a model that fewmask saved.")
    return ModelFile(spec, tensors)


def find_model_file(path: Path) -> Path:
    """Return the model file meant by a path: the file itself, or the last product of a stage or run folder.

    Of a run the pre-trained model comes first: who gives a run folder as weights means its pre-training.
    """
    if not path.is_dir():
        return path
    for candidate in ("model.safetensors", "pretrain/model.safetensors", "finetune/model.safetensors"):
        if (path / candidate).is_file():
            return path / candidate
    if (path / "run.json").is_file():
        raise UserError(f"{path} holds a run that has left no model yet: finish it first, by the same command again.")
    raise UserError(f"{path}: this folder holds no model.safetensors; give a fewmask run folder or a model file.")
