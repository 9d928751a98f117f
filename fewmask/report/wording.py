"""Turn numbers into the words and figures a reader sees."""

from __future__ import annotations

import math
from typing import Any

NONE = "–"
ACRONYMS = frozenset({"bce", "ce", "cls", "ema", "kl", "mae", "mim", "mse"})
METHOD_NAMES = {"mae": "MAE", "simmim": "SimMIM", "dino": "DINO", "g2ll": "G2LL", "tedmae": "TEDMAE"}
SPLIT_NAMES = {"test": "Test", "val": "Validation", "train": "Training"}
STAGE_NAMES = {"pretrain": "Pre-training", "finetune": "Fine-tuning", "distill": "Distillation"}


def number(value: Any) -> float | None:
    """Return a finite float, or None for what is missing, not a number, or infinite."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def fixed(value: Any, digits: int) -> str:
    """Return a value with a fixed number of decimals, a dash where there is none."""
    found = number(value)
    return NONE if found is None else f"{found:,.{digits}f}"


def count(value: Any) -> str:
    """Return a whole number with thousands separated."""
    found = number(value)
    return NONE if found is None else f"{round(found):,}"


def counted(value: Any, noun: str, plural: str = "") -> str:
    """Return a number and its noun, in the plural where it takes one ("1 image", "2,594 images")."""
    return f"{count(value)} {noun if number(value) == 1 else plural or noun + 's'}"


def percent(value: Any, digits: int = 0) -> str:
    """Return a share in [0, 1] as a percentage."""
    found = number(value)
    return NONE if found is None else f"{100 * found:.{digits}f} %"


def duration(seconds: Any) -> str:
    """Return a time in the two units that matter ("1 h 12 min", "3 min 20 s", "8.4 s")."""
    found = number(seconds)
    if found is None:
        return NONE
    if found < 59.95:
        return f"{found:.1f} s"
    minutes, rest = divmod(round(found), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(found / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def size(num_bytes: Any) -> str:
    """Return a file size in kB or MB (decimal units)."""
    found = number(num_bytes)
    if found is None:
        return NONE
    return f"{found / 1e6:.1f} MB" if found >= 1e6 else f"{found / 1e3:.0f} kB"


def parameters(value: Any) -> str:
    """Return a parameter count in millions ("22.1 M", "0.094 M")."""
    found = number(value)
    if found is None:
        return NONE
    return f"{found / 1e6:.1f} M" if found >= 1e6 else f"{found / 1e6:.2g} M"


def moment(value: Any) -> str:
    """Return an ISO time to the minute, without the T ("2026-03-04 17:20")."""
    text = str(value or "")
    return text[:16].replace("T", " ")


def title(key: str) -> str:
    """Return a key of a file as words ("data_wait" -> "Data wait")."""
    if key in ACRONYMS:
        return key.upper()
    words = key.replace("_", " ").replace("-", " ").strip()
    return words[:1].upper() + words[1:]


def method_name(key: str) -> str:
    """Return a method of pre-training as its authors write it, one without a name of its own as words."""
    return METHOD_NAMES.get(key, key.replace("_", " "))


def lowered(text: str) -> str:
    """Return words with a small first letter, for the middle of a line; an acronym stays as it is."""
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def stage_name(key: str) -> str:
    """Return the reader's name of a stage folder."""
    return STAGE_NAMES.get(key, title(key))


def split_name(key: str) -> str:
    """Return the reader's name of a split; the key of another data set stays as it is."""
    return SPLIT_NAMES.get(key, key)
