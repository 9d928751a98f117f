"""Encoders and segmenters: tables, how to build one from settings, and how to keep one in a file."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from torch import nn

from fewmask.models.cnn import Cnn
from fewmask.models.encoder import Encoder
from fewmask.models.mobile_unet import MobileUnet
from fewmask.models.segmenter import Segmenter
from fewmask.models.storage import read_model_file, write_model_file
from fewmask.models.tiny_unet import TinyCnn, TinyUnet
from fewmask.models.transunet import Transunet
from fewmask.models.unet import Unet
from fewmask.models.vit import VIT_SHAPES, Vit
from fewmask.models.weights import load_weights
from fewmask.registry import build, choose
from fewmask.types import UserError

__all__ = [
    "ENCODERS",
    "SEGMENTERS",
    "Encoder",
    "Segmenter",
    "build_encoder",
    "build_segmenter",
    "encoder_of",
    "load_model",
    "save_model",
]

ENCODERS: dict[str, Callable[..., Encoder]] = {
    **dict.fromkeys(VIT_SHAPES, Vit),
    "efficientnet_lite0": Cnn,
    "tf_efficientnet_lite0": Cnn,
    "mobilenetv2_100": Cnn,
    "mobilenetv4_conv_small": Cnn,
    "resnet18": Cnn,
    "resnet34": Cnn,
    "tiny": TinyCnn,
}
"""The encoders in use here; the name of any other CNN of timm is taken too (see `encoder_factory`)."""

SEGMENTERS: dict[str, Callable[..., Segmenter]] = {
    "unet": Unet,
    "transunet": Transunet,
    "mobile_unet": MobileUnet,
    "tiny_unet": TinyUnet,
}


def encoder_factory(name: str) -> Callable[..., Encoder]:
    """Return what builds an encoder: the table's entry, or `Cnn` for any other name that timm knows."""
    if name in ENCODERS:
        return ENCODERS[name]
    if name in timm.list_models():
        return Cnn
    near = difflib.get_close_matches(name, [*ENCODERS, *timm.list_models()], n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UserError(
        f"There is no encoder named '{name}'.{hint} Choose one of: {', '.join(ENCODERS)}; "
        "or the name of any other CNN of timm."
    )


def build_encoder(name: str, weights: str = "none", size: int = 256, **settings: Any) -> Encoder:
    """Build an encoder for images of `size` pixels a side and load its weights.

    `weights` is "none", "imagenet", "packaged" or the path of a fewmask run folder or model file (see
    `fewmask.models.weights`); `settings` are the constructor's. Raises UserError for whatever does not fit.
    """
    encoder = build(encoder_factory(name), settings, "model.encoder_settings", name=name, size=size)
    load_weights(encoder, weights)
    return encoder


def build_segmenter(name: str, encoder: Encoder, **settings: Any) -> Segmenter:
    """Build a segmenter on an encoder, which it shares: training the one trains the other."""
    return build(choose(SEGMENTERS, name, "segmenter"), settings, "model.segmenter_settings", encoder=encoder)


def encoder_of(model: nn.Module) -> Encoder:
    """Return an encoder itself, or that of a segmenter."""
    encoder = model.encoder if isinstance(model, Segmenter) else model
    assert isinstance(encoder, Encoder)
    return encoder


def save_model(path: Path | str, model: Encoder | Segmenter, extra: dict[str, Any] | None = None) -> None:
    """Write an encoder or a segmenter to a safetensors file whose header describes it.

    The header's key "fewmask" holds JSON: kind ("encoder" or "segmenter"), encoder and segmenter ({"name",
    "settings"}), size in pixels, and whatever `extra` adds.
    """
    encoder = encoder_of(model)
    spec: dict[str, Any] = {"kind": "encoder", "encoder": encoder.spec, "size": encoder.size}
    if isinstance(model, Segmenter):
        spec |= {"kind": "segmenter", "segmenter": model.spec}
    write_model_file(Path(path), {**(extra or {}), **spec}, model.state_dict())


def load_model(path: Path | str) -> tuple[Encoder | Segmenter, dict[str, Any]]:
    """Return the model of a file, in evaluation mode, and its description; a bad file raises a UserError."""
    path = Path(path)
    spec, tensors = read_model_file(path)
    try:
        encoder = build_encoder(spec["encoder"]["name"], "none", spec["size"], **spec["encoder"]["settings"])
        model: Encoder | Segmenter = encoder
        if spec["kind"] == "segmenter":
            model = build_segmenter(spec["segmenter"]["name"], encoder, **spec["segmenter"]["settings"])
        model.load_state_dict(tensors)
    except (UserError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: the model in this file cannot be built again ({reason}); save it anew.") from None
    return model.eval(), spec
