"""How long light segmenters take for one image on one CPU thread, in ONNX Runtime.

    taskset -c 0 python -m benchmarks.latency --rounds 40 --out benchmarks/results

Ours beside public ones that a `pip install` gives: segmentation-models-pytorch's decoders on mobile encoders, its
SegFormer, and torchvision's LR-ASPP. Weights are random, on which the time does not depend. All go through fewmask's
exporter, whose changes for speed (`fewmask.deploy.tuning`) thus help every network that they fit, and what is timed is
the network alone, from the normalised tensor to logits of the image's size. Rounds are interleaved: in each, every
network has a few calls, so that what else the machine does falls on all of them; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from fewmask.data.preprocess import MEAN, STD
from fewmask.deploy.export import trace_network
from fewmask.deploy.graph import wrap_network
from fewmask.deploy.predictor import open_session
from fewmask.deploy.tuning import absorb_affine
from fewmask.models import build_encoder, build_segmenter
from fewmask.models.complexity import complexity
from fewmask.types import SegOutput

REFERENCE = "fewmask tiny_unet"
DECODERS = ("Unet", "FPN", "DeepLabV3Plus", "Linknet")
MOBILE = ("mobilenetv3_small_100", "mobilenetv2_100")


class Public(nn.Module):
    """A network of another library behind fewmask's interface."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> SegOutput:
        """Return the logits (b, 1, s, s) of an image (b, 3, s, s)."""
        output = self.network(image)
        return SegOutput(output["out"] if isinstance(output, dict) else output, [])


def ours_of(segmenter: str, encoder: str, size: int) -> nn.Module:
    """Return one of fewmask's networks."""
    return build_segmenter(segmenter, build_encoder(encoder, size=size))


def smp_of(decoder: str, encoder: str) -> nn.Module:
    """Return one of segmentation-models-pytorch's networks."""
    return Public(getattr(smp, decoder)(f"tu-{encoder}", encoder_weights=None, classes=1))


def candidates(size: int) -> dict[str, Callable[[], nn.Module]]:
    """Return what is compared, by the name in the table: calls that build a network for images of `size` pixels."""
    ours = {
        REFERENCE: ("tiny_unet", "tiny"),
        "fewmask mobile_unet, mobilenetv4_conv_small": ("mobile_unet", "mobilenetv4_conv_small"),
        "fewmask mobile_unet, efficientnet_lite0": ("mobile_unet", "efficientnet_lite0"),
    }
    found: dict[str, Callable[[], nn.Module]] = {
        name: partial(ours_of, segmenter, encoder, size) for name, (segmenter, encoder) in ours.items()
    }
    for decoder in DECODERS:
        for encoder in MOBILE:
            found[f"smp {decoder}, {encoder}"] = partial(smp_of, decoder, encoder)
    found["smp Segformer, mit_b0"] = lambda: Public(smp.Segformer("mit_b0", encoder_weights=None, classes=1))
    found["torchvision LR-ASPP, mobilenet_v3_large"] = lambda: Public(
        lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=1)
    )
    return found


def prepare(build: Callable[[], nn.Module], size: int, threads: int) -> tuple[Any, dict[str, float]]:
    """Return a session of the exported network, and what it weighs and costs."""
    torch.manual_seed(0)
    network = build().eval()
    cost = complexity(network, size)
    absorb_affine(network, MEAN, STD)
    model = trace_network(network, size)
    megabytes = wrap_network(model, size, MEAN, STD).ByteSize() / 1e6
    facts = {"num_parameters": cost["num_parameters"], "gmacs": cost["gmacs"], "megabytes": megabytes}
    return open_session(model.SerializeToString(), threads), facts


def measure(sessions: dict[str, Any], size: int, rounds: int, calls: int) -> dict[str, np.ndarray]:
    """Return the milliseconds (rounds, calls) of each session, interleaved; two calls a turn are not counted."""
    tensor = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
    times = {name: np.empty((rounds, calls)) for name in sessions}
    for turn in range(rounds):
        for name, session in sessions.items():
            for call in range(-2, calls):
                start = time.perf_counter()
                session.run(None, {"normalised": tensor})
                times[name][turn, max(call, 0)] = 1e3 * (time.perf_counter() - start)
    return times


def summarise(times: dict[str, np.ndarray], facts: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Return a row a network, fastest first: its facts, p50, p95, and its time over the reference's."""
    turns = {name: np.median(values, axis=1) for name, values in times.items()}
    rows = [
        {
            "network": name,
            **facts[name],
            "p50_ms": float(np.median(values)),
            "p95_ms": float(np.percentile(values, 95)),
            "ratio": float(np.median(turns[name] / turns[REFERENCE])),
        }
        for name, values in times.items()
    ]
    return sorted(rows, key=lambda row: row["ratio"])


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table."""
    lines = [
        "| network | M parameters | GMac | MB | p50 ms | p95 ms | time / tiny_unet |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['network']} | {row['num_parameters'] / 1e6:.3f} | {row['gmacs']:.3f} | {row['megabytes']:.2f} "
        f"| {row['p50_ms']:.2f} | {row['p95_ms']:.2f} | {row['ratio']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures hold for: machine, versions, and how they were taken."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "size": args.size,
        "threads": args.threads,
        "rounds": args.rounds,
        "calls": args.calls,
        "load_average": os.getloadavg()[0],
        "versions": {
            name: version(name)
            for name in ("onnxruntime", "torch", "timm", "segmentation-models-pytorch", "torchvision")
        },
    }


def main() -> None:
    """Measure, print the table and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    sessions, facts = {}, {}
    for name, build in candidates(args.size).items():
        sessions[name], facts[name] = prepare(build, args.size, args.threads)
        print(f"ready: {name}", flush=True)
    result: dict[str, Any] = {
        "conditions": conditions(args),
        "rows": summarise(measure(sessions, args.size, args.rounds, args.calls), facts),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"latency_{args.size}_{args.threads}thread.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result["rows"]))
    print(path)


if __name__ == "__main__":
    main()
