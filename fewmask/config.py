"""Recipes: TOML files whose sections are the models below; three layers, defaults <- recipe <- `key=value`."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date, time
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator

from fewmask.types import UserError

STAGES = ("pretrain", "finetune", "distill")
FOLDERS = ("run.out", "data.root", "data.cache")


_UNITS = {"h": 3600, "m": 60, "s": 1}


def parse_time(text: str) -> float | None:
    """Return the seconds in "15m", "1h30m" or "90s", or None for "none"; ValueError otherwise."""
    if text == "none":
        return None
    if not re.fullmatch(r"(\d+(\.\d+)?[hms])+", text):
        raise ValueError("a time is written like 15m, 1h30m, 90s or none")
    seconds = sum(float(n) * _UNITS[u] for n, _, u in re.findall(r"(\d+(\.\d+)?)([hms])", text))
    if seconds <= 0:
        raise ValueError("a time must be above zero")
    return seconds


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, and so are values that cannot be read as what a key takes."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError("a number is wanted, not true or false")
        return value


class RunSection(Section):
    """Where and for how long the run works.

    `clock` "cpu" counts a stage's time in processor seconds, of all threads together: for comparisons on a machine that
    has other work, where the wall clock would favour whoever ran alone. With `compile` the first step of a process,
    which is traced for minutes, is not counted in `time`.
    """

    out: Path | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    time: str = "none"
    clock: Literal["wall", "cpu"] = "wall"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    compile: bool = False
    tensorboard: bool = False

    @field_validator("time", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        parse_time(str(value))
        return value


class DataSection(Section):
    """Which images are used, how they are split where the manifest does not say, and the licence the model tells.

    With `num_folds`, the manifest says no split, and the patients of fold number `fold` are the test split. The masks
    of `label_fraction` are drawn by `label_seed`, by `run.seed` without it: so several seeds may learn from the same.
    """

    root: Path | None = None
    manifest: str | None = None
    unlabelled: list[Path] = []
    label_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    val_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    split_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    num_folds: Annotated[int, Field(ge=0)] = 0
    fold: Annotated[int, Field(ge=0)] = 0
    label_seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    cache: Path | None = None
    licence: str | None = None


class StudentSection(Section):
    """The network that the distill stage trains; it sees images of `model.size`.

    `weights` may also be "teacher": where student and teacher have the same encoder, it starts from the teacher's, and
    where they are the same network altogether, from the whole of it; of several teachers, from the best by validation.
    A run or a model file fills the network likewise: the encoder, and where the rest is the same, that too.
    """

    encoder: str = "efficientnet_lite0"
    weights: str = "teacher"
    segmenter: str = "mobile_unet"
    encoder_settings: dict[str, Any] = {}
    segmenter_settings: dict[str, Any] = {}


class ModelSection(StudentSection):
    """The network: an encoder, where its weights come from, the segmenter around it, and the working size."""

    weights: str = "packaged"
    segmenter: str = "unet"
    size: Annotated[int, Field(ge=16, le=2048)] = 128


Beta = Annotated[float, Field(ge=0, lt=1)]


class StageSection(Section):
    """One training: its method and how it is optimised.

    In a chain with `run.time`, pre-training gets `share` of the time and fine-tuning the rest. `instead` is the method
    that a chain pre-trains by where `figure` is not for the images ("none": `figure` all the same), at the learning
    rate `instead_lr` (0: `lr`). Towards the end of the training `weight_decay` becomes `weight_decay_end`, if that is
    given. `probe_every` is the number of epochs between two looks at how well the features tell classes apart
    (pre-training only; 0: never).
    """

    method: dict[str, Any]
    instead: dict[str, Any] | Literal["none"] = "none"
    instead_lr: Annotated[float, Field(ge=0)] = 0.0
    epochs: Annotated[int, Field(ge=0)] = 50
    batch_size: Annotated[int, Field(ge=1)] = 16
    lr: Annotated[float, Field(gt=0)] = 1e-3
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    weight_decay_end: Annotated[float, Field(ge=0)] | None = None
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    optimiser: Literal["adamw", "adam", "sgd"] = "adamw"
    clip: Annotated[float, Field(ge=0)] = 3.0
    encoder_lr_scale: Annotated[float, Field(gt=0)] = 1.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_epoch_steps: Annotated[int, Field(ge=1)] = 20
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    probe_every: Annotated[int, Field(ge=0)] = 0
    _rate: str = PrivateAttr("lr")

    @field_validator("method", "instead", mode="before")
    @classmethod
    def _in_a_word(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) and value != "none" else value

    @field_validator("method", "instead")
    @classmethod
    def _named(cls, value: dict[str, Any] | str, info: ValidationInfo) -> dict[str, Any] | str:
        if isinstance(value, dict) and not isinstance(value.get("name"), str):
            raise ValueError("it needs a name: set {where}.name")
        return value

    @property
    def rate(self) -> str:
        """The key of the learning rate that is used: that of `instead` where its method has taken over."""
        return self._rate

    def by_instead(self) -> StageSection:
        """Return the section with its other method in the place of its method, at that one's learning rate."""
        other = self.model_copy(update={"method": self.instead, "lr": self.instead_lr or self.lr})
        other._rate = "instead_lr" if self.instead_lr else "lr"
        return other


