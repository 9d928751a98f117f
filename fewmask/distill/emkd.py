"""EMKD: predictions, the importance of positions, and how far lesion and background are apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fewmask.distill.align import map_size, pair_levels
from fewmask.distill.at import attention_gap
from fewmask.distill.bands import lesion
from fewmask.distill.distiller import Distiller, check_temperature, mask_of
from fewmask.distill.kd import bernoulli_divergence
from fewmask.distill.widths import Widths
from fewmask.types import Batch, SegOutput, UserError

STRIDES = (4, 16)
POWER = 4
LEAST_AREA = 1e-3  # in positions: below this a region is as good as absent, and its mean is noise


class EMKD(Distiller):
    """Three terms for medical segmentation (Qin et al. 2021, "Efficient Medical Image Segmentation Based on KD").

    Paper and code: L = `prediction` PMD + `importance` IMD + `region` RAD (0.1, 0.9, 0.9).
    PMD: KD of every pixel at T = 4. IMD: squared distance of the normalised maps sum_c |F_c|^4, at two levels.
    RAD: with v_0, v_1 the mean features over background and lesion, (cos(v_0, v_1)_student - cos(v_0, v_1)_teacher)^2,
    at the same levels: how unlike the regions are, whatever the width.

    Ours: the levels nearest to strides 4 and 16 (the paper's are layers of its networks) and the mean over them where
    it adds; the importance map is resized, not the features; each network's regions come from the mask at its own
    resolution, as shares of area; an image that lacks a region has no RAD (the code divides by zero or by a smoothed
    count). Zero for identical outputs. Negative weights, or a temperature of zero or less, raise a UserError.
    """

    def __init__(
        self,
        student: Widths,
        teacher: Widths,
        prediction: float = 0.1,
        importance: float = 0.9,
        region: float = 0.9,
        temperature: float = 4.0,
        levels: tuple[int, ...] | None = None,
    ) -> None:
        check_temperature(temperature)
        if min(prediction, importance, region) < 0:
            raise UserError(f"EMKD's weights cannot be {prediction}, {importance}, {region}: give at least 0 for each.")
        super().__init__()
        self.prediction, self.importance, self.region = prediction, importance, region
        self.temperature = temperature
        self.pairs = pair_levels(student, teacher, levels, STRIDES)

    def per_image(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Tensor:
        """Return the loss of each image, (b,)."""
        mask = mask_of(batch)
        pmd = bernoulli_divergence(student.logits, teacher.logits, self.temperature).flatten(1).mean(1)
        features = [(student.features[s], teacher.features[t]) for s, t in self.pairs]
        imd = torch.stack([attention_gap(own, wanted, POWER) for own, wanted in features]).mean(0)
        rad = torch.stack([contrast_gap(own, wanted, mask) for own, wanted in features]).mean(0)
        return self.prediction * pmd + self.importance * imd + self.region * rad


def contrast_gap(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the squared difference (b,) of the two networks' region contrasts, 0 where a region is missing."""
    own, has_both = region_contrast(student, mask)
    wanted, teacher_has_both = region_contrast(teacher, mask)
    return torch.where(has_both & teacher_has_both, (own - wanted).square(), 0.0)


def region_contrast(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine (b,) between the mean features over lesion and background, and whether both are there, bool.

    `features` is (b, c, h, w), `mask` (b, 1, s, s), read as lesion where >= 0.5.
    """
    share = F.adaptive_avg_pool2d(lesion(mask), map_size(features))
    background, no_background = mean_over(features, 1 - share)
    inside, no_lesion = mean_over(features, share)
    return F.cosine_similarity(background, inside), ~(no_background | no_lesion)


def mean_over(features: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (b, c) of features over a region given as shares (b, 1, h, w), and whether it is empty, (b,)."""
    area = share.sum((1, 2, 3))
    return (features * share).sum((2, 3)) / area.clamp(min=LEAST_AREA)[:, None], area <= LEAST_AREA
