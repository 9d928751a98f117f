"""Signs that a representation says the same of every image, and the guard that stops a run when it does."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.processes import mean_over_processes, num_processes
from fewmask.types import NotTrainedError, UserError

SHARE = 0.4  # of a training's steps, where that is less than the patience


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Return the spread of the directions of features (b, d) over the images of all processes: a scalar in [0, 1].

    The root of the mean squared distance of the unit-length features from their mean: 0 when all point the same way,
    1 when they cancel out (SimSiam, Chen and He 2021, looks at the same standard deviation, per channel).
    """
    unit = F.normalize(features.float(), dim=1)
    # For unit vectors the mean squared distance from the mean is 1 - |mean|^2; the direct form keeps its digits.
    mean = mean_over_processes(unit.mean(0))
    return mean_over_processes((unit - mean).square().sum(1).mean()).sqrt()


@torch.no_grad()
def entropies(probability: Tensor) -> tuple[Tensor, Tensor]:
    """Return two scalars in [0, 1]: the teacher's entropy, and what its choice tells of the image.

    `probability` (b, k) are its distributions. The first is their mean entropy over log k: 1 when uniform. The second
    is the mutual information of image and prototype, H(mean p) - mean H(p), over its bound log min(b, k): 0 when all
    images get the same distribution, be it uniform or one prototype, which are the two ways to collapse (ours).
    """
    num_prototypes = probability.shape[1]
    num_images = len(probability) * num_processes()
    each = mean_over_processes(entropy(probability).mean())
    whole = entropy(mean_over_processes(probability.mean(0)))
    bound = math.log(max(min(num_images, num_prototypes), 2))
    return each / math.log(num_prototypes), ((whole - each) / bound).clamp(0, 1)


def entropy(probability: Tensor) -> Tensor:
    """Return the entropy in nats of distributions (..., k)."""
    return torch.special.entr(probability).sum(-1)


def advice(temperature: bool = True, reconstruction: bool = False) -> str:
    """Return what to change after a collapse, for a teacher with a temperature or a loss that reconstructs too."""
    ways = ["raise pretrain.batch_size or pretrain.method.momentum"]
    ways.append(f"lower pretrain.lr{' or pretrain.method.tau_t' if temperature else ''}")
    if reconstruction:
        ways.append("give the reconstruction more weight (pretrain.method.reconstruction_weight)")
    return f"{', '.join(ways[:-1])}, or {ways[-1]}, in another output folder"


class CollapseGuard(nn.Module):
    """Counts the steps in a row at which a sign of collapse was there, and stops the run after `patience` of them.

    In a short training it is after two fifths of its steps, for it may have fewer than `patience`.

    Signs: `feature_std` below `min_std`; the teacher's information (see `entropies`) below `min_information`. Nothing
    is counted during the first `grace` of the training: cross-view distillation often starts on a plateau where all
    targets are alike, and leaves it again. All ours. The counts are buffers, so a resumed run goes on counting; they
    are read by the host every `every` steps only, so that an accelerator is not kept waiting. A patience of 0 never
    stops. `advice` ends the sentence shown to the user.
    """

    low_std: Tensor
    low_information: Tensor

    def __init__(
        self,
        advice: str,
        patience: int,
        min_std: float = 0.01,
        min_information: float = 1e-3,
        grace: float = 0.2,
        every: int = 20,
    ) -> None:
        if patience < 0:
            raise UserError(f"'collapse_patience' cannot be {patience}: give a number of steps, or 0 for no guard.")
        super().__init__()
        self.advice, self.patience, self.grace, self.every = advice, patience, grace, every
        self.min_std, self.min_information = min_std, min_information
        self.register_buffer("low_std", torch.zeros((), dtype=torch.int64))
        self.register_buffer("low_information", torch.zeros((), dtype=torch.int64))
        self.num_checks = 0
        self.began = 0.0

    @torch.no_grad()
    def forward(self, features: Tensor, probability: Tensor | None = None) -> dict[str, Tensor]:
        """Return the terms to log, and count in training mode.

        "feature_std" of features (b, d); with the teacher's distributions (b, k) "teacher_entropy" and
        "teacher_information" too.
        """
        terms = {"feature_std": feature_std(features)}
        if probability is not None:
            terms["teacher_entropy"], terms["teacher_information"] = entropies(probability)
        if self.training:
            count_low(self.low_std, terms["feature_std"] < self.min_std)
            if probability is not None:
                count_low(self.low_information, terms["teacher_information"] < self.min_information)
        return terms

    def after_step(self, progress: float) -> None:
        """Raise a NotTrainedError when a sign of collapse has been there for too many steps in a row."""
        if progress < self.grace:
            self.low_std.zero_()
            self.low_information.zero_()
            return
        self.num_checks += 1
        if self.num_checks == 2:
            self.began = progress  # not before the first, which may hold the start of an accelerator
        if not self.patience or self.num_checks % min(self.every, self.patience):
            return
        limit = self.limit(progress)
        if int(self.low_std) >= limit:
            raise NotTrainedError(self._sentence("its features differ by less than", self.min_std, int(self.low_std)))
        if int(self.low_information) >= limit:
            sign = "its teacher's targets tell images apart by less than"
            raise NotTrainedError(self._sentence(sign, self.min_information, int(self.low_information)))

    def limit(self, progress: float) -> float:
        """Return how many steps in a row are too many: `patience`, or two fifths of a training that has fewer steps.

        How many it has is told by how far those since this process began to count have brought it.
        """
        passed = progress - self.began
        in_all = (self.num_checks - 2) / passed if passed > 0 else math.inf
        return min(self.patience, max(self.every, SHARE * in_all))

    def _sentence(self, sign: str, bound: float, count: int) -> str:
        return (
            f"The representation collapsed: {sign} {bound:g} (on a scale from 0 to 1) for {count} steps in a row, so "
            f"every image looks the same to the encoder; {self.advice}."
        )


def count_low(counter: Tensor, low: Tensor) -> None:
    """Add one to the counter where the sign is there, else set it to zero."""
    counter.copy_(torch.where(low, counter + 1, 0))
