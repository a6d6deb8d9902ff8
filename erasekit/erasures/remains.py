"""What an erasure leaves of its concepts and moves of the rest, as `erasure.json` holds it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

LIMIT = 0.3  # a larger residual is a warning
UNMEASURED = "residual: not measured (predictions of a large model take hours on a CPU; images tell)"


class Residual(BaseModel):
    """What is left of one concept: 0 is nothing, 1 all of it. None where there are no such prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: float | None = Field(description="of the concept's validation prompts")
    other_words: float | None = Field(description="of validation prompts that ask for it in other words")

    @property
    def most(self) -> float:
        """The larger one."""
        return max((value for value in (self.prompts, self.other_words) if value is not None), default=0.0)


class Remains(BaseModel):
    """An erasure measured by predictions.

    Attributes:
        residual: of each concept, the share of its direction that the erased model's guided predictions still hold:
            <G'(c_w) - G(c_u), d> / |d|^2 with d = G(c_w) - G(c_u), both sums over a trajectory of c_u, clamped to [0, 1],
            and the mean over prompts. G is what sampling follows, c_u the prompt with the concept's words replaced.
        drift: of preserved prompts q: |G'(q) - G(q)| / |G(q) - f(0)|, root mean squares over all points.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    residual: dict[str, Residual]
    drift: float | None

    def warnings(self) -> list[str]:
        """One line for each concept that is not gone."""
        left = {name: found.most for name, found in self.residual.items() if found.most > LIMIT}
        return [
            f"'{name}' is not erased: {share:.0%} of it is left in predictions on validation prompts (limit {LIMIT:.0%})."
            for name, share in left.items()
        ]

    def line(self) -> str:
        """One line for the terminal."""
        each = [f"{name} {_shown(r.prompts)}, in other words {_shown(r.other_words)}" for name, r in self.residual.items()]
        return f"residual: {'; '.join(each)} | drift of what stays: {_shown(self.drift)}"


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"
