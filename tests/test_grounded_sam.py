"""The masks of MACE that other models make: the real classes at tiny configs, from folders as a user's would be."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
)

from erasekit.backbones.attention import token_positions
from erasekit.errors import UsageError
from erasekit.methods.context import RunContext
from erasekit.testing import tiny
from erasekit_mace import masks, segmenter
from erasekit_mace.method import Mace, MaceConfig
from tests.third_party.tiny_world import Words

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "a", "cat", "kitten"]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=64)
    swin = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "image_size": 64}
    bert = {
        "model_type": "bert",
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = GroundingDinoConfig(
        backbone_config=swin | {"window_size": 2, "out_indices": [2, 3, 4]},
        text_config=bert,
        num_queries=6,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        d_model=64,
        max_text_len=16,
    )
    torch.manual_seed(0)
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 64})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def outliner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam")
    vision = {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "mlp_dim": 16,
        "global_attn_indexes": [0],
        "num_pos_feats": 8,
    }
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    mask = {"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    torch.manual_seed(1)
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=mask)
    SamModel(config).save_pretrained(folder)
    images = SamImageProcessor(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 32},
        mask_pad_size={"height": 32, "width": 32},
    )
    SamProcessor(images).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def drawn(tiny_folder):
    """A run, two images and what a component of the slot is called with."""
    backbone, prompts = tiny.load(tiny_folder), ["a cat", "a photo of a cat"]
    ctx = RunContext(backbone, (Words().concept("cat"),), Words(), component=lambda slot, name: segmenter.grounded_sam)
    positions = token_positions(backbone, prompts, ["cat"])
    return ctx, ctx.concepts[0], backbone.latents([0, 1]), backbone.encode(prompts), positions


def test_what_is_found_is_outlined_in_the_size_of_the_images(drawn, detector, outliner, monkeypatch):
    monkeypatch.setattr(segmenter, "BOX", 0.0)  # random weights are sure of nothing
    ctx, _, x0, *_ = drawn
    height, width = ctx.backbone.decode(x0).shape[2:]
    found = segmenter.grounded_sam(*drawn, MaceConfig(detector=detector, segmenter=outliner))
    assert found.shape == (2, 1, height, width)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(found, segmenter.grounded_sam(*drawn, MaceConfig(detector=detector, segmenter=outliner)))


def test_a_image_in_which_nothing_is_found_counts_whole_and_that_is_said(drawn, detector, outliner, monkeypatch, caplog):
    monkeypatch.setattr(segmenter, "BOX", 1.0)
    with caplog.at_level(logging.WARNING, "erasekit"):
        found = segmenter.grounded_sam(*drawn, MaceConfig(detector=detector, segmenter=outliner))
    assert found.min() == 1
    assert "finds no 'cat' in 2 of 2 images" in caplog.text


def test_every_phrase_is_asked_for_as_the_detector_reads_it():
    concept = Words().concept("cat").model_copy(update={"phrases": ("a Cat", "a kitten")})
    assert segmenter.question(concept) == "a cat. a kitten."


def test_a_style_has_the_whole_image_and_needs_no_model(drawn):
    ctx, concept, *rest = drawn
    found = segmenter.grounded_sam(ctx, concept.model_copy(update={"kind": "style"}), *rest, MaceConfig(detector="nowhere"))
    assert torch.equal(found, masks.whole(ctx, concept, *rest, None))


def test_a_model_that_is_not_there_is_one_line(drawn, detector, tmp_path):
    for setting, given in (("detector", {}), ("segmenter", {"detector": detector})):
        config = MaceConfig(**given | {setting: str(tmp_path)})
        with pytest.raises(UsageError, match=rf"Set '-s method\.{setting}=FOLDER'") as error:
            segmenter.grounded_sam(*drawn, config)
        assert "\n" not in str(error.value)


def test_mace_trains_inside_of_them(drawn, detector, outliner):
    settings = {"steps": 2, "batch": 2, "images": 2, "warmup": 0, "masks": "grounded-sam"}
    erasure = Mace(MaceConfig(**settings, detector=detector, segmenter=outliner)).erase(drawn[0])
    assert "fusion" in erasure.deltas["cat"]
