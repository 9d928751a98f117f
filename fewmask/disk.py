"""What must be on the disk before something else is deleted or renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any


def flush(file: IO[Any]) -> None:
    """Force an open file to the disk: renamed without it, a file can be empty or full of zeros after a power cut."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
