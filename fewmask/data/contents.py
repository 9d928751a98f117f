"""What files contain, as short hashes, remembered between runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fewmask.types import Case, UserError

_MEMO = "hashes.json"


def default_cache_folder() -> Path:
    """Return $FEWMASK_CACHE, else fewmask below $XDG_CACHE_HOME, else ~/.cache/fewmask."""
    if folder := os.environ.get("FEWMASK_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewmask"


def content_hashes(cases: Iterable[Case]) -> dict[Path, str]:
    """Return {file: BLAKE2b of its bytes, 32 hex digits} of all images and masks.

    A file whose path, size and time of change are known from an earlier call is not read again; the memory lies in the
    cache folder and is done without where that cannot be written. Raises UserError for a file that cannot be read.
    """
    files = list(dict.fromkeys(file for case in cases for file in (case.image, case.mask) if file is not None))
    memo = _load_memo()
    stamps = {file: _stamp(file) for file in files}
    fresh = [file for file in files if stamps[file] not in memo]
    with ThreadPoolExecutor() as pool:
        found = dict(zip((stamps[file] for file in fresh), pool.map(_hash, fresh), strict=True))
    if found:
        _save_memo(found)
    memo |= found
    return {file: memo[stamps[file]] for file in files}


def fingerprint(cases: Iterable[Case]) -> str:
    """Return 16 hex digits that change with any name, image, mask, split, group or label, not with the order."""
    cases = list(cases)
    hashes = content_hashes(cases)
    rows = sorted(
        json.dumps([c.name, hashes[c.image], c.mask and hashes[c.mask], c.split, c.group, c.label]) for c in cases
    )
    return hashlib.blake2b("\n".join(rows).encode(), digest_size=8).hexdigest()


def _stamp(file: Path) -> str:
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"'{file}' cannot be read ({error.strerror}): check that it is there.") from None
    return f"{status.st_size}:{status.st_mtime_ns}:{Path.cwd() / file}"


def _hash(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"'{file}' cannot be read ({error.strerror}): check its permissions.") from None
    return digest.hexdigest()


def _load_memo() -> dict[str, str]:
    try:
        memo = json.loads((default_cache_folder() / _MEMO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return memo if isinstance(memo, dict) and all(isinstance(value, str) for value in memo.values()) else {}


def _save_memo(found: dict[str, str]) -> None:
    """Add to the memory in one step; what another process wrote between is kept but for a race of milliseconds."""
    folder = default_cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{_MEMO}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(_load_memo() | found, file)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(folder / _MEMO)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
