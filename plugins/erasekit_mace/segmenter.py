"""The masks of MACE's paper: Grounding DINO finds the concept in an image by its phrases, SAM outlines what was found."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import AutoProcessor, GroundingDinoForObjectDetection, SamModel

from erasekit.backbones.protocol import Conditioning
from erasekit.concepts import Concept
from erasekit.errors import UsageError
from erasekit.methods.context import RunContext
from erasekit.quiet import quiet
from erasekit_mace.masks import whole

BOX, TEXT = 0.3, 0.25  # least confidence in a box, and in the words that it stands for

log = logging.getLogger("erasekit")


@torch.no_grad()
def grounded_sam(
    ctx: RunContext, concept: Concept, x0: torch.Tensor, cond: Conditioning, positions: torch.Tensor, config: Any
) -> torch.Tensor:
    """Masks (n, 1, height, width) of what is found by the concept's phrases; everywhere where nothing is, and for a style.

    The two models, `config.detector` and `config.segmenter`, are loaded one after the other and freed again.

    Raises:
        UsageError: one of them cannot be loaded.
    """
    if concept.kind == "style":
        return whole(ctx, concept, x0, cond, positions, config)
    decoded = torch.cat([ctx.backbone.decode(x) for x in x0.split(1)]).float().clamp(-1, 1)
    images = list(decoded.add(1).mul(127.5).round().byte().cpu())
    boxes = _boxes(images, concept, config.detector, ctx.backbone.device)
    masks = _outlines(images, boxes, config.segmenter, ctx.backbone.device)
    missed = sum(not len(found) for found in boxes)
    if missed:
        log.warning("Grounding DINO finds no '%s' in %d of %d images: all of each counts.", concept.name, missed, len(boxes))
    return torch.stack(masks).float().to(x0.device)


def question(concept: Concept) -> str:
    """What Grounding DINO is asked for: every phrase in lower case, each with a dot at its end."""
    return " ".join(f"{phrase.lower()}." for phrase in concept.phrases)


def _boxes(images: list[torch.Tensor], concept: Concept, source: str, device: torch.device) -> list[torch.Tensor]:
    """Corners (n, 4) in pixels of what is found in each image (3, h, w)."""
    processor, model = _load(GroundingDinoForObjectDetection, source, "detector", device)
    boxes, text = [], question(concept)
    for image in images:
        asked = processor(images=image, text=text, return_tensors="pt").to(device)
        size = [tuple(image.shape[1:])]
        found = processor.post_process_grounded_object_detection(
            model(**asked), asked.input_ids, threshold=BOX, text_threshold=TEXT, target_sizes=size
        )
        boxes.append(found[0]["boxes"].cpu())
    return boxes


def _outlines(images: list[torch.Tensor], boxes: list[torch.Tensor], source: str, device: torch.device) -> list[torch.Tensor]:
    """Of each image the union (1, h, w) of what its boxes hold, bool; all of it where there is no box."""
    processor, model = _load(SamModel, source, "segmenter", device)
    masks = []
    for image, corners in zip(images, boxes, strict=True):
        if len(corners):
            asked = processor(images=image, input_boxes=[corners.tolist()], return_tensors="pt").to(device)
            sizes = asked.pop("original_sizes"), asked.pop("reshaped_input_sizes")
            found = model(**asked, multimask_output=False).pred_masks.cpu()
            masks.append(processor.post_process_masks(found, *(size.cpu() for size in sizes))[0].any(0))
        else:
            masks.append(torch.ones(1, *image.shape[1:], dtype=torch.bool))
    return masks


def _load(model_class: Any, source: str, setting: str, device: torch.device) -> tuple[Any, Any]:
    """A model of transformers and its processor, from the hub or a folder."""
    try:
        with quiet():
            return AutoProcessor.from_pretrained(source), model_class.from_pretrained(source).eval().to(device)
    except (OSError, ValueError, ImportError) as error:
        problem = str(error).splitlines()[0]
        raise UsageError(f"No {model_class.__name__} in '{source}': {problem} Set '-s method.{setting}=FOLDER'.") from error
