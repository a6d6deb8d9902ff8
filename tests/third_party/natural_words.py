"""The words of the tiny world as a task of natural images, for the adapters of the hub's models."""

from erasekit import hookimpl
from erasekit.testing.world import Words


class NaturalWords(Words):
    """Two words and two others."""

    domain = "natural"


@hookimpl
def register_tasks(register):
    """Register the task."""
    register("natural/words", NaturalWords, summary="two words")
