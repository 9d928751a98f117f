"""DINO: a teacher's answer to one crop is the target for the student's answer to another."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fewmask.data.preprocess import denormalise
from fewmask.models import Encoder
from fewmask.objective import Objective
from fewmask.pretrain.collapse import CollapseGuard, advice
from fewmask.pretrain.crops import MultiCropViews
from fewmask.pretrain.projector import Projector
from fewmask.pretrain.self_distillation import (
    Centre,
    Teacher,
    check_centring,
    check_temperatures,
    cross_entropy,
    global_dim,
    sharpen,
)
from fewmask.types import Batch, UserError, Views

GLOBAL_SCALE = {True: (0.4, 1.0), False: (0.14, 1.0)}
"""The share of a picture that a global crop covers, with local crops and without."""


class DINO(Objective):
    """DINO (Caron et al. 2021): cross-view self-distillation of a ViT's class token or a CNN's pooled feature.

    Paper: two global crops go through teacher and student, `num_local` small ones through the student only; every
    crop of the student is compared with every *other* crop of the teacher, and the cross-entropies are averaged over
    pairs. Momentum 0.996 -> 1 by a cosine, tau_t 0.04, tau_s 0.1, centre 0.9, last layer weight-normed and without
    gradient for `freeze_last` of the training (one epoch of 100); the recipe's weight decay rises from 0.04 to 0.4.
    Ours: no local crops by default and 4,096 prototypes where the paper has 8 (of 96 pixels for 224) and 65,536; a
    constant tau_t, which is the code's default, where the paper's training raises it to 0.07 at first; gradients
    clipped together at a norm of 3, where the code clips each weight's; `vertical_flip`. The global crops' share of the
    picture, `crop_scale`, is (0.4, 1.0) beside local crops (paper) and, by the code's help, (0.14, 1.0) without any
    where it is None. Code (DINO) judges the teacher; `keep` says which of the
    two is the product. Its learning rate is 0.0005 per 256 images of a batch, and the recipe's 3.2 times that; at 16
    times, all targets became alike within 20 steps (measured, batch 16). Its student drops paths with p 0.1, ours none
    unless `model.encoder_settings.drop_path` says so; its position embedding starts as noise of std 0.02, ours as a
    sine-cosine code (see `Vit`).

    `local_size` is in pixels, by default 3/7 of the image size in whole strides of the encoder. Raises UserError for
    settings that cannot work and, when called, for a batch of one image.
    """

    min_batch = 2

    def __init__(
        self,
        encoder: Encoder,
        num_prototypes: int = 4096,
        projector_hidden: int = 2048,
        projector_bottleneck: int = 256,
        momentum: float = 0.996,
        centre_momentum: float = 0.9,
        tau_s: float = 0.1,
        tau_t: float = 0.04,
        freeze_last: float = 0.01,
        crop_scale: tuple[float, float] | None = None,
        num_local: int = 0,
        local_size: int | None = None,
        local_scale: tuple[float, float] = (0.05, 0.4),
        vertical_flip: bool = True,
        keep: Literal["student", "teacher"] = "student",
        collapse_patience: int = 500,
    ) -> None:
        check_temperatures(tau_s, tau_t)
        super().__init__()
        self.encoder = encoder
        self.projector = Projector(
            global_dim(encoder), num_prototypes, projector_hidden, projector_bottleneck, freeze_last
        )
        self.teacher = Teacher(self.followed(), momentum)
        self.centre = Centre(num_prototypes, centre_momentum)
        self.guard = CollapseGuard(advice(), collapse_patience)
        self.tau_s, self.tau_t, self.keep = tau_s, tau_t, keep
        scale = crop_scale or GLOBAL_SCALE[num_local > 0]
        self.crop_views = MultiCropViews(
            encoder.size, scale, num_local, check_local(encoder, num_local, local_size), local_scale,
            vertical=vertical_flip,
        )  # fmt: skip

    def followed(self) -> dict[str, nn.Module]:
        """Return the student's modules that the teacher has a copy of."""
        return {"encoder": self.encoder, "projector": self.projector}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and the guard's figures.

        `batch.image` holds the first global crops, `extra["second"]` the others, `extra["local"]` the small ones.
        """
        check_centring(len(batch.image))
        if "second" not in batch.extra:
            raise UserError("DINO compares crops of each image, and this batch has one: pass it through its views.")
        images = torch.cat([batch.image, batch.extra["second"]])
        features = [self.encoder.global_feature(images)]
        scores = self.teacher.scores(images)
        if "local" in batch.extra:  # another size, hence a pass of its own
            small = batch.extra["local"].transpose(0, 1).flatten(0, 1)
            features.append(self.encoder.global_feature(small))
        answers = self.projector(torch.cat(features))
        target = sharpen(scores, self.centre.value, self.tau_t)
        loss = self.cross_view(target, answers, len(batch.image))
        figures = self.guard(features[0], target)
        if self.training:
            self.centre.update(scores)
        return {"loss": loss, **figures}

    def cross_view(self, target: Tensor, answers: Tensor, num_images: int) -> Tensor:
        """Return the mean cross-entropy over images and pairs of different crops.

        `target` (2 b, k) and `answers` (c b, k) hold crop after crop, the two global ones first.
        """
        taught, answered = target.split(num_images), answers.split(num_images)
        pairs = [
            cross_entropy(t, a, self.tau_s) for i, t in enumerate(taught) for j, a in enumerate(answered) if i != j
        ]
        return torch.stack(pairs).mean()

    def product(self) -> Encoder:
        """Return the encoder of the student, or of the teacher if `keep` says so."""
        return self.encoder if self.keep == "student" else self.teacher.encoder

    def views(self) -> Views:
        """Return the crops, each with colours of its own."""
        return self.crop_views

    def before_step(self, progress: float) -> None:
        """Hold the last layer at first."""
        self.projector.before_step(progress)

    def after_step(self, progress: float) -> None:
        """Move the teacher towards the student, and stop a collapsed run."""
        self.teacher.follow(self.followed(), progress)
        self.guard.after_step(progress)

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return "crops", strips (b, 3, s, 2 s) of the two global crops."""
        return {"crops": torch.cat([denormalise(x) for x in (batch.image, batch.extra["second"])], dim=3)}


def check_local(encoder: Encoder, num_local: int, local_size: int | None) -> int:
    """Return the side of the small crops, or raise a UserError where it is not a multiple of the encoder's stride."""
    stride = encoder.strides[-1]
    size = max(encoder.size * 3 // 7 // stride, 1) * stride if local_size is None else local_size
    if num_local < 0 or size < 1 or size % stride or size > encoder.size:
        raise UserError(
            f"{num_local} local crops of {size} pixels cannot be made: give a number of at least 0, and a 'local_size' "
            f"that is a multiple of {stride} and at most {encoder.size}."
        )
    return size
