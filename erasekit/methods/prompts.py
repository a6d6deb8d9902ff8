"""The prompts that methods work with: what asks for a concept, what it becomes, and what must stay."""

from __future__ import annotations

from collections.abc import Sequence

from erasekit.concepts import EMPTY_PROMPT, Concept
from erasekit.errors import UsageError
from erasekit.evaluation.tasks import PROMPT_SETS, SPLITS, Prompt
from erasekit.methods.context import RunContext

SETS = tuple(which for which in PROMPT_SETS if which != "pairs")  # methods that train on pairs encode theirs themselves


def concept_prompts(concept: Concept, asked: Sequence[Prompt]) -> list[str]:
    """Prompts that ask for one concept: its phrases in its templates, then those of the task's that do."""
    return list(dict.fromkeys([*concept.prompts(), *(p.text for p in asked if p.concept == concept.name)]))


def concept_pairs(concept: Concept, asked: Sequence[Prompt]) -> list[tuple[str, str]]:
    """`concept_prompts`, each with what takes its place (see `neutral_of`)."""
    said = {p.text: neutral_of(p, [concept]) for p in asked if p.concept == concept.name}
    return [(text, said.get(text) or concept.neutralise(text)) for text in concept_prompts(concept, asked)]


def neutral_of(prompt: Prompt, concepts: Sequence[Concept]) -> str:
    """The prompt without the concepts: as its task says, or with their phrases replaced by their neutral words.

    A prompt that holds no phrase of its concept becomes the concept's neutral words alone.
    """
    own = [c for c in concepts if c.name in prompt.concept.split("+")]
    if any(c.neutral == EMPTY_PROMPT for c in own):
        return ""
    if prompt.neutral:
        return prompt.neutral
    said = [concept for concept in concepts if concept.find(prompt.text) and concept.neutral != EMPTY_PROMPT]
    if own and not said:
        return own[0].neutral
    text = prompt.text
    for concept in said:
        text = concept.replaced(text)
    return text


def phrased_prompts(ctx: RunContext, concept: Concept) -> list[str]:
    """Training prompts of one concept that hold one of its phrases as whole words.

    Raises:
        UsageError: there is none.
    """
    prompts = [prompt for prompt in concept_prompts(concept, ctx.prompts("erase")) if concept.find(prompt)]
    if not prompts:
        raise UsageError(f"No prompt of '{concept.name}' holds its phrases ({', '.join(concept.phrases)}) as whole words.")
    return prompts


def preserve_prompts(ctx: RunContext) -> list[str]:
    """The empty prompt, what the concepts ask to keep (in their templates), and the task's preserved prompts."""
    erased = {phrase for concept in ctx.concepts for phrase in concept.phrases}
    kept = [t.format(p) for c in ctx.concepts for p in c.preserve if p not in erased for t in c.templates]
    return list(dict.fromkeys(["", *kept, *(p.text for p in ctx.prompts("preserve"))]))


def guided_texts(ctx: RunContext, guides: Sequence[str]) -> list[str]:
    """The training prompts of the concepts with each guide in the concept's place."""
    guided = [(concept, concept.model_copy(update={"neutral": guide})) for concept in ctx.concepts for guide in guides]
    return [g.neutralise(p) for concept, g in guided for p in concept_prompts(concept, ctx.prompts("erase"))]


def training_texts(ctx: RunContext) -> list[str]:
    """The prompts of the concepts and of the task's training and validation splits, and the neutral forms of all of them."""
    asked = [p for split in SPLITS[:-1] for which in SETS for p in ctx.prompts(which, split)]
    found = [*preserve_prompts(ctx), *(p.text for p in asked)]
    found += [neutral_of(p, ctx.concepts) for p in asked if p.concept]
    for concept in ctx.concepts:
        found += [text for pair in concept_pairs(concept, asked) for text in pair]
        found += [concept.neutralise(text) for text in concept_prompts(concept, asked)]
        found += [*concept.phrases, *map(concept.neutralise, concept.phrases)]
    return list(dict.fromkeys(found))
