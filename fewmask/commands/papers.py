"""What the papers report for the tables that `fewmask reproduce` measures, and where a recipe leaves their setting."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewmask.commands.tables import LABEL_FRACTIONS
from fewmask.config import Recipe
from fewmask.models.vit import VIT_SHAPES
from fewmask.pretrain import PRETRAINERS

NOT_SAID = "not said"

Figures = dict[str, dict[str, dict[float, dict[str, float]]]]
"""Percent (HD95: as printed) by data set ("test" or "unseen"), row, label fraction and metric."""


@dataclass(frozen=True)
class Paper:
    """A published table: `figures` as printed, `settings` by stage and recipe key, and the data in words.

    A value `NOT_SAID` is one that the text we have does not give. `methods` holds settings of the methods' own.
    """

    title: str
    figures: Figures
    settings: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, str]
    seeds: str
    remark: str = ""


def _by_fraction(*pairs: tuple[float, float]) -> dict[float, dict[str, float]]:
    figures = [{"dice": dice, "iou": iou} for dice, iou in pairs]
    return dict(zip(LABEL_FRACTIONS if len(pairs) > 1 else (1.0,), figures, strict=True))


_G2LL_TABLE1: Figures = {
    "test": {
        "random": _by_fraction((68.98, 58.37), (76.64, 66.35), (79.54, 69.74), (81.19, 71.58)),
        "supervised": _by_fraction((73.93, 62.91), (79.35, 69.20), (81.40, 71.92), (81.90, 72.57)),
        "mae": _by_fraction((73.50, 62.89), (79.46, 69.28), (81.39, 72.16), (81.58, 72.31)),
        "dino": _by_fraction((73.17, 62.41), (78.85, 68.87), (81.37, 71.92), (81.38, 71.91)),
        "g2ll": _by_fraction((74.43, 63.27), (80.28, 70.34), (81.98, 72.70), (82.46, 72.96)),
    }
}
_G2LL_TABLE2: Figures = {
    "test": {
        "mask-random": _by_fraction((81.54, 71.97)),
        "mask-semantic": _by_fraction((81.76, 72.22)),
        "mask-semantic-focal": _by_fraction((82.16, 72.62)),
    }
}
_TEDMAE: Figures = {
    "test": {"all": {1.0: {"dice": 82.1, "iou": 72.6, "hd95": 13.0}}},
    "unseen": {"all": {1.0: {"dice": 91.2, "iou": 84.5, "hd95": 8.9}}},
}

_MODEL = {"model.encoder": "vit_small_patch16", "model.size": 256, "model.weights": "none"}
_SILENT = ("weight_decay", "betas", "clip", "min_lr")
_SILENT_FINETUNE = (*_SILENT, "warmup", "layer_decay", "min_epoch_steps", "method.average")
_G2LL_SETTINGS = {
    "pretrain": {
        **_MODEL, "pretrain.optimiser": "adamw", "pretrain.lr": 1.5e-4, "pretrain.batch_size": 128,
        "pretrain.epochs": 300, "pretrain.warmup": 40 / 300, "run.time": "none",
        **dict.fromkeys((f"pretrain.{key}" for key in _SILENT), NOT_SAID),
    },
    "finetune": {
        **_MODEL, "model.segmenter": "transunet", "finetune.optimiser": "adam", "finetune.lr": 3e-4,
        "finetune.batch_size": 16, "finetune.epochs": 100, "run.time": "none",
        **dict.fromkeys((f"finetune.{key}" for key in _SILENT_FINETUNE), NOT_SAID),
    },
}  # fmt: skip
_DECODER = {"decoder_dim": 384, "decoder_depth": 2, "decoder_heads": 6}
_CROPS = ("crop_scale", "vertical_flip")
_G2LL_METHODS: dict[str, dict[str, Any]] = {
    "g2ll": {
        **_DECODER, "mask_ratio": 0.25, "mask": "semantic_focal", "focal_share": 0.7, "num_segments": 8,
        "norm_pix": False, "reconstruction_weight": 1.0, "distillation_weight": 1.0, "num_prototypes": NOT_SAID,
        "momentum": NOT_SAID, **dict.fromkeys(_CROPS, NOT_SAID),
    },
    "mae": {**_DECODER, "norm_pix": False, **dict.fromkeys(("mask_ratio", *_CROPS), NOT_SAID)},
    "dino": dict.fromkeys(("num_local", "num_prototypes", "momentum", "keep", *_CROPS), NOT_SAID),
    "supervised": dict.fromkeys(("label_smoothing", "colour", *_CROPS), NOT_SAID),
}  # fmt: skip
_TEDMAE_METHOD = (
    "mask_ratio", "mask", "norm_pix", *_DECODER, "num_prototypes", "momentum", "conversion", "reduction",
    "distillation", "reconstruction_weight", "distillation_weight", *_CROPS,
)  # fmt: skip
_NEEDED_BY = {
    **dict.fromkeys(("num_prototypes", "momentum", "distillation", "distillation_weight"), ("teacher",)),
    "conversion": ("teacher", "ec"), "reduction": ("teacher", "df"),
}  # fmt: skip
_FINETUNING = (
    "How fine-tuning augments, its loss (cross-entropy and Dice in equal parts), and that the epoch with the best "
    "validation Dice is kept are ours: the text we have does not say."
)
_DATA = {
    "pretrain": "the 25,331 images of ISIC-2019",
    "finetune": "ISIC-2017's official split of 2,000 / 150 / 600 images for training / validation / test",
}

# Neither abstract says how anything was trained.
_SETTINGS_NOT_SAID = {
    "finetune": dict.fromkeys(
        ("model.encoder", "model.segmenter", "model.size", "model.weights", "run.time"), NOT_SAID
    ),
    "distill": dict.fromkeys(
        ("student.encoder", "student.segmenter", "student.weights", "model.size", "distill.optimiser", "distill.lr",
         "distill.batch_size", "distill.epochs", "run.time"),
        NOT_SAID,
    ),
}  # fmt: skip

PAPERS: dict[str, Paper] = {
    "g2ll-table1": Paper(
        "G2LL (ISBI 2023), table 1: pre-training methods by share of labels",
        _G2LL_TABLE1, _G2LL_SETTINGS, _G2LL_METHODS, _DATA, "one figure a cell, without an interval",
        f"{_FINETUNING} Row 'figure' is our own method, of no paper.",
    ),
    "g2ll-table2": Paper(
        "G2LL (ISBI 2023), table 2: mask strategies without distillation, all labels",
        _G2LL_TABLE2, _G2LL_SETTINGS, {"mae": {**_G2LL_METHODS["mae"], "mask_ratio": 0.25}}, _DATA,
        "one run each", _FINETUNING,
    ),
    "tedmae": Paper(
        "TEDMAE (MBEC 2024): the parts of generalizable self-distillation",
        _TEDMAE,
        {stage: dict.fromkeys(keys, NOT_SAID) for stage, keys in _G2LL_SETTINGS.items()},
        {"tedmae": dict.fromkeys(_TEDMAE_METHOD, NOT_SAID)},
        {**_DATA, "finetune": "ISIC-2017", "unseen": "PH2"}, "not said in the abstract",
        "TEDMAE is written from its abstract alone; rows other than 'all' have no published figure here. "
        f"{_FINETUNING}",
    ),
    "boundary-distillation": Paper(
        "Boundary distillation (MBEC 2024): MBF and M2BF beside other losses, reimplemented from the abstract",
        {}, _SETTINGS_NOT_SAID, {}, {"finetune": "ISIC-2016 and PH2", "unseen": "none that the text we have names"},
        "not said in the abstract",
        "MBF and M2BF are reimplemented from the abstract alone, which gives no figure: nothing here stands beside the "
        "paper's. Networks, the width of the band and the share that is dropped are ours, and so are the weights of "
        "all losses but CWD's and EMKD's, which are their papers'.",
    ),
    "two-stage": Paper(
        "Two-stage multi-task self-supervision (arXiv 2402.07119), reimplemented from the abstract",
        {}, _SETTINGS_NOT_SAID, {}, {"finetune": "SIIM-ACR's X-rays, with pneumothorax or without"},
        "not said in the abstract",
        "The two-stage method is reimplemented from the abstract alone, which gives no figure: nothing here stands "
        "beside the paper's. The five tasks, their heads, lambda, the student and all networks are ours.",
    ),
}  # fmt: skip


def deviations(paper: Paper, stage: str, recipes: Mapping[str, Recipe]) -> list[str]:
    """Return a sentence for each setting of a stage in which the recipes, by row of the table, leave the paper's.

    The values are those of the resolved recipes; of a method's settings, those its constructor would fill in.
    """
    found = []
    for key, theirs in paper.settings.get(stage, {}).items():
        found += _sentence(key, theirs, {row: _value(recipe, key) for row, recipe in recipes.items()})
    if stage == "pretrain":
        for method, settings in paper.methods.items():
            users = {row: recipe for row, recipe in recipes.items() if _method(recipe)["name"] == method}
            for key, theirs in settings.items():
                ours = {row: _method_value(recipe, key) for row, recipe in users.items() if _uses(recipe, key)}
                found += _sentence(f"pretrain.method.{key} of {method}", theirs, ours)
    return found


def _sentence(key: str, theirs: Any, ours: Mapping[str, Any]) -> list[str]:
    rows_with: dict[str, list[str]] = {}
    for row, value in ours.items():
        if not _same(theirs, value):
            rows_with.setdefault(_text(value), []).append(row)
    if not rows_with:
        return []
    everywhere = len(rows_with) == 1 and sum(map(len, rows_with.values())) == len(ours)
    here = "; ".join(text if everywhere else f"{text} for {', '.join(rows)}" for text, rows in rows_with.items())
    where = "the text we have does not say" if theirs == NOT_SAID else f"the paper has {_text(theirs)}"
    return [f"{key}: {where}, here {here}."]


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, float) and isinstance(ours, int | float):
        return abs(theirs - ours) < 1e-3 * abs(theirs)
    return bool(theirs == ours)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _value(recipe: Recipe, key: str) -> Any:
    value: Any = recipe.resolved()
    for part in key.split("."):
        value = value[part]
    return value


def _uses(recipe: Recipe, key: str) -> bool:
    return all(_method(recipe).get(part, True) for part in _NEEDED_BY.get(key, ()))


def _method(recipe: Recipe) -> dict[str, Any]:
    return recipe.stage("pretrain").method


def _method_value(recipe: Recipe, key: str) -> Any:
    method = _method(recipe)
    value = method.get(key, inspect.signature(PRETRAINERS[method["name"]]).parameters[key].default)
    as_encoder = {"decoder_dim": "dim", "decoder_heads": "heads"}.get(key)
    if value is None and as_encoder and recipe.model.encoder in VIT_SHAPES:
        return getattr(VIT_SHAPES[recipe.model.encoder], as_encoder)
    return value
