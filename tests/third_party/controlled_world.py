"""The tiny world's task with a concept beside it that no model has learned, for the controls of attacks."""

import torch

from erasekit import hookimpl
from erasekit.testing.world import Words


class Never(Words):
    """A word that stands for noise."""

    name = "never"
    concepts = ("zebra",)

    def images(self, prompts):
        """Noise of each prompt's seed."""
        noise = [torch.Generator().manual_seed(p.seed) for p in prompts]
        return torch.stack([torch.randint(256, (3, 16, 16), generator=g, dtype=torch.uint8) for g in noise])


class Controlled(Words):
    """The two words, held against it."""

    name = "controlled"
    control = "never"


@hookimpl
def register_tasks(register):
    register("mini/controlled", Controlled)
    register("mini/never", Never)
