"""Distillation of one or several large segmenters into a small one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewmask.data.augment import Augment, segment_views
from fewmask.data.preprocess import denormalise
from fewmask.distill import DISTILLERS
from fewmask.distill.distiller import Distiller, check_share
from fewmask.distill.kd import KD
from fewmask.distill.supervision import Supervision, labelled_rows, supervise, take_stored, weighted_mean
from fewmask.distill.teacher import EnsembleTeacher, merge
from fewmask.distill.widths import Widths, describe, dry_run
from fewmask.losses import loss_of_each
from fewmask.models.average import AveragedObjective
from fewmask.registry import build, check_type, choose
from fewmask.types import Batch, SegOutput, UserError, Views

# Ours: at weight 1 M2BF's error outweighs the masks' loss, and costs a student of a tenth of the masks 0.9 to 1.9
# points; at 0.1 no cost is proven (benchmarks/2026-11-22-students.md).
DEFAULT_WEIGHTS = {"mbf": 0.1, "m2bf": 0.1}
KD_ALONE: Mapping[str, Mapping[str, Any]] = {"kd": {"weight": 1.0}}
HEAT = (1.0, 0.2, 0.0)
OPACITY = 0.6


class Distill(AveragedObjective):
    """A student segmenter learns from masks, where there are any, and from its teachers on every image.

        L = supervised_weight * S + pseudo_weight * P + sum over losses of weight * D

    S is (1 - w) cross-entropy + w Dice, mean over the images with a mask. P is the same towards the teacher's decision
    ("hard") or probability ("soft"), over the images without one, each times its confidence. Each D of `losses` (name
    -> its settings and its `weight`; see `DISTILLERS`, `DEFAULT_WEIGHTS`) compares both networks on all images, those
    without a mask weighted by confidence, with the teacher's prediction for a mask (see `supervise`). The teachers are
    asked only where somebody listens, and not where the batch brings what was stored of them: their prediction as a
    second channel of its mask and, where a D compares features, those of `stored_levels`.

    Several teachers answer with their mean probability ("average"), or each loss that reads logits alone is averaged
    over them ("mean_kl", the two-stage method, for which stored predictions are softened, see `stored_at`); features
    are always the first teacher's. `average` > 0 is the decay of a running average of the student's weights, which then
    is the product. `augment` as in `Segment`. What a loss learns of its own, such as a 1x1 convolution, is trained with
    the student and left behind.

    Sources: METHODS, section 3; S, P, the confidence and all weights are ours. Raises UserError for settings that
    cannot work, networks of other than one class, and a student that shares weights with a teacher.
    """

    def __init__(
        self,
        segmenter: nn.Module,
        teachers: Sequence[nn.Module],
        *,
        size: int,
        losses: Mapping[str, Mapping[str, Any]] = KD_ALONE,
        supervised_weight: float = 1.0,
        dice_weight: float = 0.5,
        pseudo_weight: float = 0.0,
        pseudo_target: Literal["hard", "soft"] = "hard",
        average: float = 0.0,
        augment: Augment = "full",
        ensemble: Literal["average", "mean_kl"] = "average",
    ) -> None:
        check_share("dice_weight", dice_weight)
        check_apart(segmenter, teachers)
        super().__init__(segmenter, average)
        self.weights = weights_of(losses)
        self.supervised_weight, self.pseudo_weight = supervised_weight, pseudo_weight
        check_weights({"supervised_weight": supervised_weight, "pseudo_weight": pseudo_weight, **self.weights})
        self.size, self.dice_weight, self.pseudo_target = size, dice_weight, pseudo_target
        self.augment, self.ensemble = augment, ensemble
        self.teacher = EnsembleTeacher(teachers)
        self.distillers = build_distillers(losses, *compare(segmenter, self.teacher, size))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss", "supervised", "pseudo", "confidence" and each loss by its name, before its weight.

        `batch.extra["has_mask"]` bool (b,) says which images have a mask (absent: all, or none if there is no mask at
        all). "confidence" is the mean over the images without one, 1 where there are none; so is "supervised" 0.
        """
        batch, stored = take_stored(batch, self.stored_levels, self.stored_at)
        answers = [stored] if stored is not None else self.ask(batch)
        given = supervise(batch, merge(answers).logits if answers else None)
        student: SegOutput = self.segmenter(batch.image)
        terms = self.supervised(student.logits, given)
        filled = replace(batch, mask=given.mask, extra={**batch.extra, "confidence": given.confidence})
        teacher = merge(answers) if answers else student
        for name, distiller in self.distillers.items():
            assert isinstance(distiller, Distiller)
            # One loss for each teacher only where that differs from one for all: features are the first one's.
            each = answers if self.ensemble == "mean_kl" and not distiller.pairs else [teacher]
            terms[name] = torch.stack([distiller(student, answer, filled) for answer in each]).mean(0)
        weights = {"supervised": self.supervised_weight, "pseudo": self.pseudo_weight, **self.weights}
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        shown = {name: term.detach() for name, term in terms.items()}
        return {"loss": loss, **shown, "confidence": trust(given)}

    @property
    def stored_at(self) -> float:
        """The temperature T of stored predictions, which are the mean of sigma(z / T) over the teachers.

        KD's with "mean_kl", as the mean over teachers of KL(sigma(z_i / T) || q) differs from KL(mean of sigma(z_i / T)
        || q) by what no student changes: how far the teachers are apart. Else 1.
        """
        softened = [loss.temperature for loss in self.distillers.values() if isinstance(loss, KD)]
        return softened[0] if self.ensemble == "mean_kl" and softened else 1.0

    @property
    def stored_levels(self) -> tuple[int, ...]:
        """The teacher's features that the losses compare, counted from the finest, 0: what is stored beside logits."""
        pairs = [pair for loss in self.distillers.values() for pair in loss.pairs]  # type: ignore[union-attr]
        return tuple(sorted({pair.teacher for pair in pairs}))

    def ask(self, batch: Batch) -> list[SegOutput]:
        """Return the teachers' answers, none where nobody listens: no loss, and no image without a mask to learn."""
        needed = len(self.distillers) > 0 or (self.pseudo_weight > 0 and not bool(labelled_rows(batch).all()))
        return self.teacher.outputs(batch.image) if needed else []

    def supervised(self, logits: Tensor, given: Supervision) -> dict[str, Tensor]:
        """Return "supervised" and "pseudo": the segmentation losses on labels and on the teacher's predictions."""
        target = given.decided if self.pseudo_target == "hard" else given.mask
        each = loss_of_each(logits, target, self.dice_weight)
        # A label's confidence is 1.
        return {
            "supervised": weighted_mean(each, given.confidence, given.labelled),
            "pseudo": weighted_mean(each, given.confidence, ~given.labelled),
        }

    def views(self) -> Views:
        """Return the augmentation that `augment` names."""
        return segment_views(self.augment, self.size)

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return "teacher_and_student", strips (b, 3, s, 3 s): the image, then the heat of both networks on it."""
        picture = denormalise(batch.image)
        both = (self.teacher(batch.image).logits, self.product()(batch.image).logits)
        heated = [overlay_heat(picture, logits.float().sigmoid()) for logits in both]
        return {"teacher_and_student": torch.cat([picture, *heated], dim=3)}


def overlay_heat(picture: Tensor, probability: Tensor) -> Tensor:
    """Return the picture (b, 3, s, s) in [0, 1], the redder the nearer the probability (b, 1, s, s) is to 1."""
    colour = torch.tensor(HEAT, device=picture.device, dtype=picture.dtype).view(3, 1, 1)
    return torch.lerp(picture, colour.expand_as(picture), OPACITY * probability.expand_as(picture))


def trust(given: Supervision) -> Tensor:
    """Return the mean confidence over the images without a mask, 1 where there are none."""
    mean = weighted_mean(given.confidence, torch.ones_like(given.confidence), ~given.labelled)
    return torch.where(given.labelled.all(), 1.0, mean)


def compare(student: nn.Module, teacher: EnsembleTeacher, size: int) -> tuple[Widths, Widths]:
    """Return the widths of the student's and the teacher's features; a UserError unless all have one class."""
    device = next((parameter.device for parameter in student.parameters()), None)
    outputs = [dry_run(network, size, device) for network in (student, *teacher.members)]
    classes = [output.logits.shape[1] for output in outputs]
    if set(classes) != {1}:
        raise UserError(
            f"The student tells {classes[0]} classes apart and its teachers {', '.join(map(str, classes[1:]))}; "
            "distillation needs segmenters with one class, lesion or not: choose others."
        )
    return describe(outputs[0], size), describe(outputs[1], size)


def build_distillers(losses: Mapping[str, Mapping[str, Any]], student: Widths, teacher: Widths) -> nn.ModuleDict:
    """Return the losses by name, built from their settings."""
    built = {}
    for name, settings in losses.items():
        own = {key: value for key, value in settings.items() if key != "weight"}
        factory = choose(DISTILLERS, name, "distillation loss")
        built[name] = build(factory, own, f"distill.method.losses.{name}", student=student, teacher=teacher)
    return nn.ModuleDict(built)


def weights_of(losses: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return each loss's weight, unless told that of `DEFAULT_WEIGHTS` or 1; a UserError where one is no number."""
    return {
        name: check_type(
            float, settings.get("weight", DEFAULT_WEIGHTS.get(name, 1.0)), f"distill.method.losses.{name}.weight"
        )
        for name, settings in losses.items()
    }


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise a UserError unless no weight is negative and one of them is above zero."""
    for name, weight in weights.items():
        if weight < 0:
            raise UserError(f"The weight of '{name}' cannot be {weight}: give a number of at least 0.")
    if not any(weights.values()):
        raise UserError("All weights of the distillation are zero: give one loss a weight above it.")


def check_apart(student: nn.Module, teachers: Sequence[nn.Module]) -> None:
    """Raise a UserError when the student shares a parameter with a teacher: freezing the one would freeze the other."""
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for teacher in teachers for parameter in teacher.parameters()):
        raise UserError("The student is one of its own teachers or shares weights with one; load the teacher anew.")
