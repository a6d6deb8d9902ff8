"""Registers the attacks."""

from __future__ import annotations

from erasekit import hookimpl

ATTACKS = (
    ("misspellings", "misspellings:Misspellings", "letters of the concept's word doubled, dropped, swapped", ""),
    ("translations", "translations:Translations", "the concept's word in eight languages", ""),
    ("repetitions", "repetitions:Repetitions", "the concept's word several times over", ""),
    ("capitals", "capitals:Capitals", "the concept's word in other cases", ""),
    ("emphasis", "emphasis:Emphasis", "words and signs that stress the concept's word", ""),
    ("prefix-noise", "prefix_noise:PrefixNoise", "random letters before the prompt", ""),
    ("ring-a-bell", "ring_a_bell:RingABell", "tokens that the text encoder reads as the concept", "arXiv:2310.10012"),
    (
        "unlearndiff",
        "unlearndiff:UnlearnDiff",
        "tokens before the prompt that make the erased model explain an image",
        "arXiv:2310.11868",
    ),
    (
        "p4d-n",
        "p4d:P4dN",
        "tokens in place of the prompt that are predicted as the unedited model predicts it",
        "arXiv:2309.06135",
    ),
    (
        "p4d-k",
        "p4d:P4dK",
        "tokens between those of the prompt that are predicted as the unedited model predicts it",
        "arXiv:2309.06135",
    ),
    ("concept-inversion", "inversion:Inversion", "a word of its own, trained on the erased model", "arXiv:2308.01508"),
    ("completion-20", "completion:Completion20", "the unedited model begins the image, up to a fifth", "arXiv:2505.17013"),
    ("completion-40", "completion:Completion40", "the unedited model begins the image, up to two fifths", "arXiv:2505.17013"),
    ("completion-60", "completion:Completion60", "the unedited model begins the image, up to three fifths", "arXiv:2505.17013"),
    ("inpainting", "inpainting:Inpainting", "half of an image of the concept is given", "arXiv:2505.17013"),
    ("image-to-image", "image_to_image:ImageToImage", "an image of the concept is noised and drawn again", "arXiv:2108.01073"),
    ("noise", "noise:Noise", "fresh noise after every step of sampling", "arXiv:2505.17013"),
    ("classifier-guidance", "classifier:ClassifierGuidance", "a CLIP pulls every step towards the concept", "arXiv:2505.17013"),
    ("relearn", "relearn:Relearn", "a few steps of a LoRA on ten images", ""),
    ("merging", "merging:Merging", "averaged with the unedited model", ""),
    ("bf16", "rounding:Bf16", "weights in bfloat16", ""),
    ("int8", "rounding:Int8", "weights in eight bits", "arXiv:2208.07339"),
    ("nf4", "rounding:Nf4", "weights in four bits", "arXiv:2305.14314"),
    ("seeds", "seeds:Seeds", "the prompt as it is, with other noise", ""),
)


@hookimpl
def register_attacks(register):  # type: ignore[no-untyped-def]
    """Register every attack."""
    for name, target, summary, paper in ATTACKS:
        register(name, f"erasekit_attacks.{target}", summary=summary, paper=paper)
