"""Norms of two processes are those of one: outputs, gradients and running statistics."""

from __future__ import annotations

import os

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import distributed, multiprocessing, nn

from fewmask.models import build_encoder
from fewmask.models.norms import HostNorm, synchronise_norms


def network() -> nn.Sequential:
    """Return norms of every kind: with an activation inside, of vectors, without weights, with a plain average."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3), BatchNormAct2d(6, act_layer=nn.ReLU6), nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5, momentum=None),
    ]  # fmt: skip
    made = nn.Sequential(*layers)
    made(torch.zeros(2, 3, 8, 8))
    for module in made:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    return made


def pictures() -> torch.Tensor:
    """Return six pictures; the halves have other means, so that norms of their own would differ."""
    image = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return image + torch.arange(6).view(6, 1, 1, 1)


def step(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Return the output of a training step, backwards included."""
    out = model(image)
    out.square().mul(torch.arange(5)).mean().backward()
    return out.detach()


def work(rank: int, folder: str) -> None:
    """Do two steps as one of two processes, averaging gradients as DDP does."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = network()
    synchronise_norms(model, torch.device("cpu"))
    outs = [step(model, part.chunk(2)[rank]) for part in (pictures(), 2 * pictures())]
    gradients = [p.grad for p in model.parameters()]
    for gradient in gradients:
        distributed.all_reduce(gradient)
        gradient /= 2
    torch.save({"outs": outs, "gradients": gradients, "state": model.state_dict()}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_normalise_as_one(tmp_path):
    model = network()
    outs = [step(model, image) for image in (pictures(), 2 * pictures())]
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for i, whole in enumerate(outs):
        torch.testing.assert_close(torch.cat([first["outs"][i], second["outs"][i]]), whole)
    for side in (first, second):
        torch.testing.assert_close(side["gradients"], [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(side["state"], dict(model.state_dict()))


@pytest.mark.parametrize(("device", "kind"), [("cuda", nn.SyncBatchNorm), ("cpu", HostNorm)])
def test_norms_are_synchronised_with_their_values_names_and_fused_activations(device, kind):
    torch.manual_seed(0)
    encoder = build_encoder("efficientnet_lite0", size=32)
    model = nn.ModuleDict({"one": encoder, "again": nn.ModuleList([encoder])}).eval()
    plain = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    image = torch.randn(2, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = [feature.detach() for feature in encoder(image)]
    synchronise_norms(model, torch.device(device))
    assert plain == sum(isinstance(module, kind) for module in model.modules()) > 20
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(map(torch.equal, expected, encoder(image)))
