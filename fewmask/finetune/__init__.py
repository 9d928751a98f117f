"""Ways to train a segmenter from masks; a new one is a file here and a line in this table."""

from __future__ import annotations

from fewmask.finetune.joint import Joint
from fewmask.finetune.segment import Segment
from fewmask.objective import Objective

FINETUNERS: dict[str, type[Objective]] = {"joint": Joint, "segment": Segment}
