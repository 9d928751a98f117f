"""A run folder: what was asked, one lock, the clock, stop requests, and all randomness."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from fewmask.disk import flush
from fewmask.types import FolderInUseError, Interrupted, UserError

PACKAGES = ("fewmask", "torch", "torchvision", "timm", "segmentation-models-pytorch", "accelerate", "numpy", "pillow")
_STAGES = ("pretrain", "finetune", "distill")
# Settings that may differ when a run is resumed: they change no result, or (the data) are checked by content.
_FREE = {
    "run": ("time", "tensorboard", "out"),
    "data": ("root", "unlabelled", "cache", "licence"),
    **dict.fromkeys(_STAGES, ("checkpoint_seconds", "probe_every")),
}
_MADE_BY = ("command", "versions", "git", "threads")  # of a finished run these stay those that made it

_LEARNT = ("*/checkpoints/step_*", "*/stage.json")
_READ_BY = {**{name: name for name in _STAGES}, "student": "distill"}  # sections that one stage alone reads


def seed_step(seed: int, step: int, stream: int = 0) -> None:
    """Make every generator a function of (seed, step, stream) alone.

    Our choice: since step `n` draws the same numbers whether or not the process lived through the steps before it, a
    checkpoint's random state is two integers, resume is exact, and a data order can be looked up instead of replayed.
    `stream` keeps uses within a step apart, and processes that do not say which share of a batch is theirs.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little") >> 1
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary name and rename it, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1, default=str) + "\n")
            flush(file)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"Cannot write {path}: {error.strerror}; free some space or choose another output folder."
        ) from None


def read_json(path: Path) -> Any:
    """Return the JSON of a file, or raise a UserError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); put back a copy, or use another output folder.") from None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change a result."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_commit() -> str | None:
    """Return the commit of the source tree fewmask runs from, None where it is installed without one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():  # a site-packages folder may lie within somebody else's repository
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip() or None  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None


