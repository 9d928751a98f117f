"""What a user would do without fewmask, beside fewmask: same network, same size, same images, same minutes.

The plain side is a script as one finds it in tutorials: segmentation-models-pytorch's U-Net on EfficientNet-Lite0 with
ImageNet weights, 128x128, images decoded once into memory, flips, AdamW, cross-entropy + Dice, the last weights kept.
Both sides are scored by the same function on the same test images at native size.

    python -m benchmarks.plain_unet DATA --manifest manifest_isic2017.csv --minutes 10 --out benchmarks/results

Run it on an otherwise idle machine. The two trainings follow one another; `--first` says which side begins.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch.nn import functional as F

from fewmask.data.manifest import load_cases
from fewmask.data.preprocess import normalise, predict_probability, resize_image, resize_mask
from fewmask.data.reading import read_image, read_mask
from fewmask.data.splits import label_subset
from fewmask.evaluate.score import score_cases, summarise
from fewmask.evaluate.statistics import compare
from fewmask.models import build_encoder, build_segmenter
from fewmask.models.weights import load_decoder
from fewmask.types import SegOutput

SIZE, BATCH = 128, 16


class Plain(torch.nn.Module):
    """segmentation-models-pytorch's U-Net on EfficientNet-Lite0, begun with given weights.

    These expect colours scaled as they were trained, and norms with the epsilon they were trained with.
    """

    def __init__(self, weights: str = "packaged") -> None:
        super().__init__()
        self.network = smp.Unet("tu-efficientnet_lite0", encoder_weights=None, classes=1)
        start: Any = build_segmenter("unet", build_encoder("efficientnet_lite0", weights, size=SIZE))
        self.scale = start.encoder.input_affine
        body, encoder = start.encoder.body, self.network.encoder
        encoder.load_state_dict(body.state_dict())
        for ours, theirs in zip(body.modules(), encoder.modules(), strict=True):
            if isinstance(theirs, torch.nn.BatchNorm2d):
                theirs.eps = ours.eps
        if load_decoder(start, weights):
            self.network.decoder.load_state_dict(start.decoder.state_dict())
            self.network.segmentation_head.load_state_dict(start.segmentation_head.state_dict())

    def forward(self, image: torch.Tensor) -> SegOutput:
        """Return the logits (b, 1, s, s) of normalised images, in the shape the scoring function expects."""
        return SegOutput(self.network(self.scale(image)), [])


def plain(
    train: list,
    minutes: float,
    seed: int,
    fraction: float,
    weights: str = "packaged",
    steps: float = math.inf,
    lr: float = 1e-3,
    after_step: Callable[[int, torch.nn.Module], None] = lambda step, network: None,
) -> tuple[torch.nn.Module, dict]:
    """Train the plain way, for so many minutes or steps, whichever end first; return the network and its figures.

    `after_step` may look at the network after each step, counted from 1, and leaves it in training.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    train = label_subset(train, fraction, seed)  # the images that fewmask chooses
    images = torch.stack([torch.from_numpy(resize_image(read_image(c.image), SIZE)) for c in train])
    masks = torch.stack([torch.from_numpy(resize_mask(read_mask(c.mask).mask, SIZE)) for c in train if c.mask])
    network = Plain(weights)
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr)
    began, seen = time.perf_counter(), 0
    while time.perf_counter() - began < minutes * 60 and seen < steps * BATCH:
        chosen = torch.from_numpy(rng.integers(0, len(train), BATCH))
        x = normalise(images[chosen].permute(0, 3, 1, 2))
        y = (masks[chosen] >= 128).float()[:, None]
        for axis in (2, 3):
            if rng.random() < 0.5:
                x, y = x.flip(axis), y.flip(axis)
        logits = network(x).logits
        p = logits.sigmoid()
        dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
        loss = F.binary_cross_entropy_with_logits(logits, y) + dice
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen += BATCH
        looking = time.perf_counter()
        after_step(seen // BATCH, network)
        began += time.perf_counter() - looking  # which is no training
    seconds = time.perf_counter() - began
    return network.eval(), {"images_per_s": seen / seconds, "epochs": seen / len(train), "seconds": seconds}


def ours(args: argparse.Namespace, run: Path) -> dict:
    """Run `fewmask finetune` for the same minutes; return its figures."""
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "fewmask", "finetune", "unet", f"data.root={args.data}", f"run.out={run}"]
    command += [f"run.time={round(args.minutes * 60)}s", f"run.seed={args.seed}", f"model.size={SIZE}"]
    command += [f"data.label_fraction={args.fraction}"] + ([f"data.manifest={args.manifest}"] if args.manifest else [])
    subprocess.run([*command, *args.setting], check=True)
    facts = json.loads((run / "finetune" / "stage.json").read_text())
    lines = [json.loads(line) for line in (run / "finetune" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    return {
        "images_per_s": facts["steps"] * facts["batch_size"] / facts["seconds"],
        "images_per_s_in_steps": float(np.median([s["images_per_s"] for s in steps])),
        "data_wait": float(np.mean([s["data_wait"] for s in steps])),
        "epochs": facts["epochs"],
        "seconds": facts["seconds"],
        "validation_dice": facts["best_score"],
    }


def main() -> None:
    """Run both sides and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--manifest")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", choices=("plain", "ours"), default="plain")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument(
        "--setting", action="append", default=[], help="a fewmask setting, key=value; name another --out"
    )
    args = parser.parse_args()
    from fewmask.deploy.torch_predictor import TorchPredictor

    cases = load_cases(args.data, Path(args.manifest) if args.manifest else None)
    split = {name: [c for c in cases if c.split == name and c.mask] for name in ("train", "test")}
    run = args.runs / f"plain-unet-{args.minutes:g}min-{args.fraction:g}-{args.seed}"
    sides: dict[str, dict] = {}
    rows = {}
    for side in ("plain", "ours") if args.first == "plain" else ("ours", "plain"):
        if side == "plain":
            network, sides[side] = plain(split["train"], args.minutes, args.seed, args.fraction)
            rows[side] = score_cases(partial(predict_probability, network, size=SIZE), split["test"])
        else:
            sides[side] = ours(args, run)
            rows[side] = score_cases(TorchPredictor(run), split["test"])
        sides[side]["test"] = summarise(rows[side])
        print(side, json.dumps({k: v for k, v in sides[side].items() if k != "test"}), sides[side]["test"]["dice"])
    result = {
        "command": " ".join(["python -m benchmarks.plain_unet", *sys.argv[1:]]),
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "minutes": args.minutes,
        "fraction": args.fraction,
        "num_train": len(label_subset(split["train"], args.fraction, args.seed)),
        "num_test": len(split["test"]),
        "sides": sides,
        "difference": compare(rows["ours"], rows["plain"]),
        "speed_ratio": sides["ours"]["images_per_s"] / sides["plain"]["images_per_s"],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"plain_unet_{args.minutes:g}min_{args.fraction:g}_{args.seed}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path, "speed", round(result["speed_ratio"], 2), result["difference"])


if __name__ == "__main__":
    main()
