"""Supervised pre-training: classify the images that carry a class label."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.data.augment import PretrainViews
from fewmask.data.colour import Chain, ColourJitter, RandomGrayscale
from fewmask.data.preprocess import denormalise
from fewmask.models import Encoder
from fewmask.objective import Objective
from fewmask.pretrain.self_distillation import global_dim
from fewmask.processes import mean_over_processes
from fewmask.types import Batch, UserError, Views

UNKNOWN = -1
COLOUR = Chain((ColourJitter(0.4, 0.4, 0.2, 0.1, 0.8), RandomGrayscale(0.2)))


class Supervised(Objective):
    """Cross-entropy on class labels by a linear layer on the global feature: the "Supervise" row of G2LL's table 1.

    Paper: an encoder pre-trained on the classes of ISIC-2019, nothing more is said. Ours: a ViT's class token or a
    CNN's pooled coarsest map; `label_smoothing` (0.1); crop and flips as the other methods have, and DINO's jitter and
    grayscale. `num_classes` is the number of classes of the data; a label of -1 is unknown and takes no part.
    Raises UserError for fewer than two classes and, when called, for a batch without a label.
    """

    needs_labels = True

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        label_smoothing: float = 0.1,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        vertical_flip: bool = True,
        colour: bool = True,
    ) -> None:
        if num_classes < 2:
            raise UserError(
                f"The method 'supervised' needs images of at least two classes, and the data has {num_classes}: fill "
                "the column 'label' of the manifest, or choose a method that needs no labels."
            )
        if not 0 <= label_smoothing < 1:
            raise UserError(f"'label_smoothing' cannot be {label_smoothing}: give a number of at least 0, below 1.")
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(global_dim(encoder), num_classes)
        nn.init.zeros_(self.head.bias)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.label_smoothing = label_smoothing
        self.crop_scale, self.vertical_flip, self.colour = crop_scale, vertical_flip, colour

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and "accuracy", the share of labelled images classified rightly."""
        label = batch.label
        # By all labels and not by its own: so the gradients of several processes add up to those of one.
        num = torch.zeros(()) if label is None else mean_over_processes((label != UNKNOWN).sum().float())
        # Asked on the host alone, as a GPU would be waited for: there such a loss is NaN, and the loop stops at that.
        if label is None or (num.device.type == "cpu" and not num):
            raise UserError(
                "The method 'supervised' got a batch in which no image has a class label: fill the column 'label' of "
                "the manifest, or choose a method that needs no labels."
            )
        logits = self.head(self.encoder.global_feature(batch.image)).float()
        smoothing = self.label_smoothing
        total = F.cross_entropy(logits, label, ignore_index=UNKNOWN, label_smoothing=smoothing, reduction="sum")
        right = ((logits.argmax(1) == label) & (label != UNKNOWN)).sum().float()
        return {"loss": total / num, "accuracy": mean_over_processes(right) / num}

    def product(self) -> Encoder:
        """Return the encoder; the linear layer is thrown away."""
        return self.encoder

    def views(self) -> Views:
        """Return random resized crops, flips and colour."""
        colour = COLOUR if self.colour else None
        return PretrainViews(self.encoder.size, scale=self.crop_scale, vertical=self.vertical_flip, colour=colour)

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return "augmented", what the encoder sees."""
        return {"augmented": denormalise(batch.image)}
