"""What the papers report for the tables that `fewmask reproduce` measures, and where a recipe leaves their setting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from fewmask.commands.defaults import method_defaults
from fewmask.commands.tables import LABEL_FRACTIONS
from fewmask.config import ModelSection, Recipe
from fewmask.models.vit import VIT_SHAPES
from fewmask.pretrain.dino import GLOBAL_SCALE

NOT_SAID = "not said"
BY_ROW = "what the row is named for"

Figures = dict[str, dict[str, dict[float, dict[str, float]]]]
"""Percent (HD95: as printed) by data set ("test" or "unseen"), row, label fraction and metric."""


@dataclass(frozen=True)
class Paper:
    """A published table: `figures` as printed, `settings` by stage and recipe key, and the data in words.

    A value `NOT_SAID` is one that the text we have does not give. `methods` holds settings of the methods' own, by
    method; where there are some, every other setting of theirs and of the stages counts as not said too.
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
_G2LL_SETTINGS = {
    "pretrain": {
        **_MODEL, "pretrain.optimiser": "adamw", "pretrain.lr": 1.5e-4, "pretrain.batch_size": 128,
        "pretrain.epochs": 300, "pretrain.warmup": 40 / 300, "run.time": "none",
        "model.segmenter": BY_ROW, "model.segmenter_settings": BY_ROW,
    },
    "finetune": {
        **_MODEL, "model.segmenter": "transunet", "finetune.optimiser": "adam", "finetune.lr": 3e-4,
        "finetune.batch_size": 16, "finetune.epochs": 100, "run.time": "none",
    },
}  # fmt: skip
_DECODER = {"decoder_dim": 384, "decoder_depth": 2, "decoder_heads": 6}
_MASKS = {"focal_share": 0.7, "num_segments": 8}
_G2LL_METHODS: dict[str, dict[str, Any]] = {
    "g2ll": {
        **_DECODER, **_MASKS, "mask_ratio": 0.25, "mask": "semantic_focal", "norm_pix": False,
        "tau_s": 0.1, "tau_t": 0.04, "reconstruction_weight": 1.0, "distillation_weight": 1.0,
    },
    "mae": {**_DECODER, **_MASKS, "mask": BY_ROW, "norm_pix": False},
    "tedmae": dict.fromkeys(("teacher", "ec", "df"), BY_ROW),
    "dino": {},
    "supervised": {},
    "segment": {},
}  # fmt: skip
_EXEMPT = ("method", "instead", "instead_lr", "checkpoint_seconds", "share", "probe_every")  # nothing is learnt by them
_EXEMPT_OF_METHODS = "collapse_patience"
_NEUTRAL = {"encoder_lr_scale": 1.0, "layer_decay": 1.0, "encoder_settings": {}, "segmenter_settings": {}}
"""Values at which a setting does nothing, so that there is nothing to tell."""

Compared = tuple[str, Any, Mapping[str, Any]]
"""A setting's key, the paper's value, and ours by row."""
Used = Callable[[Mapping[str, Any]], bool]


def _with_teacher(method: Mapping[str, Any]) -> bool:
    return bool(method.get("teacher", True))


_USED: dict[str, Used] = {
    **dict.fromkeys(
        ("num_prototypes", "projector_hidden", "projector_bottleneck", "momentum", "centre_momentum", "tau_s", "tau_t",
         "distillation", "distillation_weight", "reconstruction_weight"),
        _with_teacher,
    ),
    "conversion": lambda method: method["teacher"] and method["ec"],
    "reduction": lambda method: method["teacher"] and method["df"],
    "focal_share": lambda method: method["mask"] == "semantic_focal",
    "num_segments": lambda method: method["mask"] != "random",
    **dict.fromkeys(("local_size", "local_scale"), lambda method: method["num_local"] > 0),
    "freeze_encoder": lambda method: method["freeze_encoder"],
}  # fmt: skip
"""When a method's setting decides anything, by its settings; always where it is not named here."""

