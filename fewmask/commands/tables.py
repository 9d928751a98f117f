"""The tables that `fewmask reproduce` measures: their rows, what each is compared with, and how much a budget is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

LABEL_FRACTIONS = (0.01, 0.1, 0.5, 1.0)
Losses = Mapping[str, Mapping[str, Any]]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Pretrained:
    """A fine-tuned segmenter: the recipe its encoder is pre-trained by, None for not at all, and its method's settings.

    `network` are settings of [model] that the pre-training needs and its recipe has otherwise. `against` names rows,
    beside the table's references, that the row is compared with; so in every kind of row.
    """

    recipe: str | None = None
    method: Settings = field(default_factory=dict)
    against: tuple[str, ...] = ()
    network: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Teacher:
    """The segmenter that students learn from: fine-tuned in the cell, or those of `grid.teachers`, averaged."""

    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Student:
    """A distilled segmenter: its losses beside the supervised one, and whether images without a mask take part.

    `pseudo_weight` weighs the supervised loss towards the teacher's decision on those images. `learns_from` names whom:
    the cell's teacher, the networks its selection chose, as many plain ones of several seeds, or the plain one alone.
    `ensemble` is how several teachers answer, the recipe's way where None.
    """

    losses: Losses = field(default_factory=dict)
    unlabelled: bool = False
    pseudo_weight: float = 0.0
    against: tuple[str, ...] = ()
    learns_from: Literal["teacher", "selection", "seeds", "plain"] = "teacher"
    ensemble: Literal["average", "mean_kl"] | None = None


@dataclass(frozen=True)
class Single:
    """One candidate of a cell's selection: the best by validation Dice of a task in a mode, or of all where ""."""

    task: str = ""
    mode: Literal["joint", "pretrain", ""] = ""
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class MultiTask:
    """A segmenter trained jointly with every task that needs no masks, all losses with equal weights.

    A task that needs masks would take from the others the images without one, see `Joint`. `combine` as in `Joint`.
    """

    combine: Literal["sum", "pcgrad"] = "sum"
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ensemble:
    """The averaged probabilities of the networks a cell's selection chose, or of as many plain ones of other seeds."""

    of: Literal["selection", "seeds"] = "selection"
    against: tuple[str, ...] = ()


Row = Pretrained | Teacher | Student | Single | MultiTask | Ensemble
Kind = Literal["pretrained", "distilled", "two-stage"]
STAGES_OF_KIND: dict[Kind, tuple[str, ...]] = {
    "pretrained": ("pretrain", "finetune"),
    "distilled": ("finetune", "distill"),
    "two-stage": ("select", "pretrain", "finetune", "distill"),
}


@dataclass(frozen=True)
class Table:
    """What is measured: the rows, and the rows that all are compared with, image by image.

    `finetune` is the recipe of the fine-tuning; `fractions` the shares of the masks; `budgets` the settings by budget;
    `columns` are shown beside Dice, IoU and HD95; `compared` are the metrics of the paired differences.
    """

    rows: Mapping[str, Row]
    references: tuple[str, ...]
    budgets: Mapping[str, Settings]
    finetune: str = "transunet"
    fractions: tuple[float, ...] = (1.0,)
    columns: tuple[str, ...] = ()
    compared: tuple[str, ...] = ("dice",)

    @property
    def distils(self) -> bool:
        """Whether rows are students, with a teacher in each cell, rather than pre-trained encoders."""
        return any(isinstance(row, Student) for row in self.rows.values())

    @property
    def selects(self) -> bool:
        """Whether rows are made of what a selection among auxiliary tasks leaves in each cell."""
        return any(isinstance(row, Single) for row in self.rows.values())

    @property
    def kind(self) -> Kind:
        """What its cells do, which says what settings it has a use for."""
        if self.selects:
            return "two-stage"
        return "distilled" if self.distils else "pretrained"

    @property
    def control(self) -> str:
        """The row that says what is reached without what the others try."""
        return {"pretrained": "random", "distilled": "alone", "two-stage": "plain"}[self.kind]

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that its cells go through."""
        return STAGES_OF_KIND[self.kind]


# G2LL's fine-tuning. Our choice: a rate that falls from block to block would hold back an encoder without pre-training.
_FINETUNE = {
    "finetune.optimiser": "adam", "finetune.lr": 3e-4, "finetune.weight_decay": 0.0, "finetune.layer_decay": 1.0,
    "finetune.epochs": 100, "finetune.batch_size": 16,
}  # fmt: skip
_SECONDS = {
    "finetune.epochs": 1, "finetune.batch_size": 4, "finetune.min_epoch_steps": 12, "finetune.lr": 3e-3,
    "finetune.method.average": 0.0,
}  # fmt: skip
_FULL = {
    **_FINETUNE, "finetune.min_epoch_steps": 1, "finetune.method.average": 0.0,
    "model.encoder": "vit_small_patch16", "model.size": 256,
    "pretrain.optimiser": "adamw", "pretrain.lr": 1.5e-4, "pretrain.batch_size": 128,
    "pretrain.epochs": 300, "pretrain.warmup": 40 / 300,
}  # fmt: skip
PRETRAIN_BUDGETS: dict[str, Settings] = {
    "smoke": {
        **_FINETUNE, **_SECONDS, "grid.seeds": 2, "model.encoder": "vit_micro_patch8", "model.size": 32,
        "model.segmenter_settings": {"decoder_channels": [32, 16, 16, 8]},
        "pretrain.epochs": 1, "pretrain.batch_size": 4, "pretrain.min_epoch_steps": 2,
    },
    "cpu": {
        **_FINETUNE, "finetune.lr": 1e-3, "grid.pretrain_time": "10m", "grid.finetune_time": "60s",
        "grid.num_unseen": 200, "model.encoder": "vit_micro_patch8", "model.size": 64,
        "model.segmenter_settings": {"decoder_channels": [128, 64, 32, 16]},
    },
    "gpu": {**_FULL, "grid.pretrain_time": "2m", "grid.finetune_time": "20s", "grid.num_unseen": 200},
    "full": _FULL,
}  # fmt: skip
"""Settings by budget: seconds on drawn images; hours on two cores, the same time for every method; an hour or so of
a large GPU, likewise, with the paper's networks; the paper's.

