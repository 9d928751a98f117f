"""The stages of the chain: each builds its objective, trains it with the one loop, and leaves a model in the run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fewmask.commands.prepare import Prepared
from fewmask.config import Recipe, StageSection
from fewmask.data.loader import Loader
from fewmask.engine.fit import fit
from fewmask.engine.run import Run, is_main, seed_step
from fewmask.engine.stage import Stage
from fewmask.evaluate.validation import Validation
from fewmask.finetune import FINETUNERS
from fewmask.models import Encoder, Segmenter, build_encoder, build_segmenter, save_model
from fewmask.objective import Objective
from fewmask.pretrain import PRETRAINERS
from fewmask.registry import build, choose
from fewmask.types import UserError

NUM_PREVIEWS = 4


def configure_torch(recipe: Recipe) -> None:
    """Set threads and determinism once per process."""
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def pretrain(run: Run, recipe: Recipe, data: Prepared, budget: float | None = None) -> Path:
    """Train the encoder on every image that is no test image nor a copy of one; return the path of its weights."""
    section, stage = recipe.stage("pretrain"), Stage(run, "pretrain", budget)
    path = stage.folder / "model.safetensors"
    if stage.done:
        return path
    if not data.body:
        raise UserError("There is no image to pre-train on: every image is in the validation or the test split.")
    seed_step(recipe.run.seed, 0, stream=1)
    encoder = _encoder(recipe, recipe.model.weights)
    objective = _build(PRETRAINERS, section, "pretrain", encoder=encoder)
    loader = Loader(data.dataset, data.body, section.batch_size, recipe.run.seed, section.min_epoch_steps)
    product, facts = fit(objective, loader, section, stage, recipe.run)
    _finish(stage, path, product, section, objective, loader, facts | {"excluded": data.excluded})
    return path


def finetune(run: Run, recipe: Recipe, data: Prepared, weights: str, budget: float | None = None) -> Path:
    """Train the segmenter on the labelled images, chosen by validation Dice; return the path of its weights.

    `weights` is where the encoder starts from: a path or a word that `model.weights` takes.
    """
    section, stage = recipe.stage("finetune"), Stage(run, "finetune", budget)
    path = stage.folder / "model.safetensors"
    if stage.done:
        return path
    seed_step(recipe.run.seed, 0, stream=2)
    segmenter = build_segmenter(recipe.model.segmenter, _encoder(recipe, weights), **recipe.model.segmenter_settings)
    objective = _build(FINETUNERS, section, "finetune", segmenter=segmenter, size=recipe.model.size)
    loader = Loader(data.dataset, data.labelled, section.batch_size, recipe.run.seed, section.min_epoch_steps)
    validate = Validation(data.dataset, data.validation, recipe.model.size)
    product, facts = fit(objective, loader, section, stage, recipe.run, validate)
    facts |= {"weights": weights, "num_validation": len(data.validation)}
    _finish(stage, path, product, section, objective, loader, facts)
    return path


def _encoder(recipe: Recipe, weights: str) -> Any:
    return build_encoder(recipe.model.encoder, weights, size=recipe.model.size, **recipe.model.encoder_settings)


def _build(table: dict[str, Any], section: StageSection, stage: str, **given: Any) -> Objective:
    settings = dict(section.method)
    factory = choose(table, settings.pop("name"), f"{stage} method")
    return build(factory, settings, f"{stage}.method", **given)


def _finish(
    stage: Stage,
    path: Path,
    product: torch.nn.Module,
    section: StageSection,
    objective: Objective,
    loader: Loader,
    facts: dict[str, Any],
) -> None:
    if not is_main():
        return
    method = section.method["name"]
    assert isinstance(product, Encoder | Segmenter)
    made_by = stage.run.info["versions"].get("fewmask")
    save_model(path, product, {"stage": stage.name, "method": method, "fewmask": made_by})
    _previews(stage, objective, loader)
    stage.finish(method=method, settings=section.model_dump(mode="json"), **facts)
    shutil.rmtree(stage.folder / "checkpoints")  # several times the model's size, and of no more use


def _previews(stage: Stage, objective: Objective, loader: Loader) -> None:
    """Write the pictures the objective wants to show, side by side, one file an image."""
    seed_step(stage.run.seed, 0, stream=3)
    objective.eval()
    device = next(objective.parameters()).device
    with torch.no_grad():
        batch = objective.views()(loader.batch(0).to(device))
        shown = objective.preview(batch)
    folder = stage.folder / "preview"
    folder.mkdir(exist_ok=True)
    for name, pictures in shown.items():
        for number, picture in enumerate(pictures[:NUM_PREVIEWS]):
            array = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            Image.fromarray(array).save(folder / f"{name}_{number:02d}.png")
