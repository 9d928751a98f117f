"""KD: the student's probabilities follow the teacher's softened ones."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fewmask.distill.bands import Band, count
from fewmask.distill.distiller import Distiller, check_temperature, mask_of
from fewmask.distill.widths import Widths
from fewmask.types import Batch, SegOutput, UserError


class KD(Distiller):
    """T^2 KL(Bernoulli(sigma(t / T)) || Bernoulli(sigma(s / T))), mean over pixels (Hinton et al. 2015; T = 4).

    One logit z and a sigmoid are a softmax over (z, 0), so this is the paper's loss for two classes, factor T^2
    included. It is zero for identical logits alone.
    Ours: `boundary_weight` times its mean over the band around the lesion's boundary is added (`Band`, of `width`; the
    mean over the picture where there is none), where the few pixels are that networks differ on.
    Raises UserError for a temperature of zero or less, a negative weight or a width that cannot be.
    """

    def __init__(
        self,
        student: Widths,
        teacher: Widths,
        temperature: float = 4.0,
        boundary_weight: float = 0.0,
        width: float = 0.03,
    ) -> None:
        check_temperature(temperature)
        if boundary_weight < 0:
            raise UserError(f"'boundary_weight' cannot be {boundary_weight}: give a number of at least 0.")
        super().__init__()
        self.temperature, self.boundary_weight, self.band = temperature, boundary_weight, Band(width)

    def per_image(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Tensor:
        """Return the loss of each image, (b,)."""
        each = bernoulli_divergence(student.logits, teacher.logits, self.temperature)
        loss = each.flatten(1).mean(1)
        if self.boundary_weight:
            band = self.band(mask_of(batch))
            band |= ~band.any(dim=3, keepdim=True).any(dim=2, keepdim=True)
            loss = loss + self.boundary_weight * ((each * band).sum((1, 2, 3)) / count(band).flatten())
        return loss


def bernoulli_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of the probabilities sigma(logit / T), elementwise."""
    s, t = student / temperature, teacher / temperature
    positive = t.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(s))
    negative = (-t).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return temperature**2 * (positive + negative)