class Run:
    """One run folder, held by one process at a time.

    Entering it creates `run.json`, or checks that the folder holds the same run: once something was learnt, other
    settings or changed data raise a UserError that says what differs. `defaults` are those of settings that `config`,
    in whose layout they are, may leave out: what has begun with others, and is not finished, does not go on. While
    `deferring`, SIGTERM and Ctrl-C set `stop_requested`, and the training loop saves and raises `Interrupted`; at other
    times, or the second time, they end the work at once.
    """

    def __init__(
        self,
        folder: Path,
        verb: str,
        config: dict[str, Any],
        budget: float | None = None,
        defaults: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.folder, self.verb, self.config, self.budget = folder, verb, config, budget
        self.defaults: dict[str, dict[str, Any]] = json.loads(json.dumps(defaults or {}, default=str))
        self.seed: int = config.get("run", {}).get("seed", 0)
        self.stop_requested = False
        self.deferring = False  # True while a loop of ours asks for stop requests itself
        self.started = time.monotonic()
        self._previous: dict[int, Any] = {}
        self._lock: int | None = None

    def __enter__(self) -> Run:
        self._check_place()
        self._claim()
        try:
            old, begun = self._old(), self._begun()
            self._check_same(old if begun else {}, begun)  # before anything was learnt, settings may be mended
            finished = bool(begun) and old.get("status") == "done" and old.get("verb") == self.verb
            facts = {key: value for key, value in self._facts(old).items() if not (finished and key in _MADE_BY)}
            kept = {stage: old.get("defaults", {}).get(stage, {}) for stage in begun & self.defaults.keys()}
            self.info: dict[str, Any] = {**old, **facts, "defaults": self.defaults | kept, "status": "running"}
            self.info.pop("reason", None)
            self.save()
        except BaseException:
            self._release()
            raise
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        stopped = kind is not None and issubclass(kind, Interrupted | KeyboardInterrupt)
        self.info["status"] = "done" if kind is None else "interrupted" if stopped else "failed"
        if isinstance(error, UserError):
            self.info["reason"] = str(error)
        self.info["seconds"] = round(self.spent + self.elapsed, 1)
        self.info["finished"] = _now()
        with contextlib.suppress(UserError):  # the first error is the one to show
            self.save()
        self._release()

    @property
    def elapsed(self) -> float:
        """Seconds since this process entered the run."""
        return time.monotonic() - self.started

    @property
    def spent(self) -> float:
        """Seconds that earlier processes worked on this run, as far as they could say."""
        return float(self.info.get("seconds_before", 0.0))

    def save(self) -> None:
        """Write run.json."""
        if is_main():
            write_json(self.folder / "run.json", self.info)

    def compare_data(self, facts: dict[str, Any]) -> None:
        """Raise a UserError when the data are not those this run has learnt from; before that they may be mended."""
        old = self.info.get("data")
        if old and old["fingerprint"] != facts["fingerprint"] and self._has_learnt():
            raise UserError(
                f"The data changed since {self.folder} was started ({old['num_cases']} cases then, "
                f"{facts['num_cases']} now, or other contents); use another output folder, or put the data back."
            )

    def record_data(self, facts: dict[str, Any]) -> None:
        """Write down the data's fingerprint: once something is learnt, they may not change."""
        self.info["data"] = facts
        self.save()

    def note_time(self) -> None:
        """Write down the time spent so far, for a resume after a kill."""
        self.info["seconds"] = round(self.spent + self.elapsed, 1)
        self.save()

    def check_stop(self) -> None:
        """Raise Interrupted when a stop was asked for."""
        if self.stop_requested:
            raise Interrupted

    def _facts(self, old: dict[str, Any]) -> dict[str, Any]:
        return {
            "verb": self.verb,
            "command": shlex.join(["fewmask", *sys.argv[1:]]),
            "config": self.config,
            "versions": versions(),
            "git": git_commit(),
            "threads": torch.get_num_threads(),
            "started": old.get("started", _now()),
            "seconds_before": old.get("seconds", 0.0),
        }

    def _old(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        return read_json(path) if path.exists() else {}

    def _begun(self) -> set[str]:
        """Return the stages that have learnt something."""
        return {path.relative_to(self.folder).parts[0] for pattern in _LEARNT for path in self.folder.glob(pattern)}

    def _has_learnt(self) -> bool:
        """Return whether anything in the folder was learnt from its data, by the candidates of a selection too."""
        deeper = (path for pattern in _LEARNT for path in self.folder.glob(f"candidates/*/{pattern}"))
        return bool(self._begun()) or next(deeper, None) is not None

    def _check_same(self, old: dict[str, Any], begun: set[str]) -> None:
        for name in self.config if old else ():
            if self._is_ahead(name, begun):
                continue
            section = old.get("config", {}).get(name)
            then, now = leaves(section), leaves(self.config[name])
            # A setting that an older version did not have yet had no other value.
            said = {key for key in {*then, *now} if section is not None and key.split(".")[0] in section}
            old_defaults, defaults = leaves(old.get("defaults", {}).get(name)), leaves(self.defaults.get(name))
            free = _FREE.get(name, ())
            if name == "run" and then.get("precision") == "auto":  # older tables did not settle it
                free = (*free, "precision")
            before, after = {**old_defaults, **then}, {**defaults, **now}
            goes_on = old.get("status") != "done"  # what is finished learns nothing more
            keys = said | (old_defaults.keys() & defaults.keys() if goes_on else set())
            changed = [key for key in keys if key not in free and _differ(key, before, after)]
            if changed:
                key = min(changed, key=lambda key: (not key.endswith(".name"), -key.count("."), key))
                self._refuse(f"{name}.{key}", before.get(key), after.get(key), asked=key in said, verb=old.get("verb"))

    def _refuse(self, key: str, then: Any, now: Any, asked: bool, verb: str | None) -> None:
        if verb == "pretrain" and self.verb in ("finetune", "distill"):
            raise UserError(
                f"{self.folder} holds what 'fewmask {verb}' left: give '{self.verb}' an output folder of its "
                f"own, and model.weights={self.folder} to begin with what was learnt there."
            )
        if not asked:
            told = f", or, where it is not part of a table or a selection, set '{key}={json.dumps(then)}'"
            way = "" if then is None else told
            raise UserError(
                f"{self.folder} was begun with {key}={then}, where this version takes {now} unless told; use another "
                f"output folder, or go on with the version that its run.json names{way}."
            )
        raise UserError(
            f"{self.folder} holds a run with {key}={then}, and you asked for {now}; "
            "use the same settings to resume it, or another output folder."
        )

    def _is_ahead(self, section: str, begun: set[str]) -> bool:
        """Return whether nothing depends on a section yet: its stage and those after it have not begun.

        A chain that fails in its last stage can so be mended without its first hours being lost. What is no chain, such
        as a selection, reads several sections at once.
        """
        if section not in _READ_BY or not begun.issubset(_STAGES) or (self.folder / "metrics.json").exists():
            return False
        return begun.isdisjoint(_STAGES[_STAGES.index(_READ_BY[section]) :])

    def _check_place(self) -> None:
        """Raise a UserError where the folder lies among pictures, whose data set its own would break."""
        data, here = self.config.get("data") or {}, self.folder.resolve()
        roots = [Path(data["root"]) / name for name in ("images", "masks")] if data.get("root") else []
        for place in [*roots, *map(Path, data.get("unlabelled") or ())]:
            if place.resolve() in (here, *here.parents):
                raise UserError(
                    f"{self.folder} lies in {place}, where its pictures would be taken for data; choose another output "
                    "folder."
                )

    def _claim(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"Cannot write into {self.folder}: {error.strerror}; choose another output folder."
            ) from None
        if not is_main():
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._release()
            raise FolderInUseError(
                f"Another run works in {self.folder}; wait for it or choose another output folder."
            ) from None

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested or not self.deferring:
            self.stop_requested = True
            raise KeyboardInterrupt
        self.stop_requested = True
        if is_main():
            print("\nstopping: saving a checkpoint first", file=sys.stderr, flush=True)


def is_main() -> bool:
    """Return True in the one process that writes files (torchrun's rank 0, or a process on its own)."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_everyone() -> None:
    """Wait until every process has come here, so that what the main one wrote is there for all."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave_group_at_exit() -> None:
    """See to it that this process leaves the others' group before its interpreter ends.

    Gloo's threads may hold tensors for longer than the interpreter lives, and then abort a process that has done all
    its work (pytorch pull request 179291). NCCL is left alone: there, leaving waits for the others.
    """
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group() -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def interruptible(run: Run) -> Iterator[None]:
    """Turn a KeyboardInterrupt within the block into Interrupted, for work that has no loop of ours to ask."""
    try:
        yield
    except KeyboardInterrupt:
        run.stop_requested = True
        raise Interrupted from None
    run.check_stop()


def _differ(key: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Return whether a setting is another; a section that was left empty is no other than its defaults."""
    for one, other in ((before, after), (after, before)):
        if one.get(key) == {} and any(name.startswith(f"{key}.") for name in other):
            return False
    return before.get(key) != after.get(key)


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested section by their dotted keys ("method.name"); an empty one within it is a leaf."""
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    return {k: v for name, part in value.items() for k, v in leaves(part, f"{prefix}.{name}".lstrip(".")).items()}


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
