"""When a concept is decided: how late the teacher may turn to the neutral prompt and still end without the concept.

    python benchmarks/window.py --backbone sd15-mini --concepts cat ship --out results/window-sd15-mini.json

Images follow the concept's prompt for a share of the sampler's steps and its neutral prompt from there on, as TRACE's
semi-target trajectories do. Where they still show the concept, a window that begins there trains towards an image that holds
it. Validation prompts and seeds; the classifier of the mini world judges.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import record
from erasekit.evaluation.evaluators import Batch
from erasekit.methods.prompts import neutral_of
from erasekit.methods.trajectories import predict_each, steer
from erasekit.registration.plugins import default
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit_mini.evaluators import Classifier


@torch.no_grad()
def shares(backbone_name: str, concept: str, turns: list[int], n: int) -> dict[int, float]:
    """The share of images that show a concept when the prompt turns after so many steps; turned last, it never turns."""
    plan = resolve(build({"method": "uce", "backbone": backbone_name, "concepts": (concept,)}), default())
    backbone = plan.backbone.load(plan.backbone_config)
    prompts = plan.task.prompts("erase", plan.concepts, "validation", n)
    texts = [p.text for p in prompts], [neutral_of(p, plan.concepts) for p in prompts]
    concept_cond, neutral = (backbone.encode(side) for side in texts)
    empty, schedule = backbone.encode([""]).repeat(len(prompts)), backbone.schedule(plan.protocol.steps, plan.protocol.size)
    found = {}
    for turn in turns:
        x = backbone.latents([p.seed for p in prompts], plan.protocol.size)
        for k in range(len(schedule)):
            cond = concept_cond if k < turn else neutral
            tau = schedule.tau[k].expand(len(x))
            none, wanted = predict_each(backbone, plan.protocol, x, tau, [empty, cond])
            x = backbone.step(steer(backbone, plan.protocol, none, wanted), x, k, schedule)
        judge, images = Classifier(), ((backbone.decode(x) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        judge.update(Batch(images, prompts, "base"))
        shown = [row["shown"] for row in judge.compute().rows]
        found[turn] = sum(shown) / len(shown)
    return found


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="sd15-mini")
    parser.add_argument("--concepts", nargs="+", default=["cat", "ship"])
    parser.add_argument("--n", type=int, default=20, help="images for each concept and turn")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plan = resolve(build({"method": "uce", "backbone": args.backbone, "concepts": tuple(args.concepts)}), default())
    turns = list(range(plan.protocol.steps + 1))
    rows = {concept: shares(args.backbone, concept, turns, args.n) for concept in args.concepts}
    command = f"python benchmarks/window.py --backbone {args.backbone} --concepts {' '.join(args.concepts)} --n {args.n}"
    record.write({"command": command, "machine": record.machine(), "steps": plan.protocol.steps, "shown": rows}, args.out)
    for concept, found in rows.items():
        print(concept, " ".join(f"{turn}:{share:.2f}" for turn, share in found.items()))


if __name__ == "__main__":
    main()
