"""The first losses of every shipped recipe, written down: a change of a number must be meant.

Update after a change that is meant: `FEWMASK_UPDATE_GOLDEN=1 pytest tests/golden`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fewmask.commands.stages import objective_for
from fewmask.config import STAGES as STAGE_NAMES
from fewmask.config import load_recipe, shipped_recipes
from fewmask.data.cache import build_cache
from fewmask.data.loader import Loader
from fewmask.data.manifest import load_cases
from fewmask.data.superpixels import superpixel_maps
from fewmask.data.synthetic import make_dataset
from fewmask.engine.optim import build_optimiser, set_schedule
from fewmask.engine.run import seed_step
from fewmask.models import build_encoder, build_segmenter

LOSSES = Path(__file__).with_name("losses.json")
SIZE, BATCH, STEPS = 64, 4, 3
STAGES = [(name, s) for name in shipped_recipes() for s in STAGE_NAMES if getattr(load_recipe(name), s)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    cases = load_cases(make_dataset(folder / "data", 8, 0, size=(64, 80)))
    return build_cache(cases, SIZE, folder / "cache")


def build_objective(stage, recipe, num_classes):
    """Return a stage's objective; the teacher of a distillation is the recipe's own model, not trained yet."""
    if stage != "distill":
        return objective_for(stage, recipe, recipe.model.weights, num_classes)
    encoder = build_encoder(recipe.model.encoder, recipe.model.weights, size=SIZE)
    teacher = build_segmenter(recipe.model.segmenter, encoder)
    weights = recipe.student.weights.replace("teacher", recipe.model.weights)  # what an untrained teacher's are
    return objective_for(stage, recipe, weights, teachers=[teacher])


def first_losses(name, stage, dataset):
    recipe = load_recipe(name, [f"model.size={SIZE}", f"{stage}.batch_size={BATCH}"])
    section = recipe.stage(stage)
    objective = build_objective(stage, recipe, len(dataset.label_names))
    maps = {key: superpixel_maps(dataset, slic) for key, slic in objective.maps().items()}
    loader = Loader(dataset, range(8), BATCH, 0, section.min_epoch_steps, maps)
    optimiser, views, losses = build_optimiser(objective, section), objective.views(), []
    for step in range(STEPS):
        seed_step(0, step)
        set_schedule(optimiser, 0.1 + step / 100, section)
        loss = objective(views(loader.batch(step)))["loss"]
        optimiser.zero_grad()
        loss.backward()
        objective.before_step(step / 100)
        optimiser.step()
        objective.after_step(step / 100)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "stage"), STAGES, ids=["-".join(s) for s in STAGES])
def test_first_losses(name, stage, dataset):
    torch.set_num_threads(1)
    seed_step(0, 0, stream=1)
    found = first_losses(name, stage, dataset)
    written = json.loads(LOSSES.read_text()) if LOSSES.exists() else {}
    if os.environ.get("FEWMASK_UPDATE_GOLDEN"):
        LOSSES.write_text(json.dumps({**written, f"{name}-{stage}": found}, indent=1, sort_keys=True) + "\n")
        return
    # Another processor adds in another order; after two updates that is still far below one part in a thousand.
    assert found == pytest.approx(written[f"{name}-{stage}"], rel=2e-3)
