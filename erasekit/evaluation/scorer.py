"""How well natural images fit texts, for methods that look at images: CLIP, differentiable in the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from erasekit.errors import EnvironmentProblem
from erasekit.quiet import quiet

# Of the images that OpenAI's CLIP was trained on, per channel.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipScorer:
    """Unit vectors of texts and of images, whose product is their cosine."""

    def __init__(self, source: str = "openai/clip-vit-base-patch32") -> None:
        """Load both towers of CLIP from the hub or a folder.

        Raises:
            EnvironmentProblem: they cannot be loaded.
        """
        try:
            with quiet():
                self._text = CLIPTextModelWithProjection.from_pretrained(source).requires_grad_(False).eval()
                self._image = CLIPVisionModelWithProjection.from_pretrained(source).requires_grad_(False).eval()
                self._tokenizer = CLIPTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            problem = str(error).splitlines()[0]
            raise EnvironmentProblem(f"CLIP cannot be loaded from '{source}': {problem} Go online once.") from error

    def image(self, images: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, h, w) in [-1, 1] as (n, width), on their device."""
        tower = self._image.to(images.device)
        side = tower.config.image_size
        resized = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
        return F.normalize(tower(pixel_values=(resized / 2 + 0.5 - mean) / std).image_embeds, dim=-1)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts as (n, width), on the CPU."""
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        return F.normalize(self._text(**tokens).text_embeds, dim=-1)