"cpu" is what was found informative: in ten minutes of one core a ViT-Tiny on 256 patches has learnt nothing that a
fine-tuning could use, and fine-tuned for a minute it is four points below this network. "gpu" is a plan: nobody ran it.
"""

_FULL_DISTILL = {"model.size": 256, "finetune.epochs": 100, "distill.epochs": 300}
DISTILL_BUDGETS: dict[str, Settings] = {
    "smoke": {
        **_SECONDS, "grid.seeds": 2, "model.size": 64, "model.weights": "none",
        "model.segmenter_settings": {"decoder_channels": [32, 16, 16, 8, 8]},
        "distill.epochs": 1, "distill.batch_size": 4, "distill.min_epoch_steps": 6, "distill.method.average": 0.0,
    },
    "cpu": {
        "grid.finetune_time": "10m", "grid.distill_time": "4m", "grid.num_unseen": 500, "model.size": 128,
    },
    "gpu": {**_FULL_DISTILL, "grid.finetune_time": "90s", "grid.distill_time": "60s", "grid.num_unseen": 200},
    "full": _FULL_DISTILL,
}  # fmt: skip
"""As above; boundary distillation's own setting is not in the text we have, so "full" is ours too."""

TWO_STAGE_BUDGETS: dict[str, Settings] = {
    "smoke": {
        **_SECONDS, "grid.seeds": 2, "grid.student": "two_stage", "model.encoder": "tiny", "model.weights": "none",
        "model.segmenter": "tiny_unet", "model.size": 32, "student.encoder": "tiny", "student.weights": "none",
        "student.segmenter": "tiny_unet", "select.tasks": ["rotation", "restoration"], "select.weights": [0.3],
        "pretrain.epochs": 1, "pretrain.batch_size": 4, "pretrain.min_epoch_steps": 2,
        "distill.epochs": 1, "distill.batch_size": 4, "distill.min_epoch_steps": 6, "distill.method.average": 0.0,
    },
    "cpu": {
        "grid.student": "two_stage", "grid.distill_time": "130s", "grid.num_unseen": 200, "model.size": 128,
        "model.encoder": "tiny", "model.weights": "none", "model.segmenter": "tiny_unet", "select.weights": [0.3],
        "student.encoder": "tiny", "student.segmenter": "tiny_unet", "pretrain.epochs": 2, "pretrain.batch_size": 16,
        "pretrain.lr": 1e-3, "finetune.epochs": 14, "finetune.batch_size": 8, "finetune.lr": 3e-3,
        "distill.batch_size": 16, "distill.lr": 3e-3,
    },
    "full": {
        "grid.student": "two_stage", "grid.train_time": "30m", "grid.distill_time": "30m", "model.size": 256,
    },
}  # fmt: skip
"""As above; the two-stage method's own setting is not in the text we have either.

"cpu" gives every network the same steps of segmentation, not the same time: in half a minute each, what a task takes
is missing from the segmentation, and plain training won on the fold that was tried.
"""


