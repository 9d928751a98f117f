"""The way in: turns what a user can mend into one sentence and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
TRAINING = ("demo", "distill", "finetune", "pretrain", "reproduce", "run", "select")
"""The verbs that are worth a second start of 30 ms."""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def start() -> None:
    """Run the command line as a program of its own, in large pages of memory where it trains and there are some."""
    if len(sys.argv) > 1 and sys.argv[1] in TRAINING:
        ask_for_huge_pages()
    main()


def ask_for_huge_pages() -> None:
    """Begin this process again, once, with an allocator that asks for pages of 2 MB; nothing happens where it cannot.

    Ours: on a virtual machine a training step on a CPU takes 0.66 to 0.87 of its time so where another training works
    beside it, less than half in bad hours, and as good as all of it on a quiet machine
    (benchmarks/2026-11-22-pretraining-cost.md). glibc (2.35 or newer) reads the wish when a process begins, and
    not later; whoever sets GLIBC_TUNABLES themselves is left alone.
    """
    if sys.platform != "linux" or TUNABLES in os.environ or not sys.executable or not sys.orig_argv:
        return
    try:
        on_request = "[madvise]" in HUGE_PAGES.read_text(encoding="ascii")
    except OSError:
        return
    if on_request:
        os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
        with contextlib.suppress(OSError):  # then it goes on as it is
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606


def main() -> None:
    """Run the command line: exit 0 done, 1 the data or the answer is bad, 2 wrong usage, 130 interrupted."""
    from fewmask.cli import app
    from fewmask.types import Interrupted, UserError

    try:
        app()
    except UserError as error:
        fail(str(error), 1)
    except (Interrupted, KeyboardInterrupt):
        fail("Stopped; the same command goes on from here.", 130)
    except MemoryError:
        fail("There was not enough memory; lower the stage's batch_size or model.size.", 1)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        fail(f"{error.filename or 'A file'} could not be used: {error.strerror}; free space or mend its rights.", 1)


def fail(sentence: str, code: int) -> None:
    """Print one sentence to standard error and leave with a code."""
    print(f"fewmask: {sentence}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    start()
