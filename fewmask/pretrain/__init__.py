"""Pre-training methods: what they learn from unlabelled images is an encoder."""

from __future__ import annotations

from collections.abc import Callable

from fewmask.objective import Objective
from fewmask.pretrain.mae import MAE
from fewmask.pretrain.simmim import SimMIM

PRETRAINERS: dict[str, Callable[..., Objective]] = {"mae": MAE, "simmim": SimMIM}
