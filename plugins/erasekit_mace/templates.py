"""Thirty sentences for the closed forms. The paper's number; its own sentences are under another licence, these are ours."""

from __future__ import annotations

from erasekit.concepts import Concept

THINGS = (
    "{}",
    "{} seen from the front",
    "{} from far away",
    "{} in the morning light",
    "{} on a rainy day",
    "{} at night under street lamps",
    "{} in black and white",
    "a photo of {}",
    "a close-up of {}",
    "a blurred photo of {}",
    "a postcard that shows {}",
    "a poster with {}",
    "a drawing of {}",
    "a pencil sketch of {}",
    "a watercolour of {}",
    "an oil painting of {}",
    "a cartoon of {}",
    "a sculpture of {}",
    "a stamp with a picture of {}",
    "a page of a magazine about {}",
    "a still from a film about {}",
    "a news photo in which {} appears",
    "a child's picture of {}",
    "a 3D model of {}",
    "a mosaic showing {}",
    "a book cover with {}",
    "two views of {}",
    "a framed picture of {} on a wall",
    "an old photograph of {}",
    "a holiday snap of {}",
)
STYLES = (
    "a painting by {}",
    "a drawing by {}",
    "a sketch by {}",
    "a portrait by {}",
    "a landscape by {}",
    "a still life by {}",
    "a street scene by {}",
    "a night scene by {}",
    "an animal painted by {}",
    "a large canvas by {}",
    "a small study by {}",
    "an early work by {}",
    "a late work by {}",
    "an unfinished work by {}",
    "a well-known picture by {}",
    "a print by {}",
    "a mural by {}",
    "a poster by {}",
    "an illustration by {}",
    "a self-portrait by {}",
    "a museum wall with works by {}",
    "a catalogue of works by {}",
    "a house in the style of {}",
    "a garden in the style of {}",
    "a ship in the style of {}",
    "a face in the style of {}",
    "a city in the style of {}",
    "flowers in the style of {}",
    "a copy after {}",
    "colours and brushwork like those of {}",
)


def wordings(concept: Concept) -> list[str]:
    """Every phrase of the concept in the thirty sentences for its kind."""
    return concept.prompts(STYLES if concept.kind == "style" else THINGS)
