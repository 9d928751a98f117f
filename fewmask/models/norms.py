"""Batch normalisation over the images of all processes, on any device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fewmask.processes import mean_with_gradient, num_processes


def synchronise_norms(model: nn.Module, device: torch.device) -> None:
    """Make every batch normalisation use the statistics of all processes, in place.

    Values and names of the state are kept. On CUDA it becomes torch's own synchronised one, elsewhere, where torch has
    none, a `HostNorm`.
    """
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if not isinstance(norm, _BatchNorm) or isinstance(norm, nn.SyncBatchNorm):
                continue
            if device.type == "cuda":
                # timm's conversion: torch's would drop the activation that timm keeps inside its norms, without a word.
                setattr(parent, name, convert_sync_batchnorm(norm))
            else:
                norm.__class__ = HostNorm  # the same module with another way to normalise


def renew_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Make the running statistics of all batch normalisations those of these batches, in place.

    Every batch counts alike. All else is in eval mode, so that no path is dropped and nothing is drawn, and goes back
    to the mode it came in. Of several processes each gives an equal part of every batch.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    modes, momenta = [(module, module.training) for module in model.modules()], [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for the mean of all
        norm.train()
    with torch.no_grad():
        for batch in batches if norms else ():
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, training in modes:
        module.training = training


class HostNorm(_BatchNorm):
    """Batch normalisation over the equal shares of several processes, for those that talk by gloo; never built anew.

    In eval mode it is plain batch normalisation. What timm keeps inside a norm, such as its activation, comes after it.
    Not a `SyncBatchNorm`: DDP refuses these on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` (b, k, ...), normalised per channel by the mean and the variance over all processes' images."""
        if self.training:
            x = self.normalise(x)
        else:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        for inside in (getattr(self, "drop", None), getattr(self, "act", None)):
            x = x if inside is None else inside(x)
        return x

    def normalise(self, x: Tensor) -> Tensor:
        """Return `x` normalised by this step's statistics, which the running ones take in."""
        axes, shape = [axis for axis in range(x.ndim) if axis != 1], [1, -1, *[1] * (x.ndim - 2)]
        mean = mean_with_gradient(x.float().mean(axes))
        centred = x.float() - mean.view(shape)
        variance = mean_with_gradient(centred.square().mean(axes))
        self.remember(mean, variance, x.numel() // x.shape[1] * num_processes())
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            return torch.addcmul(self.bias.view(shape), centred, (scale * self.weight).view(shape)).to(x.dtype)
        return (centred * scale.view(shape)).to(x.dtype)

    @torch.no_grad()
    def remember(self, mean: Tensor, variance: Tensor, num: int) -> None:
        """Take the mean and variance (k,) of `num` values a channel into the running ones, if these are kept."""
        if not self.track_running_stats or self.num_batches_tracked is None:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * (num / max(num - 1, 1)), weight)
