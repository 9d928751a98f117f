"""Optimisers and their schedule: one cosine over the progress of the training, whatever bounds it."""

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


def set_learning_rate(optimiser: Optimizer, lr: float) -> None:
    """Give every group its share of the rate."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_scale"]


def build_optimiser(model: nn.Module, settings: StageSection) -> Optimizer:
    """Return the optimiser over the trainable parameters.

    Vectors (biases, norms) and embeddings named `pos_embed`, `cls_token` or `mask_token` do not decay (MAE). The
    encoder's rate is scaled by `encoder_lr_scale`, and by `layer_decay ** (depth from the top)` for a ViT (BEiT, MAE).
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    depth = _encoder_depth(model)
    if settings.layer_decay != 1.0 and not depth:
        raise UserError("layer_decay needs an encoder made of blocks, such as a ViT; leave it out or set it to 1.0.")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or name.endswith(("pos_embed", "cls_token", "mask_token"))
        decay = 0.0 if plain else settings.weight_decay
        scale = _scale(name, depth, settings)
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale})
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
