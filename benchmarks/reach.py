"""Why a learned word gets past an edit of the layers that read text: what the edit is as a map of the text space.

    python benchmarks/reach.py --concept cat --out results/reach.json

UCE's edit of sd15-mini is W' = W P for all edited layers, P one (width, width) matrix. Written down are its singular values,
the length of what it would take to undo it for the concept's prompt, where a learned word stands between the concept and its
neutral words, and what such a word brings back, also if the layers read nothing but the directions that captions and preserved
prompts use. Validation prompts and seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import record
from erasekit.attacks.tokens import on_cpu
from erasekit.backbones.protocol import Conditioning, concatenate
from erasekit.erasures.deltas import Deltas, Dense, merged, summed, to_dense
from erasekit.evaluation.evaluators import Batch
from erasekit.evaluation.tasks import Prompt
from erasekit.methods.context import RunContext
from erasekit.methods.images import draw, images_of
from erasekit.methods.prompts import neutral_of
from erasekit.methods.sites import site_embeddings, site_weights
from erasekit.registration.plugins import default
from erasekit.runs.compute import context
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit_mini.evaluators import Classifier
from erasekit_stereo.words import learned

EXAMPLES, PROMPTS, KEPT = 16, 10, 36


def text_map(ctx: RunContext, deltas: Deltas) -> tuple[torch.Tensor, dict[str, Any]]:
    """P = I + pinv(W) delta over all layers that read tokens, and what undoes it for the concept's prompt."""
    base = site_weights(ctx.backbone)
    names = [site.name for site in ctx.backbone.text_sites() if site.reads == "tokens"]
    w_ND = torch.cat([base[name].double() for name in names])
    delta_ND = torch.cat([to_dense(deltas[name]).double() if name in deltas else 0 * base[name].double() for name in names])
    p_DD = torch.eye(w_ND.shape[1], dtype=torch.float64) + torch.linalg.pinv(w_ND) @ delta_ND
    values = torch.linalg.svdvals(p_DD)
    cond = ctx.backbone.encode([f"a photo of {ctx.concepts[0].phrases[0]}"])
    pad = cond.tokens[0, int(cond.lengths[0])].double()  # the first pad, which has read the whole prompt
    undone = torch.linalg.solve(p_DD, pad)
    return p_DD, {
        "width": len(p_DD),
        "left over, relative": float((w_ND @ p_DD - w_ND - delta_ND).norm() / delta_ND.norm()),
        "singular values": [round(float(v), 4) for v in (values[0], values[-1])],
        "length of the first pad": round(float(pad.norm()), 2),
        "length of what P sends to it": round(float(undone.norm()), 2),
    }


def scale(ctx: RunContext, p_DD: torch.Tensor, word: Conditioning, asked: list[Prompt]) -> dict[str, float]:
    """Where prompts stand on the axis that best tells the concept from its neutral words, mean over all pads; P before some.

    The axis is Fisher's: the difference of the two means, whitened by the captions' second moment, of unit distance.
    """
    texts = [p.text for p in asked], [neutral_of(p, ctx.concepts) for p in asked]
    mine, goal = (ctx.backbone.encode(side) for side in texts)
    first = int(torch.cat([mine.lengths, goal.lengths, word.lengths]).max())
    rows = {"concept": mine, "neutral words": goal, "learned word": word}
    pads = {name: cond.tokens[:, first:].double().flatten(0, 1) for name, cond in rows.items()}
    moment_DD = site_embeddings(ctx)["tokens"].captions.mean_DD
    away_D = (pads["concept"] - pads["neutral words"]).mean(0)
    axis_D = torch.linalg.solve(moment_DD + 1e-5 * torch.eye(len(moment_DD), dtype=torch.float64), away_D)
    axis_D /= axis_D @ away_D
    pads |= {f"P {name}": pads[name] @ p_DD.T for name in ("concept", "learned word")}
    return {name: round(float((rows_ND @ axis_D).mean()), 2) for name, rows_ND in pads.items()}


