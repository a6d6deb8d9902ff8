"""What attacks by gradients on tokens share: some steps, an image, and on; for several prompts in one batch."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import Target
from erasekit.attacks.tokens import Slots, encoders, read_hard, read_soft, spelled
from erasekit.attacks.words import points
from erasekit.backbones.protocol import Conditioning, concatenate
from erasekit.evaluation.tasks import Prompt


class SearchConfig(AttackConfig):
    """Settings of a search by gradients."""

    steps: int = Field(40, ge=1, description="steps before each image")
    restarts: int = Field(1, ge=1, description="beginnings anew, among which the images are shared out")
    points: int = Field(1, ge=1, description="points of progress in a step")
    lr: float = Field(0.01, gt=0, description="rate of the optimiser")
    weight_decay: float = Field(0.1, ge=0, description="its weight decay")
    encoders: tuple[str, ...] = Field((), description="text encoders whose tokens are looked for; none named: all")


@dataclass
class Seeker:
    """The search for one prompt.

    Attributes:
        prompt: gives the noise of the images.
        slots: where the tokens stand, for each text encoder.
        like: the plain prompt, encoded.
        latent: (1, ...), an image of the concept.
        generator: draws the beginning and the points.
        trained: what is trained, for each text encoder.
    """

    prompt: Prompt
    slots: Mapping[str, Slots]
    like: Conditioning
    latent: torch.Tensor
    generator: torch.Generator
    trained: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """The points of a step: rows of all prompts, `points` for each.

    Attributes:
        latent: x0 (b, ...).
        noise: (b, ...).
        tau: progress (b,).
        plain: the plain prompts.
        read: the prompts with what is trained in their slots.
    """

    latent: torch.Tensor
    noise: torch.Tensor
    tau: torch.Tensor
    plain: Conditioning
    read: Conditioning


class Search(Attack):
    """Tokens that a loss of the denoiser's predictions leads to. What is trained for a prompt does not depend on the others."""

    Config = SearchConfig
    config: SearchConfig

    def slots(self, target: Target, name: str, text: str) -> Slots:
        """Where the tokens of the attack stand in a prompt."""
        raise NotImplementedError

    def begun(self, slots: Slots, generator: torch.Generator) -> torch.Tensor:
        """What is trained, as it is at the beginning."""
        raise NotImplementedError

    def vectors(self, slots: Slots, trained: torch.Tensor) -> torch.Tensor:
        """What the text encoder reads for it, (k, width); differentiable."""
        raise NotImplementedError

    def tokens(self, slots: Slots, trained: torch.Tensor) -> torch.Tensor:
        """The tokens that it stands for, (k,)."""
        raise NotImplementedError

    def loss(self, target: Target, at: Batch) -> torch.Tensor:
        """What falls as the concept comes back: the mean over all rows."""
        raise NotImplementedError

    def held(self, slots: Slots, trained: torch.Tensor) -> torch.Tensor:
        """What is trained, put back to where it may be after a step."""
        return trained

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """An image after every `steps` steps."""
        for draws in self.side_by_side(target, [prompt]):
            yield from (draw for draw in draws if draw is not None)

    def side_by_side(self, target: Target, prompts: Sequence[Prompt]) -> Generator[list[Draw | None], Sequence[bool] | None]:
        """The steps of all prompts that are still wanted in one batch, then an image of each."""
        config, seekers = self.config, [self._seeker(target, prompt) for prompt in prompts]
        wanted: Sequence[bool] = [True] * len(seekers)
        for _ in range(config.restarts):
            for seeker in seekers:
                for name, own in seeker.slots.items():
                    seeker.trained[name] = self.begun(own, seeker.generator).requires_grad_()
            trained = [tensor for seeker in seekers for tensor in seeker.trained.values()]
            optimizer = torch.optim.AdamW(trained, config.lr, weight_decay=config.weight_decay)
            for _ in range(-(-config.queries // config.restarts)):
                going = [seeker for seeker, more in zip(seekers, wanted, strict=True) if more]
                for _ in range(config.steps):
                    self._step(target, going, optimizer)
                wanted = (
                    yield [self._drawn(target, s) if more else None for s, more in zip(seekers, wanted, strict=True)]
                ) or wanted

    def _seeker(self, target: Target, prompt: Prompt) -> Seeker:
        latent = target.example(prompt).to(target.backbone.device, target.backbone.dtype)
        slots = {name: self.slots(target, name, prompt.text) for name in encoders(target, self.config.encoders)}
        return Seeker(prompt, slots, target.encode([prompt.text]), latent, target.generator_of(prompt), {})

    def _step(self, target: Target, going: Sequence[Seeker], optimizer: torch.optim.Optimizer) -> None:
        n = self.config.points
        at = [points(target.backbone, target.protocol, s.latent, n, s.generator) for s in going]
        vectors = [{name: self.vectors(own, s.trained[name]) for name, own in s.slots.items()} for s in going]
        plain = concatenate([s.like for s in going])
        each = torch.arange(len(going)).repeat_interleave(n)
        read = read_soft(target, [s.slots for s in going], vectors, plain)[each]
        noise, tau = (torch.cat(parts) for parts in zip(*at, strict=True))
        batch = Batch(torch.cat([s.latent for s in going])[each], noise, tau, plain[each], read)
        optimizer.zero_grad()
        (self.loss(target, batch) * len(going)).backward()  # the sum of the prompts' own losses
        optimizer.step()
        with torch.no_grad():
            for seeker in going:
                for name, own in seeker.slots.items():
                    seeker.trained[name].copy_(self.held(own, seeker.trained[name]))

    def _drawn(self, target: Target, seeker: Seeker) -> Draw:
        found = {name: self.tokens(own, seeker.trained[name]) for name, own in seeker.slots.items()}
        cond = read_hard(target, seeker.slots, found, seeker.like)
        return Draw(cond, [seeker.prompt.seed], [spelled(target, seeker.slots, found)])