def _masked(mask: str, *against: str) -> Pretrained:
    return Pretrained("mae", {"mask": mask, "mask_ratio": 0.25}, against)


WEIGHTS = {
    "kd": 1.0,  # ours: T^2 is in the loss, so its gradient is of the size of the supervised one's
    "at": 1.0,  # the code's 1e3 / 2 times a mean over positions is about this times our sum, at 32x32 positions
    "fitnet": 1.0,  # ours: a mean over elements, not half the squared norm
    "cwd": 3.0,  # the paper's, on logits
    "mgd": 1.0,  # ours: a mean over elements, not the paper's 2e-5 times a sum
    "emkd": 1.0,  # its three terms have the paper's weights 0.1, 0.9 and 0.9
    "mbf": 1.0,  # ours: the abstract says nothing
    "m2bf": 1.0,  # ours, on the sum over the heads
}
"""The weight of each loss beside a supervised one of weight 1."""

NUM_HEADS = 3
WIDTH = 0.03  # of the image's side: what `mbf` does unless told


LIGHT = 0.1  # of those weights, where a student that has few steps learns more from masks than from features


def _losses(*names: str, **settings: Any) -> Losses:
    return {name: {"weight": WEIGHTS[name], **settings} for name in names}


_BOTH = ("kd", "m2bf")
_BASELINES: dict[str, Row] = {"teacher": Teacher(), "alone": Student()}
_SHARP = _losses("kd", temperature=1.0)
_DISTILLED = {
    **{name: Student(_losses(name)) for name in WEIGHTS},
    "kd+m2bf": Student(_losses(*_BOTH), against=_BOTH),
    "kd-sharp": Student(_SHARP, against=("kd",)),
    "kd-edge": Student(_losses("kd", temperature=1.0, boundary_weight=1.0), against=("kd-sharp",)),
    # What features add to the teacher's answer, which images without a mask need if they shall teach the last layer.
    "kd-sharp+mbf": Student({**_SHARP, **_losses("mbf")}, against=("kd-sharp", "mbf")),
    "kd-sharp+m2bf": Student({**_SHARP, **_losses("m2bf")}, against=("kd-sharp", "m2bf", "kd-sharp+mbf")),
    "mbf-light": Student(_losses("mbf", weight=LIGHT * WEIGHTS["mbf"]), against=("mbf",)),
    "m2bf-light": Student(_losses("m2bf", weight=LIGHT * WEIGHTS["m2bf"]), against=("m2bf", "mbf-light")),
}
# What decides whether it is the boundary that helps; "whole", "inside" and "outside" drop as large an area as "mbf".
_REGIONS = ("none", "whole", "inside", "outside")
_BY_REGION = {
    **{f"mbf-{region}": Student(_losses("mbf", region=region), against=("mbf",)) for region in _REGIONS},
    **{f"kd-sharp+mbf-{region}": Student({**_SHARP, **_losses("mbf", region=region)}, against=("kd-sharp+mbf",))
       for region in _REGIONS},
}  # fmt: skip
_CONTROLS = {
    **_BY_REGION,
    "mbf-narrow": Student(_losses("mbf", width=WIDTH / 2), against=("mbf",)),
    "mbf-wide": Student(_losses("mbf", width=WIDTH * 2), against=("mbf",)),
    "m2bf-1head": Student(_losses("m2bf", num_heads=1), against=("m2bf",)),
    "m2bf-5heads": Student(_losses("m2bf", num_heads=NUM_HEADS + 2), against=("m2bf",)),
    **{
        f"m2bf-light-{region}": Student(
            _losses("m2bf", weight=LIGHT * WEIGHTS["m2bf"], region=region), against=("m2bf-light",)
        )
        for region in ("none", "whole")
    },
    "m2bf-parallel": Student(_losses("m2bf", form="parallel"), against=("m2bf",)),
}


def _with_unlabelled(rows: Mapping[str, Student]) -> dict[str, Row]:
    """Return each row with the images without a mask, compared with itself without them and its rivals with them."""
    return {
        f"{name}+unlabelled": replace(
            row, unlabelled=True, against=(name, "alone+pseudo", *(f"{rival}+unlabelled" for rival in row.against))
        )
        for name, row in rows.items()
    }


def _with_decisions(*names: str) -> dict[str, Row]:
    """Return rows that take the teacher's decision for a missing mask too; "-none" compares features without a mask."""
    known: dict[str, Student] = {**_DISTILLED, **_BY_REGION}
    rows: dict[str, Row] = {}
    for name in names:
        rivals = ("alone+pseudo", *rows, f"{name}+unlabelled")
        rows[f"{name}+pseudo"] = replace(known[name], unlabelled=True, pseudo_weight=1.0, against=rivals)
    return rows