_FINETUNING = (
    "How views are drawn in detail, that the loss of fine-tuning is cross-entropy and Dice, and that the epoch with "
    "the best validation Dice is kept are ours: the text we have does not say."
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
        _G2LL_TABLE2, _G2LL_SETTINGS, {**_G2LL_METHODS, "mae": {**_G2LL_METHODS["mae"], "mask_ratio": 0.25}}, _DATA,
        "one run each", _FINETUNING,
    ),
    "tedmae": Paper(
        "TEDMAE (MBEC 2024): the parts of generalizable self-distillation",
        _TEDMAE,
        {stage: {key: BY_ROW if value == BY_ROW else NOT_SAID for key, value in settings.items()}
         for stage, settings in _G2LL_SETTINGS.items()},
        {"tedmae": _G2LL_METHODS["tedmae"], "segment": {}},
        {**_DATA, "finetune": "ISIC-2017", "unseen": "PH2"}, "not said in the abstract",
        "TEDMAE is written from its abstract alone; rows other than 'all' have no published figure here. DF alone is "
        f"no row: without a converted picture it would merge the clean one with itself. {_FINETUNING}",
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
    """Return the settings of a stage in which the recipes, by row of the table, leave the paper's, in sentences.

    The values are those of the resolved recipes; of a method's settings, those its constructor would fill in. Every
    setting that decides what is learnt is looked at, so that one which is added later is told without being listed.
    """
    keys = _settings(paper, stage, recipes)
    found = _sentences(
        (key, theirs, {row: _value(recipe, key) for row, recipe in recipes.items()}) for key, theirs in keys.items()
    )
    methods = {row: _method(recipe, stage) for row, recipe in recipes.items()} if paper.methods else {}
    for name in dict.fromkeys(method["name"] for method in methods.values()):
        if name in paper.methods:
            users = {row: method for row, method in methods.items() if method["name"] == name}
            found += _sentences(_of_method(paper.methods[name], users), f"{stage}.method.", f" of {name}")
    return found


def _of_method(theirs: Mapping[str, Any], users: Mapping[str, Mapping[str, Any]]) -> Iterator[Compared]:
    """Yield each setting of a method with the paper's value and those of the rows that use it."""
    for key in next(iter(users.values())):
        if key != "name":
            ours = {row: method[key] for row, method in users.items() if _USED.get(key, _always)(method)}
            yield key, theirs.get(key, NOT_SAID), ours


def _settings(paper: Paper, stage: str, recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """Return the paper's value of every setting of a stage and its network by key."""
    known = dict(paper.settings.get(stage, {}))
    if not (paper.methods and recipes):
        return known
    sections: dict[str, type[BaseModel]] = {
        "model": ModelSection, stage: type(next(iter(recipes.values())).stage(stage))
    }  # fmt: skip
    keys = [f"{name}.{key}" for name, section in sections.items() for key in section.model_fields if key not in _EXEMPT]
    return known | {key: NOT_SAID for key in keys if key not in known}


def _always(_: Mapping[str, Any]) -> bool:
    return True


def _sentences(settings: Iterable[Compared], before: str = "", after: str = "") -> list[str]:
    """Return a sentence for each setting in which rows leave the paper's, and one for all those it is silent of.

    `before` and `after` stand around a setting's key in the former, and before the latter.
    """
    found, silent = [], []
    for key, theirs, ours in settings:
        rows_with: dict[str, list[str]] = {}
        for row, value in ours.items():
            if _differs(key, theirs, value):
                rows_with.setdefault(_text(value), []).append(row)
        everywhere = len(rows_with) == 1 and sum(map(len, rows_with.values())) == len(ours)
        here = "; ".join(text if everywhere else f"{text} for {', '.join(rows)}" for text, rows in rows_with.items())
        if here and theirs == NOT_SAID:
            silent.append(f"{key} ({here})")
        elif here:
            found.append(f"{before}{key}{after}: the paper has {_text(theirs)}, here {here}.")
    where = f"{before.rstrip('.')}{after}: " if before else ""
    return found + ([f"{where}the text we have does not say, here ours: {', '.join(silent)}."] if silent else [])


def _differs(key: str, theirs: Any, ours: Any) -> bool:
    if theirs == BY_ROW:
        return False
    if theirs == NOT_SAID:
        return ours is not None and ours != _NEUTRAL.get(key.rsplit(".", 1)[-1], NOT_SAID)
    return not _same(theirs, ours)


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


def _method(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Return the method's settings by name, its constructor's defaults filled in, with its own "name"."""
    given = recipe.stage(stage).method
    settings = {**method_defaults(recipe, [stage])[stage]["method"], **given}
    shape = VIT_SHAPES.get(recipe.model.encoder)
    for key, as_encoder in (("decoder_dim", "dim"), ("decoder_heads", "heads")):
        if key in settings and settings[key] is None and shape is not None:
            settings[key] = getattr(shape, as_encoder)
    if given["name"] == "dino" and settings["crop_scale"] is None:
        settings["crop_scale"] = GLOBAL_SCALE[settings["num_local"] > 0]
    return {key: value for key, value in settings.items() if key != _EXEMPT_OF_METHODS}
