"""An attack in one file, for `--plugin single_file_attack.py`: the concept's word backwards."""

from __future__ import annotations

from erasekit import Attack, hookimpl


class Backwards(Attack):
    """Anybody could type it: it knows nothing of the model."""

    name = "backwards"
    knows = "nothing"

    def texts(self, concept, prompts):
        """Named beforehand, while the text encoders are there."""
        return [prompt.text.replace(concept.name, concept.name[::-1]) for prompt in prompts]

    def rounds(self, target, prompt):
        """One image, with the prompt's own noise."""
        yield target.draw(self.texts(target.concept, [prompt]), [prompt.seed])


@hookimpl
def register_attacks(register):
    register("backwards", Backwards, summary="the concept's word backwards")
