"""Auxiliary tasks: what an encoder learns before or beside the masks; a new one is a file here and a line below."""

from __future__ import annotations

from fewmask.auxiliary.boundary_distance import BoundaryDistance
from fewmask.auxiliary.contrastive import Contrastive
from fewmask.auxiliary.jigsaw import Jigsaw
from fewmask.auxiliary.restoration import Restoration
from fewmask.auxiliary.rotation import Rotation
from fewmask.auxiliary.task import AuxiliaryTask

__all__ = ["AUXILIARY", "AuxiliaryTask"]

AUXILIARY: dict[str, type[AuxiliaryTask]] = {
    "boundary_distance": BoundaryDistance,
    "contrastive": Contrastive,
    "jigsaw": Jigsaw,
    "restoration": Restoration,
    "rotation": Rotation,
}
