"""The stages of the chain: each builds its objective, trains it with the one loop, and leaves a model in the run."""

from __future__ import annotations

import inspect
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fewmask.commands.defaults import METHODS
from fewmask.commands.features import as_kept, describe_features, know_whole_images, probe_for
from fewmask.commands.prepare import Prepared
from fewmask.config import Recipe, RunSection, StageSection
from fewmask.data.loader import Loader
from fewmask.data.streams import PairedLoader
from fewmask.data.superpixels import Slic, superpixel_maps
from fewmask.disk import flush_folder
from fewmask.engine.device import accelerator_for, resolve_precision
from fewmask.engine.fit import Stream, Validate, Watch, fit
from fewmask.engine.run import Run, is_main, seed_step, wait_for_everyone
from fewmask.engine.stage import Progress, Stage
from fewmask.evaluate.validation import Validation
from fewmask.models import Encoder, Segmenter, build_encoder, build_segmenter, encoder_of, save_model
from fewmask.models.weights import WORDS, load_decoder
from fewmask.objective import Objective
from fewmask.registry import build, choose
from fewmask.types import UserError

NUM_PREVIEWS = 4


def configure_torch(recipe: Recipe) -> None:
    """Set threads and determinism once per process, and let several processes find one another.

    These must know of each other before the first of them waits for what another writes.
    """
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # What is fresh is written before it is read here; filling it first only takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        accelerator_for(recipe.run)


def with_precision(recipe: Recipe) -> Recipe:
    """Return the recipe with `run.precision=auto` settled, so that a resumed run cannot change it silently."""
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"precision": resolve_precision(recipe.run)})})


def pretrain(run: Run, recipe: Recipe, data: Prepared, budget: float | None = None) -> Path:
    """Train on what is neither for validation nor a test image, its copy or its patient; return the weights' path."""
    section, stage = recipe.stage("pretrain"), Stage(run, "pretrain", budget, recipe.run.clock)
    path = stage.folder / "model.safetensors"
    if stage.done:
        return path
    if not data.body:
        raise UserError("There is no image to pre-train on: every image is in the validation or the test split.")
    seed_step(recipe.run.seed, 0, stream=1)
    objective = objective_for("pretrain", recipe, recipe.model.weights, len(data.dataset.label_names))
    body = body_for(objective, data)
    if section.batch_size < objective.min_batch:  # told before the superpixels are made, which takes minutes
        raise UserError(
            f"The method '{section.method['name']}' compares the images of a batch, and pretrain.batch_size is "
            f"{section.batch_size}: set it to {objective.min_batch} or more."
        )
    if len(body) < objective.min_batch:
        raise UserError(
            f"The method '{section.method['name']}' compares images, and there is only one to learn from: add images, "
            "or take a method that looks at each alone, such as 'mae' or 'simmim'."
        )
    maps = {name: _superpixels(data, slic) for name, slic in objective.maps().items()}
    loader = Loader(data.dataset, body, section.batch_size, recipe.run.seed, section.min_epoch_steps, maps)
    probe = probe_for(stage, data, body, section.probe_every, recipe.model.size)
    watch = probe and as_kept(probe, data.dataset, body)
    product, facts = fit_and_show(objective, loader, section, stage, recipe.run, watch=watch)
    if isinstance(product, Encoder):
        know_whole_images(product, data.dataset, body, recipe.model.size)
    if is_main():
        describe_features(stage.folder, encoder_of(product), data.dataset, body, recipe.model.size)
    finish(stage, path, product, section, facts | {"excluded": data.excluded})
    return path


def finetune(run: Run, recipe: Recipe, data: Prepared, weights: str, budget: float | None = None) -> Path:
    """Train the segmenter on the labelled images, chosen by validation Dice; return the path of its weights.

    `weights` is where the network starts from: a path or a word that `model.weights` takes.
    """
    section, stage = recipe.stage("finetune"), Stage(run, "finetune", budget, recipe.run.clock)
    path = stage.folder / "model.safetensors"
    if stage.done:
        return path
    seed_step(recipe.run.seed, 0, stream=2)
    objective = objective_for("finetune", recipe, weights)
    loader = labelled_stream(objective, section, data, recipe.run.seed)
    validate = Validation(data.dataset, data.validation, recipe.model.size, precision=resolve_precision(recipe.run))
    product, facts = fit_and_show(objective, loader, section, stage, recipe.run, validate)
    facts |= {"weights": weights, "num_validation": len(data.validation)}
    finish(stage, path, product, section, facts)
    return path