class DistillSection(StageSection):
    """The training of a student: from which teachers, and on which images.

    `teachers` are run folders or model files; none, in a chain, means the segmenter the chain has just fine-tuned.
    With `unlabelled`, every image that may be learnt from takes part, and `labelled_share` of each batch has masks.
    With `predict_once` the teachers look at each image once, before the training, and their predictions, and the
    features that a loss compares, move with the augmentation: a step costs little more than the student's own. "auto"
    does so where the losses read predictions alone (kd, or none); a map of features takes room, at 128x128 49 kB an
    image of a mobile_unet and 131 kB of a unet, at stride 4.
    """

    teachers: list[Path] = []
    unlabelled: bool = True
    labelled_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    predict_once: bool | Literal["auto"] = "auto"


class SelectSection(Section):
    """Which auxiliary tasks are tried, in which modes, and with which weights in the joint one.

    Every candidate is trained as [pretrain] and [finetune] say, `task_settings.TASK` added to the task's method; with
    `run.time`, that is the time of one candidate, of which pre-training takes `pretrain.share`.
    """

    tasks: list[str] = ["rotation", "jigsaw", "contrastive", "restoration", "boundary_distance"]
    modes: list[Literal["joint", "pretrain"]] = ["joint", "pretrain"]
    weights: list[Annotated[float, Field(gt=0)]] = [0.1, 0.3, 1.0]
    task_settings: dict[str, dict[str, Any]] = {}


class Recipe(Section):
    """Everything a run was told; saved in the run and in every checkpoint."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    student: StudentSection = StudentSection()
    pretrain: StageSection | None = None
    finetune: StageSection | None = None
    distill: DistillSection | None = None
    select: SelectSection | None = None

    def stage(self, name: str) -> StageSection:
        """Return a stage's section, or raise a UserError that names it."""
        section = getattr(self, name)
        if section is None:
            raise UserError(
                f"This recipe has no [{name}] section: write {name}.method.name=..., or choose one that has: "
                f"{', '.join(recipes_with(name))}."
            )
        return section

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as JSON-able values."""
        return self.model_dump(mode="json")


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    folder = Path(str(resources.files("fewmask") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def recipes_with(stage: str) -> list[str]:
    """Return the names of the shipped recipes that have a section for a stage, those of it alone first."""
    found = {name: _read(name) for name in shipped_recipes()}
    having = [name for name, sections in found.items() if stage in sections]
    return sorted(having, key=lambda name: (len(found[name].keys() & {*STAGES, "select"}), name))


def load_recipe(
    name: str | Path, overrides: Iterable[str] = (), stage: str | None = None, given: Mapping[str, Any] | None = None
) -> Recipe:
    """Return the recipe of a file or a shipped name with `key=value` overrides.

    With `stage`, `method.KEY=...` is short for `STAGE.method.KEY=...`. Another method's name leaves out what the recipe
    sets of its own method. `given` holds dotted keys set by other command
    line options. Raises a UserError that names the key and lists the valid ones.
    """
    values = _read(name)
    wanted = [*(given or {}).items(), *map(_parse_override, overrides)]
    for key, value in sorted(wanted, key=lambda setting: not setting[0].endswith(("method", "method.name"))):
        full = f"{stage}.{key}" if stage and key.split(".")[0] == "method" else key
        _set(values, full, value)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error)) from None
    for other in STAGES:
        if other != "pretrain" and (section := getattr(recipe, other)) is not None and section.probe_every:
            raise UserError(f"Setting '{other}.probe_every' is of no use: the probe looks at pre-training only.")
    return recipe


def _read(name: str | Path) -> dict[str, Any]:
    shipped = shipped_recipes()
    path = shipped.get(str(name), Path(name))
    if not path.is_file():
        near = difflib.get_close_matches(str(name), shipped, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise UserError(f"There is no recipe '{name}'.{hint} Give a .toml file or one of: {', '.join(shipped)}.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"Recipe {path} is not valid TOML: {error}.") from None


def _parse_override(text: str) -> tuple[str, Any]:
    key, sign, raw = text.partition("=")
    if not sign or not key:
        raise UserError(f"'{text}' is not a setting; write it as key=value, for example finetune.epochs=20.")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return key, raw
    # A folder may be called 2026-11-22, or 2026; no setting is a date.
    is_name = isinstance(value, date | time) or (key in FOLDERS and not isinstance(value, str))
    return key, raw if is_name else value


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if parent in ("method", "instead") and isinstance(values.get(parent), str):
            values[parent] = {"name": values[parent]}  # a method given by its name alone, and then settings of it
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"Setting '{key}' goes below '{parent}', which is a value and not a section.")
    if last == "name" and parents[-1:] == ["method"] and values.get("name", value) != value:
        values.clear()  # what another method takes
    values[last] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if "[" not in str(part))  # of several types, the one tried
    if first["type"] == "extra_forbidden":
        section, _, key = where.rpartition(".")
        valid = _keys_of(section)
        near = difflib.get_close_matches(key, valid, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return f"Unknown setting '{where}'.{hint} Valid ones{' in ' + section if section else ''}: {', '.join(valid)}."
    if first["type"] == "missing":
        return f"Setting '{where}' is missing; add {where}.name=... to choose the method."
    if first["type"] == "list_type":
        return f"Setting '{where}' takes a list: write '{where}=[\"{first['input']}\"]', with the quotation marks."
    message = first["msg"].removeprefix("Value error, ").lower().replace("{where}", where)
    return f"Setting '{where}' cannot be {first['input']!r}: {message}."


def _keys_of(section: str) -> list[str]:
    models: dict[str, type[Section]] = {
        "run": RunSection, "data": DataSection, "model": ModelSection, "student": StudentSection,
        "distill": DistillSection, "select": SelectSection, "": Recipe,
    }  # fmt: skip
    return sorted(models.get(section, StageSection).model_fields)
