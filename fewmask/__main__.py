"""The way in: turns what a user can mend into one sentence and an exit code."""

from __future__ import annotations

import sys


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
    main()