def body_for(objective: Objective, data: Prepared) -> list[int]:
    """Return the images that a pre-training can use; a UserError where there is none."""
    if objective.needs_masks:
        learnable = set(data.body)  # a labelled copy of a test image takes no part in pre-training
        body = [i for i in data.labelled if i in learnable]
        if not body:
            raise UserError("No image to pre-train on has a mask and is no copy of a test image; add some.")
        return body
    if not objective.needs_labels:
        return data.body
    body = [i for i in data.body if data.dataset.labels[i] >= 0]
    if not body:
        raise UserError("No image to pre-train on has a class label; fill the manifest's column 'label'.")
    if len(set(data.dataset.labels[body].tolist())) < 2:
        raise UserError(
            "The images to pre-train on are all of one class by the manifest's column 'label', so that there is "
            "nothing to tell apart: label those of others too, or choose a method that needs no labels."
        )
    if len(body) < len(data.body):
        Progress("pretrain").close(f"{len(data.body) - len(body)} images without a class label are left out")
    return body


def labelled_stream(objective: Objective, section: StageSection, data: Prepared, seed: int) -> Stream:
    """Return batches of labelled images, each with a batch of its own for other tasks where the objective asks."""
    loader = Loader(data.dataset, data.labelled, section.batch_size, seed, section.min_epoch_steps)
    if objective.other_images == "none":
        return loader
    others = data.labelled if objective.other_images == "labelled" else data.body
    # Another seed: a second batch drawn like the first would show the same images.
    return PairedLoader(loader, Loader(data.dataset, others, section.batch_size, seed + 2**31, section.min_epoch_steps))


def _superpixels(data: Prepared, slic: Slic) -> np.ndarray:
    line = Progress("superpixels")
    maps = superpixel_maps(data.dataset, slic, on_progress=line.count)
    line.close(f"{len(maps)} images", only_if_shown=True)
    return maps


def objective_for(stage: str, recipe: Recipe, weights: str, num_classes: int = 0, **offered: Any) -> Objective:
    """Return a stage's objective, its network built as the recipe says and filled from `weights`.

    Where these are a segmenter's of one kind with the network, its decoder is filled too. `offered` is what else a
    method may ask for in its constructor, such as `teachers`.
    """
    settings = dict(recipe.stage(stage).method)
    table: dict[str, Any] = METHODS[stage]
    factory = choose(table, settings.pop("name"), f"{stage} method")
    asked = inspect.signature(factory).parameters
    model, size = recipe.student if stage == "distill" else recipe.model, recipe.model.size
    where = "student" if stage == "distill" else "model"
    _refuse(f"{where}.encoder_settings", model.encoder_settings, ("name", "weights", "size"))
    _refuse(f"{where}.segmenter_settings", model.segmenter_settings, ("name", "encoder"))
    with _settings_of(where):
        encoder = build_encoder(model.encoder, weights, size=size, **model.encoder_settings)
        offered |= {"encoder": encoder, "num_classes": num_classes, "size": size}
        if "segmenter" in asked:
            offered["segmenter"] = build_segmenter(model.segmenter, encoder, **model.segmenter_settings)
            whole = load_decoder(offered["segmenter"], weights)
            if weights not in WORDS:
                parts = "encoder and decoder" if whole else "the encoder alone"
                Progress(stage).close(f"begins with {parts} of {weights}")
    # Of what is offered, a method is given what its constructor asks for.
    given = {name: value for name, value in offered.items() if name in asked}
    return build(factory, settings, f"{stage}.method", **given)


@contextmanager
def _settings_of(where: str) -> Iterator[None]:
    """Name a network's settings by the section they stand in: those who read them know one only, "model"."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"\bmodel\.(?=\w+_settings)", f"{where}.", str(error))) from None


def _refuse(section: str, settings: dict[str, Any], reserved: tuple[str, ...]) -> None:
    for key in reserved:
        if key in settings:
            raise UserError(
                f"Setting '{section}.{key}' is given elsewhere: use {section.split('.')[0]}.encoder, .weights, "
                ".segmenter, and model.size."
            )


def fit_and_show(
    objective: Objective,
    loader: Stream,
    section: StageSection,
    stage: Stage,
    run: RunSection,
    validate: Validate | None = None,
    watch: Watch | None = None,
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Train by the one loop, leave pictures of what was trained as it is then, and return what `fit` does."""
    product, facts = fit(objective, loader, section, stage, run, validate, watch)
    if is_main():
        _previews(stage, objective, loader)
    return product, facts


def finish(
    stage: Stage,
    path: Path,
    product: torch.nn.Module,
    section: StageSection,
    facts: dict[str, Any],
) -> None:
    """Write a stage's model and facts, which mark it as done, and drop its checkpoints."""
    if is_main():
        method = section.method["name"]
        assert isinstance(product, Encoder | Segmenter)
        made_by = stage.run.info["versions"].get("fewmask")
        save_model(path, product, {"stage": stage.name, "method": method, "fewmask": made_by})
        kind = "segmenter" if isinstance(product, Segmenter) else "encoder"
        stage.finish(method=method, product=kind, settings=section.model_dump(mode="json"), **facts)
        flush_folder(stage.folder)
        shutil.rmtree(stage.folder / "checkpoints")  # several times the model's size, and of no more use
    wait_for_everyone()


def _previews(stage: Stage, objective: Objective, loader: Stream) -> None:
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
