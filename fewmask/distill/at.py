"""AT: where the student's features are strong, the teacher's are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fewmask.distill.align import map_size, pair_levels, resize
from fewmask.distill.distiller import Distiller
from fewmask.distill.widths import Widths
from fewmask.types import Batch, SegOutput

STRIDES = (4, 8, 16)


class AT(Distiller):
    """|Q_s / |Q_s| - Q_t / |Q_t||^2 with the attention map Q = sum_c |F_c|^2 (Zagoruyko and Komodakis 2017, eq. 2).

    Paper: p = 2, one term for each pair of layers. Ours: the norm is squared (code: squared too, but the mean over
    positions, which ties the weight to the map's size); the student's map is resized to the teacher's before it is
    normalised; the mean over levels, by default those nearest to strides 4, 8 and 16 (see `pair_levels`). It is zero
    for identical features, and blind to their signs and scale.
    """

    def __init__(self, student: Widths, teacher: Widths, levels: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.pairs = pair_levels(student, teacher, levels, STRIDES)

    def per_image(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Tensor:
        """Return the loss of each image, (b,)."""
        each = [attention_gap(student.features[s], teacher.features[t], 2) for s, t in self.pairs]
        return torch.stack(each).mean(0)


def attention_gap(student: Tensor, teacher: Tensor, power: int) -> Tensor:
    """Return the squared distance (b,) of the normalised attention maps of features (b, c_s, ...) and (b, c_t, ...)."""
    own, wanted = attention_map(student, power), attention_map(teacher, power)
    own = resize(own, map_size(wanted))
    return (F.normalize(own.flatten(1)) - F.normalize(wanted.flatten(1))).square().sum(1)


def attention_map(features: Tensor, power: int) -> Tensor:
    """Return mean_c |F_c|^power (b, 1, h, w): after normalisation the mean over channels is as good as the sum."""
    return features.abs().pow(power).mean(1, keepdim=True)
