"""Self-distillation: a teacher that is a running average of the student, centred targets, and their cross-entropy."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from fewmask.models import Encoder
from fewmask.models.vit import Vit
from fewmask.pretrain.projector import Projector
from fewmask.processes import mean_over_processes, num_processes
from fewmask.types import UserError


def ema_momentum(progress: float, start: float) -> float:
    """Return the teacher's momentum: a cosine from `start` to 1 over the training (code: DINO, BYOL)."""
    return 1 - (1 - start) * (math.cos(math.pi * min(progress, 1.0)) + 1) / 2


class Teacher(nn.Module):
    """Copies of the student's modules that take no gradient and follow it: theta_t <- m theta_t + (1 - m) theta_s.

    Parameters are averaged; buffers are the copy's own. Ours: batch normalisation uses the statistics of the batch
    while training, as DINO's teacher does (the student's running ones may come from masked images), and
    everything else is in eval mode, so that the targets have no dropped paths. Raises UserError for a momentum outside
    [0, 1].
    """

    def __init__(self, students: dict[str, nn.Module], momentum: float) -> None:
        if not 0 <= momentum <= 1:
            raise UserError(f"'momentum' cannot be {momentum}: give a number between 0 and 1, such as 0.996.")
        super().__init__()
        self.copies = nn.ModuleDict({name: copy.deepcopy(module) for name, module in students.items()})
        self.requires_grad_(False)
        self.momentum = momentum
        self.train()

    def train(self, mode: bool = True) -> Teacher:
        """Set the mode of the batch normalisations; all else stays in eval mode."""
        super().train(False)
        self.training = mode
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = mode
        return self

    @property
    def encoder(self) -> Encoder:
        """The copy of the student's encoder."""
        encoder = self.copies["encoder"]
        assert isinstance(encoder, Encoder)
        return encoder

    @property
    def projector(self) -> Projector:
        """The copy of the student's projector."""
        projector = self.copies["projector"]
        assert isinstance(projector, Projector)
        return projector

    @torch.no_grad()
    def scores(self, image: Tensor) -> Tensor:
        """Return the scores (b, k) of whole images (b, 3, s, s)."""
        return self.projector(self.encoder.global_feature(image))

    @torch.no_grad()
    def follow(self, students: dict[str, nn.Module], progress: float) -> None:
        """Move every copy towards its student by one step of the schedule."""
        weight = 1 - ema_momentum(progress, self.momentum)
        for name, student in students.items():
            own: list[Tensor] = list(self.copies[name].parameters())
            torch._foreach_lerp_(own, list[Tensor](student.parameters()), weight)


class Centre(nn.Module):
    """The running mean C of the teacher's scores: C <- m C + (1 - m) mean, over the images of all processes (DINO).

    `value` is float32 (1, k) and starts at zero. Raises UserError for a momentum outside [0, 1).
    """

    value: Tensor

    def __init__(self, dim: int, momentum: float = 0.9) -> None:
        if not 0 <= momentum < 1:
            raise UserError(f"'centre_momentum' cannot be {momentum}: give a number of at least 0, below 1 (0.9).")
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(1, dim))

    @torch.no_grad()
    def update(self, scores: Tensor) -> None:
        """Take in the teacher's scores (b, k) of a step."""
        self.value.lerp_(mean_over_processes(scores.float().mean(0, keepdim=True)), 1 - self.momentum)


def sharpen(scores: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """Return the teacher's distribution softmax((scores - C) / tau_t), float32 (b, k)."""
    return ((scores.float() - centre) / temperature).softmax(1)


def cross_entropy(target: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Return -sum_k target_k log softmax(scores / tau_s)_k for each row, float32 (b,)."""
    return -(target * (scores.float() / temperature).log_softmax(1)).sum(1)


def global_tokens(encoder: Encoder, image: Tensor) -> Tensor:
    """Return tokens (b, 1 + k, d) whose first is `encoder.global_feature`.

    A ViT's class token and patches; of a CNN the mean of its coarsest map, then the map's positions (ours).
    """
    if isinstance(encoder, Vit):
        return encoder.tokens(image)
    return pooled_first(encoder(image)[-1])


def pooled_first(features: Tensor) -> Tensor:
    """Return a map (b, d, h, w) as tokens (b, 1 + h * w, d), its mean first."""
    cells = features.flatten(2).transpose(1, 2)
    return torch.cat([cells.mean(1, keepdim=True), cells], dim=1)


def global_dim(encoder: Encoder) -> int:
    """Return the width of the tokens of `global_tokens`."""
    return encoder.channels[-1]


def check_temperatures(tau_s: float, tau_t: float) -> None:
    """Raise a UserError unless both temperatures are above zero."""
    if min(tau_s, tau_t) <= 0:
        raise UserError(f"Temperatures cannot be tau_s = {tau_s} and tau_t = {tau_t}: give numbers above zero.")


def check_centring(num_images: int) -> None:
    """Raise a UserError when a step has one image only: a centred target, or the guard, would tell nothing."""
    if num_images * num_processes() < 2:
        raise UserError(
            "Self-distillation and its guard against collapse compare the images of a batch with one another, and this "
            "batch holds one image: set pretrain.batch_size to 2 or more."
        )
