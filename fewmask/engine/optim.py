"""Optimisers and their schedules: cosines over the progress of the training, whatever bounds it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fewmask.config import StageSection
from fewmask.types import UserError


def learning_rate(progress: float, settings: StageSection) -> float:
    """Return the rate at a progress in [0, 1]: linear warm-up, then cosine to `min_lr` (MAE, DINO)."""
    if progress < settings.warmup:
        return settings.lr * (progress + 1e-3) / (settings.warmup + 1e-3)
    phase = (progress - settings.warmup) / max(1 - settings.warmup, 1e-9)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * min(phase, 1.0)))


def weight_decay(progress: float, settings: StageSection) -> float:
    """Return the decay at a progress in [0, 1]: a cosine from `weight_decay` to `weight_decay_end`, if given (DINO)."""
    end = settings.weight_decay if settings.weight_decay_end is None else settings.weight_decay_end
    return end + (settings.weight_decay - end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_schedule(optimiser: Optimizer, progress: float, settings: StageSection) -> None:
    """Give every group its share of the rate, and those that decay the decay, at a progress in [0, 1]."""
    lr, decay = learning_rate(progress, settings), weight_decay(progress, settings)
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group.get("decays", group["weight_decay"] > 0):  # older checkpoints do not say
            group["weight_decay"] = decay


def build_optimiser(model: nn.Module, settings: StageSection) -> Optimizer:
    """Return the optimiser over the trainable parameters.

    Vectors (biases, norms) do not decay, nor do embeddings named `pos_embed`, `cls_token` or `mask_token` (as where MAE
    is fine-tuned; the pre-training of MAE and DINO lets the tokens decay, which takes a few hundredths of them). The
    encoder's rate is scaled by `encoder_lr_scale`, and by `layer_decay ** (depth from the top)` for a ViT (BEiT, MAE).
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    ever = max(settings.weight_decay, settings.weight_decay_end or 0.0) > 0
    depth = _encoder_depth(model)
    if settings.layer_decay != 1.0 and not depth:
        raise UserError("layer_decay needs an encoder made of blocks, such as a ViT; leave it out or set it to 1.0.")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or name.endswith(("pos_embed", "cls_token", "mask_token"))
        decays, scale = ever and not plain, _scale(name, depth, settings)
        first = {"params": [], "weight_decay": settings.weight_decay * decays, "lr_scale": scale, "decays": decays}
        group = groups.setdefault((decays, scale), first)
        group["params"].append(parameter)
    ordered = [groups[key] for key in sorted(groups)]
    if settings.optimiser == "sgd":
        return torch.optim.SGD(ordered, lr=settings.lr, momentum=settings.betas[0], nesterov=True)
    kind = torch.optim.AdamW if settings.optimiser == "adamw" else torch.optim.Adam
    return kind(ordered, lr=settings.lr, betas=settings.betas, fused=True)


def _scale(name: str, depth: int, settings: StageSection) -> float:
    parts = name.split(".")
    if "encoder" not in parts:
        return 1.0
    layer = _block(name) + 1 if "blocks" in parts else depth + 1 if "norm" in parts else 0
    return settings.encoder_lr_scale * settings.layer_decay ** (depth + 1 - layer if depth else 0)


def _encoder_depth(model: nn.Module) -> int:
    names = [name for name, _ in model.named_parameters() if {"encoder", "blocks"} <= set(name.split("."))]
    return max((_block(name) + 1 for name in names), default=0)


def _block(name: str) -> int:
    parts = name.split(".")
    return int(parts[parts.index("blocks") + 1])
