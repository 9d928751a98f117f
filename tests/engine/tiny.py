"""A tiny objective and stream that go through the real loop, for tests of the engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewmask.config import RunSection, StageSection
from fewmask.engine.fit import fit
from fewmask.engine.run import Run
from fewmask.engine.stage import Stage
from fewmask.objective import Objective
from fewmask.types import Batch

NUM_IMAGES, BATCH = 10, 4


class TinyStream:
    """Noise images; batch `step` depends on the step alone. With `poison`, that step holds a NaN."""

    steps_per_epoch = 3
    num_images = NUM_IMAGES
    rounds = 1.0

    def __init__(self, poison: int | None = None) -> None:
        self.poison, self.asked = poison, []

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        self.asked.append(step)
        image = torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        if step == self.poison:
            image[0, 0, 0, 0] = float("nan")
        share = BATCH // world
        names = [f"image{step}_{i}" for i in range(BATCH)]
        return Batch(image[rank * share : (rank + 1) * share], names[rank * share : (rank + 1) * share])


class TinyObjective(Objective):
    """A convolution with batch norm and dropout that predicts its input's mean, views that add noise, and an EMA."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Conv2d(4, 1, 3))
        self.register_buffer("average", torch.zeros(4, 3, 3, 3))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        loss = (self.net(batch.image).mean((1, 2, 3)) - batch.image.mean((1, 2, 3)) - 0.5).square().mean()
        return {"loss": loss, "twice": 2 * loss.detach()}

    def product(self) -> nn.Module:
        return self.net

    def views(self):
        def noisy(batch: Batch) -> Batch:
            return Batch(batch.image + 0.1 * torch.randn_like(batch.image), batch.names)

        return noisy

    def after_step(self, progress: float) -> None:
        self.average.lerp_(self.net[0].weight.detach(), 0.1)


def train(
    folder, *, epochs=4, stream=None, validate=None, budget=None, lr=1e-2, every=0.0, seed=0, objective=TinyObjective,
    watch=None, probe_every=0, **run_settings,
):  # fmt: skip
    """Run the real loop in a folder; return (product, facts, objective)."""
    settings = StageSection(
        method={"name": "tiny"},
        epochs=epochs,
        batch_size=BATCH,
        lr=lr,
        min_epoch_steps=1,
        checkpoint_seconds=every,
        probe_every=probe_every,
    )
    section = RunSection(seed=seed, device="cpu", **run_settings)
    torch.manual_seed(seed)
    made = objective()
    with Run(
        folder, "test", {"run": section.model_dump(mode="json"), "pretrain": settings.model_dump(mode="json")}
    ) as run:
        stage = Stage(run, "pretrain", budget)
        product, facts = fit(made, stream or TinyStream(), settings, stage, section, validate, watch)
    return product, facts, made
