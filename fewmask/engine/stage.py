"""A stage of a run: its folder, its log, its clock and its progress line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fewmask.engine.run import Run, is_main, read_json, write_json
from fewmask.types import UserError

CLOCKS = {"wall": time.monotonic, "cpu": time.process_time}


class Stage:
    """One training within a run; `budget` is its time in seconds, None for as long as its epochs take.

    `clock` says which time: "wall", or "cpu", the processor time of all threads together, which other work on the same
    machine does not use up.
    """

    def __init__(self, run: Run, name: str, budget: float | None = None, clock: str = "wall") -> None:
        self.run, self.name, self.now = run, name, CLOCKS[clock]
        self.folder = run.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.budget = budget
        self.seconds_before = 0.0
        self._started = self.now()
        self._log: TextIO | None = None
        self._board: Any = None

    @property
    def facts_path(self) -> Path:
        """The file that tells what this stage did; it exists once the stage is done."""
        return self.folder / "stage.json"

    @property
    def done(self) -> dict[str, Any] | None:
        """What the finished stage left, None while it is not finished."""
        return read_json(self.facts_path) if self.facts_path.exists() else None

    @property
    def elapsed(self) -> float:
        """Seconds spent on this stage, those of earlier processes included."""
        return self.seconds_before + self.now() - self._started

    def start_clock(self) -> None:
        """Count the time of this process from now on."""
        self._started = self.now()

    @contextmanager
    def logging(self, tensorboard: bool = False) -> Iterator[None]:
        """Open log.jsonl for appending (and TensorBoard when asked), and start the clock."""
        self.start_clock()
        if not is_main():
            yield
            return
        self._board = _tensorboard(self.folder) if tensorboard else None
        path = self.folder / "log.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8", buffering=1) as self._log:
            if torn:  # a killed process can leave half a line; keep it, but on a line of its own
                self._log.write("\n")
            yield
        self._log = None
        if self._board is not None:
            self._board.close()

    def log(self, kind: str, **values: Any) -> None:
        """Append one line to the log; floats are kept to seven digits."""
        if self._log is None:
            return
        rounded = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in values.items()}
        try:
            self._log.write(json.dumps({"kind": kind, **rounded}) + "\n")
        except OSError as error:
            path = self.folder / "log.jsonl"
            raise UserError(f"Cannot write {path}: {error.strerror}; free some disk space.") from None
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{self.name}/{kind}/{name}", value, values.get("step", 0))

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write stage.json, which marks the stage as done."""
        facts = {"stage": self.name, **facts, "seconds": round(self.elapsed, 1), "status": "done"}
        if is_main():
            write_json(self.facts_path, facts)
        return facts


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("run.tensorboard=true needs TensorBoard: pip install 'fewmask[tracking]'.") from None
    return SummaryWriter(str(folder / "tensorboard"))


class Progress:
    """A line that says how far the work is and how long it will still take.

    On a terminal it is rewritten in place; elsewhere a plain line is printed at most every `every` seconds.
    """

    def __init__(self, title: str, every: float = 15.0, stream: TextIO | None = None) -> None:
        self.title, self.every = title, every
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self._started = self._last = time.monotonic()
        self._first: float | None = None

    def update(self, fraction: float, text: str = "", force: bool = False) -> None:
        """Show a fraction in [0, 1] of the work as done."""
        now = time.monotonic()
        if self._first is None:
            self._first = fraction
        if not is_main() or (not force and now - self._last < (0.2 if self.live else self.every)):
            return
        self._last = now
        done = fraction - self._first
        left = (now - self._started) * (1 - fraction) / done if done > 0 else None
        line = f"{self.title}: {fraction:4.0%}"
        if left is not None and fraction < 1:
            line += f", {duration(left)} left"
        line += f"  {text}" if text else ""
        self.stream.write(f"\r\x1b[2K{line}" if self.live else f"{line}\n")
        self.stream.flush()

    def count(self, num_done: int, num_total: int) -> None:
        """Show how many images are done; fits the `on_progress` of every function that goes through images."""
        self.update(num_done / num_total, f"{num_done} of {num_total} images")

    def close(self, text: str, only_if_shown: bool = False) -> None:
        """End the line with a summary; with `only_if_shown`, not for work that turned out to be done already."""
        if is_main() and not (only_if_shown and self._first is None):
            took = duration(time.monotonic() - self._started)
            self.stream.write(f"{chr(13) + chr(27) + '[2K' if self.live else ''}{self.title}: {text} ({took})\n")
            self.stream.flush()


def duration(seconds: float) -> str:
    """Return 45 as "45 s", 200 as "3 min 20 s" and 4000 as "1 h 7 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
