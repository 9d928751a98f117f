"""Pre-training methods: what they learn from unlabelled images is an encoder, in one case a whole segmenter."""

from __future__ import annotations

from collections.abc import Callable

from fewmask.auxiliary import AUXILIARY
from fewmask.objective import Objective
from fewmask.pretrain.auxiliary import pretrainer
from fewmask.pretrain.dino import DINO
from fewmask.pretrain.figure import Figure
from fewmask.pretrain.g2ll import G2LL
from fewmask.pretrain.mae import MAE
from fewmask.pretrain.simmim import SimMIM
from fewmask.pretrain.supervised import Supervised
from fewmask.pretrain.tedmae import TEDMAE

PRETRAINERS: dict[str, Callable[..., Objective]] = {
    "dino": DINO,
    "figure": Figure,
    "g2ll": G2LL,
    "mae": MAE,
    "simmim": SimMIM,
    "supervised": Supervised,
    "tedmae": TEDMAE,
    **{name: pretrainer(task) for name, task in AUXILIARY.items()},
}
