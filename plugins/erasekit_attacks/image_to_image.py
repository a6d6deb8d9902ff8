"""Image to image: an image of the concept is noised, and the erased model draws it again (SDEdit, Meng et al. 2022)."""

from __future__ import annotations

from collections.abc import Generator

from pydantic import Field

from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import Target
from erasekit.evaluation.tasks import Prompt


class ImageToImageConfig(AttackConfig):
    """Settings."""

    queries: int = Field(1, ge=1, description="images of a prompt at most, of other noise each")
    tau: float = Field(0.3, ge=0, le=1, description="progress at which the erased model begins; the lower, the less is given")


class ImageToImage(Attack):
    """The image is one that the unedited model has drawn, or that anybody has."""

    name = "image-to-image"
    kind = "probe"
    Config = ImageToImageConfig
    config: ImageToImageConfig

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """One image after the other."""
        backbone, example = target.backbone, target.example(prompt).to(target.backbone.device)
        schedule = backbone.schedule(target.protocol.steps, target.protocol.size)
        first, cond = schedule.first_late(self.config.tau), target.encode([prompt.text])
        for i in range(self.config.queries if first < len(schedule) else 0):
            seed = prompt.seed + 9_000_000 * i
            noise = backbone.latents([seed], target.protocol.size)
            x = backbone.add_noise(example.to(noise), noise, schedule.tau[[first]])
            yield Draw(cond, [seed], [prompt.text], x=x, first=first)