_UNLABELLED: dict[str, Row] = {
    "alone+pseudo": Student(unlabelled=True, pseudo_weight=1.0),
    **_with_decisions("kd-sharp", "mbf", "m2bf", "mbf-none", "kd-sharp+mbf-none"),
    **_with_unlabelled(_DISTILLED),
    **_with_unlabelled(_BY_REGION),
}

TASKS = ("rotation", "jigsaw", "contrastive", "restoration", "boundary_distance")
TEMPERATURE = 2.0


def _of_several(learns_from: Literal["selection", "seeds"], *against: str, ensemble: Any = "mean_kl") -> Student:
    losses = {"kd": {"weight": WEIGHTS["kd"], "temperature": TEMPERATURE}}
    return Student(losses, unlabelled=True, against=against, learns_from=learns_from, ensemble=ensemble)


_TWO_STAGE: dict[str, Row] = {
    "plain": Pretrained(),
    **{f"{mode}-{task}": Single(task, mode) for task in TASKS for mode in ("joint", "pretrain")},
    "best-single": Single(),
    "uniform": MultiTask(),
    "pcgrad": MultiTask("pcgrad"),
    "ensemble": Ensemble(against=("five-seeds-ensemble",)),
    # What a student's further time is worth without any teacher: it starts as students do, and learns from masks alone.
    "plain-longer": Student(learns_from="plain"),
    "distilled": _of_several("selection", "plain-longer", "ensemble", "five-seeds-distilled", "uniform", "pcgrad"),
    "distilled-average": _of_several("selection", "distilled", ensemble="average"),
    "five-seeds-ensemble": Ensemble("seeds"),
    "five-seeds-distilled": _of_several("seeds", "plain-longer"),
}

# The paper's weight of the distillation beside the reconstruction, 1, needs its 300 epochs; "light" is our choice.
_DISTILLING = {"": 1.0, "-light": 0.05}
_TABLE1: dict[str, Row] = {
    "random": Pretrained(),
    **{name: Pretrained(name) for name in ("supervised", "mae", "dino")},
    **{f"{name}{kind}": Pretrained(name, {"distillation_weight": weight}, against=(name,) if kind else ())
       for name in ("g2ll", "tedmae") for kind, weight in _DISTILLING.items()},
    # Our own, of no paper: it trains the segmenter that is fine-tuned then.
    "figure": Pretrained(
        "figure", against=("g2ll", "g2ll-light"),
        network={"model.weights": "none", "model.segmenter": "transunet"},
    ),
}  # fmt: skip


def _parts_of_tedmae(kind: str) -> dict[str, Row]:
    """Return a row for each part of TEDMAE added to those before it, compared with these."""
    without: dict[str, Settings] = {"teacher": {"ec": False, "df": False}, "ec": {"df": False}, "all": {}}
    rows: dict[str, Row] = {}
    for name, switches in without.items():
        rivals = (*reversed(rows), *((name,) if kind else ()))
        rows[f"{name}{kind}"] = Pretrained("tedmae", {**switches, "distillation_weight": _DISTILLING[kind]}, rivals)
    return rows


TABLES: dict[str, Table] = {
    "g2ll-table1": Table(
        _TABLE1,
        references=("mae", "random"), budgets=PRETRAIN_BUDGETS, fractions=LABEL_FRACTIONS,
    ),
    "g2ll-table2": Table(
        {
            "random": Pretrained(),
            "mask-random": _masked("random"),
            "mask-semantic": _masked("semantic"),
            "mask-semantic-focal": _masked("semantic_focal", "mask-semantic"),
        },
        references=("mask-random", "random"), budgets=PRETRAIN_BUDGETS,
    ),
    "tedmae": Table(
        {
            "random": Pretrained(),
            "mae": Pretrained("tedmae", {"teacher": False}),
            **_parts_of_tedmae(""),
            **_parts_of_tedmae("-light"),
        },
        references=("mae", "random"), budgets=PRETRAIN_BUDGETS,
    ),
    "boundary-distillation": Table(
        {**_BASELINES, **_DISTILLED, **_UNLABELLED, **_CONTROLS},
        references=("alone", "teacher"), budgets=DISTILL_BUDGETS, finetune="unet", fractions=(1.0, 0.1),
        columns=("boundary_iou",), compared=("dice", "boundary_iou", "hd95_256"),
    ),
    "two-stage": Table(
        _TWO_STAGE, references=("best-single", "plain"), budgets=TWO_STAGE_BUDGETS, finetune="two_stage",
        fractions=(0.1,),
    ),
}  # fmt: skip
"""Every table; "random", an encoder without pre-training, stands in those of pre-training for comparison."""
