"""What deployment reads from a run folder: its segmenter, and the facts that travel with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fewmask.types import UserError

STAGES = ("distill", "finetune")
THRESHOLD = 0.5
# The weights of the packaged encoders; others are named, and their licence is left to their source.
_WEIGHT_LICENCES = {"packaged": "Apache-2.0", "none": "none (random initialisation)"}
_UNKNOWN = "not recorded; ask the source"


def find_segmenter(run: Path, stage: str | None = None) -> Path:
    """Return the file of the run's segmenter: of a stage, or the distilled one, else the fine-tuned one.

    Of `fewmask pretrain` alone it is the pre-trained one, where that is a segmenter; a chain that has come no further
    has none yet. Raises UserError where there is none.
    """
    if not run.is_dir():
        raise UserError(f"There is no run folder {run}; give the output folder of a run.")
    for name in [stage] if stage else STAGES:
        path = run / name / "model.safetensors"
        if path.is_file():
            return path
    pretrained = run / "pretrain" / "model.safetensors"
    if stage is None and pretrained.is_file() and _pretrains_segmenter(run):
        return pretrained
    verb = (_read(run / "run.json") or {}).get("verb", "run")
    if verb == "pretrain" and pretrained.is_file():
        raise UserError(
            f"{run} holds an encoder alone, which segments nothing yet: fine-tune it in another folder, with "
            f"'fewmask finetune' and model.weights={run}."
        )
    raise UserError(f"{run} has no segmenter yet: finish 'fewmask {verb}' first, by the same command again.")


def _pretrains_segmenter(run: Path) -> bool:
    record, done = _read(run / "run.json") or {}, _read(run / "pretrain" / "stage.json") or {}
    return record.get("verb") == "pretrain" and done.get("product") == "segmenter"


def input_size(spec: dict[str, Any], path: Path) -> int:
    """Return the side, in pixels, of what the network sees, from the spec saved beside its weights."""
    size = spec.get("size")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{path} does not say which image size its network takes; train it again with this version.")
    return size


def describe_run(run: Path, spec: dict[str, Any], stage: str | None = None) -> dict[str, Any]:
    """Return what an exported file says of itself: network, licences, metrics and the run's fingerprint.

    With `stage` it is that stage's segmenter, and not the one the run ends with.

    Values are JSON-able. What a run does not have (no metrics yet, say) is None or said to be unknown, never guessed.
    """
    record = _read(run / "run.json") or {}
    data = record.get("data") or {}
    # A path is shortened to its last part: the file may travel, and the path says nothing elsewhere.
    path, config = find_segmenter(run, stage), record.get("config") or {}
    weights = _started_from(config, path.parent.name)
    return {
        "threshold": THRESHOLD,
        "network": spec,
        "weights": Path(weights).name,
        "weights_licence": _WEIGHT_LICENCES.get(weights, _UNKNOWN),
        "data_licence": data.get("licence") or _UNKNOWN,
        "data_fingerprint": data.get("fingerprint"),
        "metrics": _read((run / stage if stage else run) / "metrics.json"),
        "run_fingerprint": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
    }


def _started_from(config: dict[str, Any], stage: str) -> str:
    """Return the weights that a stage's encoder had before the run: a word, a path, or "teacher" for a given one's."""
    before = str((config.get("model") or {}).get("weights", "unknown"))
    own = (config.get("student") or {}).get("weights")
    if stage != "distill" or own is None:
        return before
    if own != "teacher":
        return str(own)
    # A teacher that was given began with weights that its own run knows; one of this run began as `model` says.
    return "teacher" if (config.get("distill") or {}).get("teachers") else before


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and run its command again.") from None
