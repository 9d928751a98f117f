"""PCGrad: take from each task's gradient what works against another's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Gradients = list[Tensor | None]


def surgery_loss(losses: Sequence[Tensor], shared: Sequence[nn.Parameter], own: Sequence[nn.Parameter]) -> Tensor:
    """Return the sum of the losses, whose gradient is PCGrad's on `shared` parameters and the sum's on all others.

    `own` are the other parameters the losses depend on (heads); what is in neither list gets no gradient. The value
    is that of the sum. One backward pass a loss is done here; the backward pass of the result only hands the gradients
    out, and so any loop that calls it does gradient surgery without knowing. Under fp16 the gradients are taken
    before the loop scales its loss, so that very small ones vanish: prefer bf16 or fp32. With several
    processes, each operates on the gradients of its own losses, and the results are averaged. Without gradient
    mode, it is the sum.
    """
    total = torch.stack([loss.float() for loss in losses]).sum()
    if not torch.is_grad_enabled():
        return total
    parameters = [*shared, *own]
    with torch.autocast(total.device.type, enabled=False):
        each = [_gradients(loss, parameters) for loss in losses]
    result = [*_project_parts([g[: len(shared)] for g in each], shared), *_add([g[len(shared) :] for g in each])]
    carrier = total.new_zeros(())
    for parameter, gradient in zip(parameters, result, strict=True):
        if gradient is not None:
            carrier = carrier + (parameter.float() * gradient.float()).sum()
    # The carrier is linear in every parameter, with the wanted gradient as its slope; its value is taken out again.
    return total.detach() + (carrier - carrier.detach())


def project(gradients: Sequence[Tensor]) -> Tensor:
    """Return PCGrad's gradient (d,) for one gradient (d,) a task (Yu et al. 2020, algorithm 1).

    Each task's gradient, for the others in random order: where its inner product with g_j is negative, it loses its
    part along g_j, g <- g - (g . g_j) / |g_j|^2 g_j; then all are added. The order is drawn from torch's generator.
    """
    result = torch.zeros_like(gradients[0])
    for i, own in enumerate(gradients):
        others = [g for j, g in enumerate(gradients) if j != i]
        kept = own
        for j in torch.randperm(len(others)).tolist():
            against = (kept @ others[j]).clamp(max=0)
            kept = kept - against / (others[j] @ others[j]).clamp(min=torch.finfo(own.dtype).tiny) * others[j]
        result = result + kept
    return result


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Gradients:
    if not loss.requires_grad:
        return [None] * len(parameters)
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))


def _project_parts(each: Sequence[Gradients], parameters: Sequence[nn.Parameter]) -> Gradients:
    """Return the projected gradient of each parameter, None for one that no loss depends on."""
    used = [i for i in range(len(parameters)) if any(g[i] is not None for g in each)]
    if not used:
        return [None] * len(parameters)
    flat = [torch.cat([_or_zero(g[i], parameters[i]) for i in used]) for g in each]
    parts = project(flat).split([parameters[i].numel() for i in used])
    result: Gradients = [None] * len(parameters)
    for i, part in zip(used, parts, strict=True):
        result[i] = part.view(parameters[i].shape)
    return result


def _or_zero(gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
    return torch.zeros(parameter.numel(), device=parameter.device) if gradient is None else gradient.float().flatten()


def _add(each: Sequence[Gradients]) -> Gradients:
    columns = [[g for g in column if g is not None] for column in zip(*each, strict=True)]
    return [torch.stack(column).sum(0) if column else None for column in columns]
