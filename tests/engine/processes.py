"""Real methods trained by the real loop, alone or as one of two processes that share each batch (gloo, CPU).

Each image draws its views and its mask from a generator of its own, seeded by its name, so that a batch looks the same
however it is shared out; in a real run the processes draw on their own, and their augmentation differs.
"""

from __future__ import annotations

import hashlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from fewmask.config import RunSection, StageSection
from fewmask.engine.fit import fit
from fewmask.engine.run import Run
from fewmask.engine.stage import Stage
from fewmask.models import build_encoder
from fewmask.objective import Objective
from fewmask.pretrain.dino import DINO
from fewmask.pretrain.g2ll import G2LL
from fewmask.pretrain.mae import MAE
from fewmask.pretrain.masking import Masking
from fewmask.pretrain.simmim import SimMIM
from fewmask.pretrain.supervised import Supervised
from fewmask.pretrain.tedmae import TEDMAE
from fewmask.types import Batch, Interrupted, Views

SIZE, BATCH, NUM_STEPS = 32, 8, 3
SMALL = {"num_prototypes": 12, "projector_hidden": 16, "projector_bottleneck": 8, "momentum": 0.5}
DECODER = {"decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 2}
METHODS = {
    "mae": (MAE, DECODER),
    "simmim": (SimMIM, {"mask_patch": 16, "mask": "semantic", "mask_ratio": 0.5}),
    "supervised": (Supervised, {"num_classes": 2}),
    "g2ll": (G2LL, {**SMALL, **DECODER}),
    "tedmae": (TEDMAE, {**SMALL, **DECODER, "mask": "semantic", "mask_ratio": 0.5}),
    "dino": (DINO, {**SMALL, "num_local": 1, "local_size": 16, "freeze_last": 0.5}),
}


def seed_of(*parts: object) -> int:
    """Return a seed that is a function of these parts alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def one_of(batch: Batch, i: int) -> Batch:
    """Return the batch of its i-th image."""
    extra = {name: value[i : i + 1] for name, value in batch.extra.items()}
    label = None if batch.label is None else batch.label[i : i + 1]
    return replace(batch, image=batch.image[i : i + 1], names=batch.names[i : i + 1], label=label, extra=extra)


class PerImageMask(Masking):
    """A method's own masking, drawn for each image from its name and, of several views, from its turn."""

    def __init__(self, masking: Masking) -> None:
        self.masking, self.num_patches, self.num_masked = masking, masking.num_patches, masking.num_masked

    def __call__(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        masks = []
        for i, name in enumerate(batch.names):
            seed = seed_of("mask", name, batch.names[:i].count(name))
            masks.append(self.masking(one_of(batch, i), torch.Generator().manual_seed(seed)))
        return torch.cat(masks)


def per_image(views: Views) -> Views:
    """Return a method's own views, drawn for each image from its name."""

    def draw(batch: Batch) -> Batch:
        seen = []
        for i, name in enumerate(batch.names):
            torch.manual_seed(seed_of("views", name))
            seen.append(views(one_of(batch, i)))
        extra = {name: torch.cat([one.extra[name] for one in seen]) for name in seen[0].extra}
        return Batch(torch.cat([one.image for one in seen]), batch.names, label=batch.label, extra=extra)

    return draw


class Pictures:
    """Smooth pictures with four square superpixels; batch `step` depends on the step alone.

    `stop_rank` is told to stop while it fetches the batch of step `stop`. `before` sees the objective at the first one.
    """

    steps_per_epoch, num_images = NUM_STEPS, 40

    def __init__(self, stop: int = -1, stop_rank: int = 0) -> None:
        self.stop, self.stop_rank, self.asked = stop, stop_rank, []

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        self.asked.append(step)
        if (step, rank) == (self.stop, self.stop_rank):
            signal.raise_signal(signal.SIGTERM)
        coarse = torch.rand(BATCH, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        image = (F.interpolate(coarse, (40, 40), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
        half = torch.arange(40) // 20
        superpixels = (half[:, None] * 2 + half).to(torch.uint8).expand(BATCH, 1, 40, 40)
        part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        names = [f"step {step}, image {i}" for i in range(BATCH)]
        extra = {"superpixels": superpixels[part].contiguous()}
        return Batch(image[part], names[part], label=(torch.arange(BATCH) % 2)[part], extra=extra)


def objective_of(name: str, shared: bool = True, **more: object) -> Objective:
    """Return a small objective of a method; `shared` makes what it draws a function of the image."""
    torch.manual_seed(0)
    method, settings = METHODS[name]
    encoder = build_encoder("vit_tiny_patch16", size=SIZE)
    encoder.body.blocks = encoder.body.blocks[:2]
    made = method(encoder, **settings, **more)
    if shared:
        views = per_image(made.views())
        made.views = lambda: views
        if hasattr(made, "masking"):
            made.masking = PerImageMask(made.masking)
    return made


def train(
    folder: Path, objective: Objective, stream: Pictures | None = None, optimiser: str = "sgd", epochs: int = 1
) -> dict:
    """Train in a folder; return the facts of the stage."""
    settings = StageSection(
        method={"name": "test"}, epochs=epochs, batch_size=BATCH, lr=0.5 if optimiser == "sgd" else 1e-3,
        warmup=0.0, min_epoch_steps=1, checkpoint_seconds=1e9, optimiser=optimiser,
    )  # fmt: skip
    section = RunSection(device="cpu", precision="fp32")
    config = {"run": section.model_dump(mode="json"), "pretrain": settings.model_dump(mode="json")}
    with Run(folder, "test", config) as run:
        _, facts = fit(objective, stream or Pictures(), settings, Stage(run, "pretrain"), section)
    return facts


def work(rank: int, folder: Path, jobs: list[str]) -> None:
    """Be one of two processes: train each method three steps, and one run until it is stopped."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for job in jobs:
        name, _, optimiser = job.partition("-")
        objective = objective_of(name)
        facts = train(folder / job, objective, optimiser=optimiser)
        torch.save({"state": objective.state_dict(), "facts": facts}, folder / f"{job}.{rank}.pt")
    objective = objective_of("g2ll", shared=False)
    facts = train(folder / "grown", objective, Pictures(), epochs=3)  # what one process has left
    torch.save({"state": objective.state_dict(), "facts": facts}, folder / f"grown.{rank}.pt")
    objective = objective_of("g2ll", shared=False)
    try:  # one process alone is told to stop; both have to
        train(folder / "stopped", objective, Pictures(stop=3, stop_rank=1), epochs=3)
    except Interrupted:
        torch.save(objective.state_dict(), folder / f"stopped.{rank}.pt")
    distributed.destroy_process_group()
