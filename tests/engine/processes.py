"""Real methods trained by the real loop, alone or as one of two processes that share each batch (gloo, CPU)."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import torch
from torch import distributed
from torch.nn import functional as F

from fewmask.config import RunSection, StageSection
from fewmask.engine.fit import fit
from fewmask.engine.run import Run
from fewmask.engine.stage import Stage
from fewmask.models import build_encoder, build_segmenter
from fewmask.objective import Objective
from fewmask.pretrain.dino import DINO
from fewmask.pretrain.figure import Figure
from fewmask.pretrain.g2ll import G2LL
from fewmask.pretrain.mae import MAE
from fewmask.pretrain.simmim import SimMIM
from fewmask.pretrain.supervised import Supervised
from fewmask.pretrain.tedmae import TEDMAE
from fewmask.types import Batch, Interrupted, Share

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
    "figure": (Figure, {"size": SIZE}),
}
RATES = {"sgd": 0.5, "slow_sgd": 0.05, "adamw": 1e-3}
# EfficientNets are chaotic on so few pictures: the rounding of float32 alone moves their gradients by a hundredth.
CNN = "resnet18"
CNNS = {"simmim": {}, "supervised": {}, "g2ll": {}, "tedmae": {}, "dino": {"local_size": 32}}  # and their own settings


class Pictures:
    """Smooth pictures with four square superpixels; batch `step` depends on the step alone.

    `stop_rank` is told to stop while it fetches the batch of step `stop`. `before` sees the objective at the first one.
    """

    steps_per_epoch, num_images, rounds = NUM_STEPS, 40, 1.0

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
        label = torch.tensor([0, 1, 0, -1, 1, -1, -1, 0])[part]  # one process knows three, the other two
        share = Share(tuple(range(BATCH))[part], BATCH) if world > 1 else None
        extra = {"superpixels": superpixels[part].contiguous()}
        return Batch(image[part], names[part], label=label, extra=extra, share=share)


def objective_of(name: str, drop_path: float = 0.3, **more: object) -> Objective:
    """Return a small objective of a method, on a ViT, or on a CNN where its name ends in "_cnn"."""
    torch.manual_seed(0)
    name, _, cnn = name.partition("_")
    method, settings = METHODS[name]
    if cnn:
        return method(build_encoder(CNN, size=2 * SIZE), **{**settings, **CNNS[name], **more})
    if name == "figure":
        return method(build_segmenter("transunet", build_encoder("vit_micro_patch8", size=SIZE)), **settings, **more)
    encoder = build_encoder("vit_tiny_patch16", size=SIZE, drop_path=drop_path)
    encoder.body.blocks = encoder.body.blocks[:2]
    return method(encoder, **settings, **more)


def train(
    folder: Path, objective: Objective, stream: Pictures | None = None, optimiser: str = "sgd", epochs: int = 1
) -> dict:
    """Train in a folder; return the facts of the stage."""
    settings = StageSection(
        method={"name": "test"}, epochs=epochs, batch_size=BATCH, lr=RATES[optimiser],
        warmup=0.0, min_epoch_steps=1, checkpoint_seconds=1e9, optimiser=optimiser.removeprefix("slow_"),
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
        if rank == 0:
            shutil.rmtree(folder / job)  # twice the state, and no test reads it
    objective = objective_of("g2ll")
    facts = train(folder / "grown", objective, Pictures(), epochs=3)  # what one process has left
    torch.save({"state": objective.state_dict(), "facts": facts}, folder / f"grown.{rank}.pt")
    objective = objective_of("g2ll")
    try:  # one process alone is told to stop; both have to
        train(folder / "stopped", objective, Pictures(stop=3, stop_rank=1), epochs=3)
    except Interrupted:
        torch.save(objective.state_dict(), folder / f"stopped.{rank}.pt")
    distributed.destroy_process_group()
