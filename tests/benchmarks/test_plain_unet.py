"""The network of the plain script that fewmask is measured beside begins as fewmask's own, else it is no comparison."""

from __future__ import annotations

import pytest
import torch

from benchmarks.plain_unet import SIZE, Plain
from fewmask.models import build_encoder, build_segmenter, save_model


@pytest.mark.parametrize("training", [True, False])
def test_the_plain_network_computes_what_the_one_it_begins_with_does(training, tmp_path):
    torch.manual_seed(0)
    theirs = build_segmenter("unet", build_encoder("efficientnet_lite0", "packaged", size=SIZE))
    save_model(tmp_path / "model.safetensors", theirs, {})
    plain = Plain(str(tmp_path / "model.safetensors")).train(training)
    image = torch.randn(2, 3, SIZE, SIZE)
    assert torch.equal(plain(image).logits, theirs.train(training)(image).logits)
    encoder = Plain("packaged").train(training)
    features = encoder.network.encoder(encoder.scale(image))
    assert all(
        torch.equal(*pair) for pair in zip(features[1:], theirs.encoder(image)[-len(features[1:]) :], strict=True)
    )
