"""KD: the student's probabilities follow the teacher's softened ones."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fewmask.distill.distiller import Distiller, check_temperature
from fewmask.distill.widths import Widths
from fewmask.types import Batch, SegOutput


class KD(Distiller):
    """T^2 KL(Bernoulli(sigma(t / T)) || Bernoulli(sigma(s / T))), mean over pixels (Hinton et al. 2015; T = 4).

    One logit z and a sigmoid are a softmax over (z, 0), so this is the paper's loss for two classes, factor T^2
    included. It is zero for identical logits alone. A temperature of zero or less raises a UserError.
    """

    def __init__(self, student: Widths, teacher: Widths, temperature: float = 4.0) -> None:
        check_temperature(temperature)
        super().__init__()
        self.temperature = temperature

    def per_image(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Tensor:
        """Return the loss of each image, (b,)."""
        return bernoulli_divergence(student.logits, teacher.logits, self.temperature).flatten(1).mean(1)


def bernoulli_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of the probabilities sigma(logit / T), elementwise."""
    s, t = student / temperature, teacher / temperature
    positive = t.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(s))
    negative = (-t).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return temperature**2 * (positive + negative)
