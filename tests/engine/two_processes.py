"""Train the tiny objective in a folder; started by a test, once alone and once under torchrun."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

import torch

from fewmask.engine.run import is_main
from fewmask.types import Batch
from tests.engine.tiny import TinyObjective, train


class Deterministic(TinyObjective):
    """Without noise, dropout and batch statistics, so that only the sharing of the work differs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 1, 3))

    def views(self):
        return lambda batch: Batch(batch.image, batch.names)


def note_end(folder: Path) -> None:
    """Write down, as the last thing done, whether the group of processes still was there."""
    rank = os.environ.get("RANK", "0")
    (folder / f"end_{rank}.txt").write_text("in the group" if torch.distributed.is_initialized() else "on its own")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    atexit.register(note_end, folder)
    _, facts, objective = train(folder, objective=Deterministic, precision="fp32")
    if is_main():
        torch.save({"weights": objective.net.state_dict(), "processes": facts["num_processes"]}, folder / "result.pt")
