"""G2LL: a masked autoencoder with structure-wise masks, and a teacher that sees what the student must infer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fewmask.data.preprocess import denormalise
from fewmask.data.superpixels import Slic
from fewmask.models import Encoder
from fewmask.objective import Objective
from fewmask.pretrain.collapse import CollapseGuard, advice
from fewmask.pretrain.crops import SSL_COLOUR, CropViews
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
from fewmask.pretrain.structure import MaskName, build_masks, show_regions
from fewmask.pretrain.student import DecoderShape, Hidden, build_student
from fewmask.types import Batch, UserError, Views

PREVIEW_SEED = 0


class G2LL(Objective):
    """Global-to-local self-supervision (G2LL, ISBI 2023): reconstruction plus same-view self-distillation.

    Paper: two colour-augmented views u, v of an image; the student (MAE on ViT-S, decoder of 2 blocks, 384 wide, 6
    heads) sees each masked, the teacher each unmasked, and each view is paired with itself. With the global feature
    cls, a 3-layer projector P and the running centre C of the teacher's scores:

        L_MSE     = mean over masked patches of (reconstruction - patch)^2                                    (eq. 3)
        L_distill = - sum over x in {u, v} of softmax((P_t(cls_t(x)) - C) / tau_t) . log softmax(P_s(cls_s(x')) / tau_s)
        L         = w1 L_MSE + w2 L_distill, w1 = w2 = 1                                                (eqs. 5 to 7)

    Masks: 25 % of the patches by superpixel, "semantic_focal" (beta = 0.7), "semantic", or "random". SLIC: 8 segments.

    Ours, by DINO's code: the teacher is the student's running average, momentum 0.996 -> 1 by a cosine; tau_t 0.04,
    tau_s 0.1, centre 0.9; the projector's form and sizes. Ours: the recipe's w2 of 0.05, for short trainings; the
    decoder is as wide as the encoder unless told; 4,096 prototypes where DINO has 65,536 for 1.2 M images; both views
    of one crop, with crop and flips as MAE; a mask of its own for each of u and v; the mean over images of the sum over
    views; `norm_pix`; a CNN sees painted pixels and its global feature is the mean of the coarsest map (see
    `HiddenPixels`); the guard against collapse, which stops after `collapse_patience` steps, or two fifths of a
    training that is shorter (0: never). The projector's last layer learns from the start (DINO holds it for an epoch),
    and the recipe clips gradients at a norm of 3. The momentum is a step's: half-way through 1,500 steps the teacher is
    what the student was a fifth of the training ago.

    Raises UserError for settings that cannot work and, when called, for a batch of one image or without superpixels.
    """

    min_batch = 2

    def __init__(
        self,
        encoder: Encoder,
        mask_ratio: float = 0.25,
        mask: MaskName = "semantic_focal",
        focal_share: float = 0.7,
        num_segments: int = 8,
        mask_patch: int | None = None,
        norm_pix: bool = False,
        decoder_dim: int | None = None,
        decoder_depth: int = 2,
        decoder_heads: int | None = None,
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
        super().__init__()
        self.student = build_student(
            encoder, mask_patch, DecoderShape(decoder_dim, decoder_depth, decoder_heads), norm_pix
        )
        self.masking, self.superpixels = build_masks(
            mask, self.student.num_patches, mask_ratio, focal_share, num_segments
        )
        self.projector = Projector(global_dim(encoder), num_prototypes, projector_hidden, projector_bottleneck)
        self.teacher = Teacher(self.followed(), momentum)
        self.centre = Centre(num_prototypes, centre_momentum)
        self.guard = CollapseGuard(advice(reconstruction=True), collapse_patience)
        self.tau_s, self.tau_t = tau_s, tau_t
        self.reconstruction_weight, self.distillation_weight = reconstruction_weight, distillation_weight
        self.crop_scale, self.vertical_flip = crop_scale, vertical_flip

    def followed(self) -> dict[str, nn.Module]:
        """Return the student's modules that the teacher has a copy of."""
        return {"encoder": self.student.encoder, "projector": self.projector}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss", its terms "reconstruction" and "distillation", and the guard's figures.

        `batch.image` holds the views u (b, 3, s, s), `extra["second"]` the views v, both normalised.
        """
        check_centring(len(batch.image))
        pair = stack_pair(batch)
        hidden = Hidden.of(self.masking(pair), self.masking.num_masked)
        tokens = self.student.tokens(pair.image, hidden)
        reconstruction = self.student.error(pair.image, tokens, hidden)
        scores = self.teacher.scores(pair.image)
        target = sharpen(scores, self.centre.value, self.tau_t)
        # u is compared with u and v with v: row i of both sides is the same view of the same image.
        each = cross_entropy(target, self.projector(tokens[:, 0]), self.tau_s)
        distillation = each.view(2, -1).sum(0).mean()
        figures = self.guard(tokens[:, 0], target)
        if self.training:
            self.centre.update(scores)
        loss = self.reconstruction_weight * reconstruction + self.distillation_weight * distillation
        terms = {"reconstruction": reconstruction.detach(), "distillation": distillation.detach()}
        return {"loss": loss, **terms, **figures}

    def maps(self) -> dict[str, Slic]:
        """Return the superpixels its masks follow, none for random ones."""
        return self.superpixels

    def product(self) -> Encoder:
        """Return the student's encoder."""
        return self.student.encoder

    def views(self) -> Views:
        """Return two colour-augmented views of one crop, the superpixels moved with it."""
        return CropViews(
            self.student.encoder.size,
            scale=self.crop_scale,
            vertical=self.vertical_flip,
            colour=SSL_COLOUR,
            pair=True,
        )

    def after_step(self, progress: float) -> None:
        """Move the teacher towards the student; stop the run if the representation has collapsed."""
        self.teacher.follow(self.followed(), progress)
        self.guard.after_step(progress)

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return "reconstruction", strips (b, 3, s, 4 s): the view u, its superpixels, masked, and reconstructed.

        Without superpixels (random masks on plain batches) the strip has three pictures.
        """
        mask = self.masking(batch, torch.Generator().manual_seed(PREVIEW_SEED))
        hidden = Hidden.of(mask, self.masking.num_masked)
        shown = [denormalise(x) for x in (batch.image, *self.student.paint(batch.image, hidden))]
        return {"reconstruction": torch.cat(show_regions(shown, batch), dim=3)}


def stack_pair(batch: Batch) -> Batch:
    """Return a batch of 2 b images, all views u and then all views v, with their superpixels, if any."""
    if "second" not in batch.extra:
        raise UserError("G2LL compares two views of each image, and this batch has one: pass it through its views.")
    extra = {"superpixels": torch.cat([batch.extra["superpixels"]] * 2)} if "superpixels" in batch.extra else {}
    image = torch.cat([batch.image, batch.extra["second"]])
    return replace(batch, image=image, names=[], mask=None, label=None, extra=extra)


def check_weights(reconstruction: float, distillation: float) -> None:
    """Raise a UserError unless the weights are not negative and one of them is above zero."""
    if min(reconstruction, distillation) < 0 or reconstruction + distillation == 0:
        raise UserError(
            f"The weights of the loss cannot be {reconstruction} and {distillation}: give numbers of at least 0, "
            "one of them above it."
        )