def fenced(ctx: RunContext, deltas: Deltas, share: float) -> tuple[Deltas, int]:
    """The edit, reading only the directions that hold all but `share` of the energy of captions and preserved prompts."""
    embeddings, base, found = site_embeddings(ctx)["tokens"], site_weights(ctx.backbone), dict(deltas)
    values_D, vectors_DD = torch.linalg.eigh(embeddings.captions.mean_DD + embeddings.preserve.mean_DD)
    left_D = values_D.cumsum(0) / values_D.sum()  # in rising order
    q_DR = vectors_DD[:, left_D > share]
    for name, weight in base.items():
        whole = weight.double() + (to_dense(deltas[name]).double() if name in deltas else 0)
        found[name] = Dense((whole @ q_DR @ q_DR.T - weight.double()).float())
    return found, q_DR.shape[1]


@torch.no_grad()
def seen(ctx: RunContext, cond: Conditioning, prompts: list[Prompt]) -> list[int]:
    """How many images show what their prompts ask for, and of how many."""
    x0, judge = draw(ctx, cond, [p.seed for p in prompts]), Classifier()
    images = ((ctx.backbone.decode(x0) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    judge.update(Batch(images, prompts, "erased"))
    return [sum(bool(row["shown"]) for row in judge.compute().rows), len(prompts)]


def brought_back(ctx: RunContext, deltas: Deltas, p_DD: torch.Tensor, steps: int) -> dict[str, Any]:
    """What the concept's prompts show, and preserved ones; and what a word learned on the erased model brings back."""
    concept, backbone = ctx.concepts[0], ctx.backbone
    asked = ctx.task.prompts("erase", ctx.concepts, "validation", PROMPTS)
    kept = ctx.task.prompts("preserve", ctx.concepts, "validation", KEPT)
    examples, _ = images_of(ctx, [p.text for p in ctx.prompts("erase")], EXAMPLES, ctx.generator("reach/images"))
    with merged(backbone.denoiser, deltas):
        found: dict[str, Any] = {"concept": seen(ctx, backbone.encode([p.text for p in asked]), asked)}
        found["kept"] = seen(ctx, backbone.encode([p.text for p in kept]), kept)
        word = learned(ctx, concept, examples, name="reach/word", steps=steps, batch=4, lr=2e-2)
        with torch.no_grad():
            templates = [p.text.replace(concept.find(p.text), "{}") for p in asked]
            rows = [word.read(backbone, t, backbone.encode([p.text])) for t, p in zip(templates, asked, strict=True)]
            cond = concatenate([on_cpu(row) for row in rows])
            found["learned word"] = seen(ctx, cond, asked)
            found["axis"] = scale(ctx, p_DD, cond, asked)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", default="cat")
    parser.add_argument("--word-steps", type=int, default=150)
    parser.add_argument("--fence", type=float, default=1e-3, help="energy that may be left out")
    parser.add_argument("--robustify", help="print what a word brings back after this stage instead, and write nothing")
    parser.add_argument("--out", type=Path, default=Path("results/reach.json"))
    args = parser.parse_args()
    registries = default()
    flags = {"method": "uce", "backbone": "sd15-mini", "task": "objects", "concepts": (args.concept,)}
    stages = [f"method.robustify={args.robustify}"] if args.robustify else []
    plan = resolve(build(flags, overrides=stages), registries)
    ctx = context(plan, plan.backbone.load(plan.backbone_config), registries)
    deltas = plan.method(plan.method_config.model_copy(update={"robustify": ()})).erase(ctx).total()
    p_DD, facts = text_map(ctx, deltas)
    if args.robustify:
        hardened = ctx.component("robustify", args.robustify)(ctx, {args.concept: deltas}, plan.method_config)
        print(brought_back(ctx, summed(list(hardened.values())), p_DD, args.word_steps))
        return
    found: dict[str, Any] = {"map": facts, "uce": brought_back(ctx, deltas, p_DD, args.word_steps)}
    behind, rank = fenced(ctx, deltas, args.fence)
    p_DD, _ = text_map(ctx, behind)
    found["fenced"] = {"directions": rank, **brought_back(ctx, behind, p_DD, args.word_steps)}
    command = f"python benchmarks/reach.py --concept {args.concept} --word-steps {args.word_steps} --fence {args.fence}"
    record.write({"command": command, "machine": record.machine(), **found}, args.out)
    print(found)


if __name__ == "__main__":
    main()
