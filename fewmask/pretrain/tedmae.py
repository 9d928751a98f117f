"""TEDMAE: a masked autoencoder whose teacher sees the picture twice, once in another exterior."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fewmask.data.preprocess import denormalise
from fewmask.data.superpixels import Slic
from fewmask.models import Encoder
from fewmask.objective import Objective
from fewmask.pretrain.collapse import CollapseGuard, advice
from fewmask.pretrain.crops import CropViews
from fewmask.pretrain.dynamic_features import DynamicFeatures
from fewmask.pretrain.exterior_conversion import ConversionName, ConvertedViews, ExteriorConversion
from fewmask.pretrain.g2ll import check_weights
from fewmask.pretrain.projector import Projector
from fewmask.pretrain.self_distillation import (
    Centre,
    Teacher,
    check_centring,
    check_temperatures,
    cross_entropy,
    global_dim,
    global_tokens,
    sharpen,
)
from fewmask.pretrain.structure import MaskName, build_masks, show_regions
from fewmask.pretrain.student import DecoderShape, Hidden, build_student
from fewmask.types import Batch, UserError, Views

PREVIEW_SEED = 0
PREVIEW_CONVERSIONS = 4


class TEDMAE(Objective):
    """Masked autoencoder with generalizable self-distillation (TEDMAE, MBEC 2024), written from its abstract.

    Paper (abstract): an MAE student and a teacher by self-distillation; *EC* converts the exterior of the picture by
    random convolutions and linear interpolation; *DF* merges features by a non-linear attention; both make the
    teacher's global features generalise.

    Ours: L = w1 L_MSE + w2 L_distill. The student sees the masked clean picture and reconstructs it (as G2LL's does).
    The teacher, the student's running average, sees the whole clean and the whole converted picture, and DF merges its
    tokens of both. So that DF is learnt, the student encodes the converted picture too, under the same mask, and its
    own DF merges the two for the distillation (never for the reconstruction); the teacher's DF is its running average.
    The distillation is `distillation` "cls": the cross-entropy of G2LL; or "cosine": 1 - cosine of the projectors'
    bottlenecks, without centre. The projector, centre, temperatures and momentum are DINO's, ratio, crop and flips
    MAE's; no colours are changed but by EC. The recipe's w2 is 0.05, for short trainings.

    Ablation: `teacher=False` is MAE; `ec=False` shows the teacher the clean picture only; `ec=True, df=False`
    averages the teacher's tokens of both pictures; DF without EC would merge a picture with itself and is refused.
    Mask strategies, CNN encoders, `norm_pix` and `collapse_patience` as in `G2LL`.
    """

    def __init__(
        self,
        encoder: Encoder,
        mask_ratio: float = 0.75,
        mask: MaskName = "random",
        focal_share: float = 0.7,
        num_segments: int = 8,
        mask_patch: int | None = None,
        norm_pix: bool = False,
        decoder_dim: int | None = None,
        decoder_depth: int = 2,
        decoder_heads: int | None = None,
        teacher: bool = True,
        ec: bool = True,
        df: bool = True,
        conversion: ConversionName = "gin",
        reduction: int = 4,
        distillation: Literal["cls", "cosine"] = "cls",
        num_prototypes: int = 4096,
        projector_hidden: int = 2048,
        projector_bottleneck: int = 256,
        momentum: float = 0.996,
        centre_momentum: float = 0.9,
        tau_s: float = 0.1,
        tau_t: float = 0.04,
        reconstruction_weight: float = 1.0,
        distillation_weight: float = 1.0,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        vertical_flip: bool = True,
        collapse_patience: int = 500,
    ) -> None:
        check_temperatures(tau_s, tau_t)
        check_weights(reconstruction_weight, distillation_weight)
        if teacher and df and not ec:
            raise UserError("DF merges the clean and the converted picture, and ec=false leaves one: set df=false too.")
        super().__init__()
        self.student = build_student(
            encoder, mask_patch, DecoderShape(decoder_dim, decoder_depth, decoder_heads), norm_pix
        )
        self.masking, self.superpixels = build_masks(
            mask, self.student.num_patches, mask_ratio, focal_share, num_segments
        )
        self.min_batch = 2 if teacher else 1
        self.has_teacher, self.ec, self.kind = teacher, teacher and ec, distillation
        self.conversion = ExteriorConversion(conversion)
        dim = global_dim(encoder)
        self.projector = Projector(dim, num_prototypes, projector_hidden, projector_bottleneck) if teacher else None
        if self.projector is not None and distillation == "cosine":
            self.projector.prototypes.requires_grad_(False)  # not used, and DDP asks that every parameter is
        self.merge = DynamicFeatures(dim, reduction) if teacher and df else None
        self.teacher = Teacher(self.followed(), momentum) if teacher else None
        self.centre = Centre(num_prototypes, centre_momentum)
        self.guard = CollapseGuard(advice(distillation == "cls", reconstruction=True), collapse_patience)
        self.tau_s, self.tau_t = tau_s, tau_t
        self.reconstruction_weight, self.distillation_weight = reconstruction_weight, distillation_weight
        self.crop_scale, self.vertical_flip = crop_scale, vertical_flip

    def followed(self) -> dict[str, nn.Module]:
        """Return the student's modules that the teacher has a copy of."""
        modules = {"encoder": self.student.encoder, "projector": self.projector, "merge": self.merge}
        return {name: module for name, module in modules.items() if module is not None}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and, with a teacher, its terms "reconstruction" and "distillation" and the guard's figures.

        `batch.image` holds the clean pictures (b, 3, s, s), `extra["converted"]` the converted ones.
        """
        hidden = Hidden.of(self.masking(batch), self.masking.num_masked)
        if self.teacher is None:
            return {"loss": self.student.error(batch.image, self.student.tokens(batch.image, hidden), hidden)}
        check_centring(len(batch.image))
        clean, merged = self.see(batch, hidden)
        reconstruction = self.student.error(batch.image, clean, hidden)
        distillation, target = self.compare(merged[:, 0], self.teach(batch))
        figures = self.guard(merged[:, 0], target)
        loss = self.reconstruction_weight * reconstruction + self.distillation_weight * distillation
        terms = {"reconstruction": reconstruction.detach(), "distillation": distillation.detach()}
        return {"loss": loss, **terms, **figures}

    def see(self, batch: Batch, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """Return the student's tokens (b, 1 + k, d): of the clean picture, and merged with the converted one's."""
        if self.merge is None:
            clean = self.student.tokens(batch.image, hidden)
            return clean, clean
        both = torch.cat([batch.image, converted(batch)])
        twice = Hidden(*(torch.cat([part, part]) for part in hidden))
        clean, other = self.student.tokens(both, twice).chunk(2)
        return clean, self.merge(clean, other)

    @torch.no_grad()
    def teach(self, batch: Batch) -> Tensor:
        """Return the teacher's global features (b, d), those of the clean and the converted picture merged."""
        assert self.teacher is not None
        if not self.ec:
            return self.teacher.encoder.global_feature(batch.image)
        both = torch.cat([batch.image, converted(batch)])
        if self.merge is None:
            return torch.stack(self.teacher.encoder.global_feature(both).chunk(2)).mean(0)
        return self.teacher.copies["merge"](*global_tokens(self.teacher.encoder, both).chunk(2))[:, 0]

    def compare(self, feature: Tensor, taught: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the distillation loss of global features (b, d), and the teacher's distributions if there are any."""
        assert self.projector is not None
        assert self.teacher is not None
        if self.kind == "cosine":
            with torch.no_grad():
                goal = self.teacher.projector.embed(taught)
            return (1 - (self.projector.embed(feature) * goal).sum(1)).mean(), None
        with torch.no_grad():
            scores = self.teacher.projector(taught)
            target = sharpen(scores, self.centre.value, self.tau_t)
        loss = cross_entropy(target, self.projector(feature), self.tau_s).mean()
        if self.training:
            self.centre.update(scores)
        return loss, target

    def maps(self) -> dict[str, Slic]:
        """Return the superpixels its masks follow, none for random ones."""
        return self.superpixels

    def product(self) -> Encoder:
        """Return the student's encoder."""
        return self.student.encoder

    def views(self) -> Views:
        """Return random resized crops and flips and, where they are used, their converted pictures."""
        crops = CropViews(self.student.encoder.size, scale=self.crop_scale, vertical=self.vertical_flip)
        return ConvertedViews(crops, self.conversion) if self.ec else crops

    def after_step(self, progress: float) -> None:
        """Move the teacher towards the student; stop the run if the representation has collapsed."""
        if self.teacher is not None:
            self.teacher.follow(self.followed(), progress)
            self.guard.after_step(progress)

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return strips: "reconstruction" as `G2LL.preview` does and, with EC, "conversion" (b, 3, s, 5 s).

        The latter is the image, the conversion the teacher was shown, and three more draws of it.
        """
        mask = self.masking(batch, torch.Generator().manual_seed(PREVIEW_SEED))
        hidden = Hidden.of(mask, self.masking.num_masked)
        shown = [denormalise(x) for x in (batch.image, *self.student.paint(batch.image, hidden))]
        strips = {"reconstruction": torch.cat(show_regions(shown, batch), dim=3)}
        if self.ec:
            with torch.random.fork_rng(devices=[]):  # conversions are drawn on the host
                more = [self.conversion(batch.image) for _ in range(PREVIEW_CONVERSIONS - 1)]
            strips["conversion"] = torch.cat([denormalise(x) for x in (batch.image, converted(batch), *more)], dim=3)
        return strips


def converted(batch: Batch) -> Tensor:
    """Return the converted pictures of a batch, or raise a UserError where it has none."""
    if "converted" not in batch.extra:
        raise UserError("TEDMAE needs the converted pictures, and this batch has none: pass it through its views.")
    return batch.extra["converted"]
