"""Distillation: what a student learns from a teacher's outputs; a new loss is a file here and a line in this table."""

from __future__ import annotations

from fewmask.distill.at import AT
from fewmask.distill.cwd import CWD
from fewmask.distill.distiller import Distiller
from fewmask.distill.emkd import EMKD
from fewmask.distill.fitnet import FitNet
from fewmask.distill.kd import KD
from fewmask.distill.m2bf import M2BF
from fewmask.distill.mbf import MBF
from fewmask.distill.mgd import MGD

DISTILLERS: dict[str, type[Distiller]] = {
    "kd": KD,
    "at": AT,
    "fitnet": FitNet,
    "cwd": CWD,
    "mgd": MGD,
    "emkd": EMKD,
    "mbf": MBF,
    "m2bf": M2BF,
}
