"""UCE's debiasing on the mini models: how often each of two guides is drawn, unedited, at equal shares and debiased.

    python benchmarks/debias.py --out benchmarks/results/debias.json

"a background" is to become "a cat" as often as "a ship". The images counted have the prompts of the rounds and other noise,
and the CLIP that the rounds ask says what they show: another judge may see other shares.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
from erasekit.concepts import Concept
from erasekit.erasures.deltas import merged, summed
from erasekit.evaluation.tasks import Prompt
from erasekit.methods.context import RunContext
from erasekit.registration.plugins import default
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit_mini.tasks import Objects
from erasekit_uce.method import Uce

GUIDES = ("a cat", "a ship")
CONCEPT = Concept(name="background", phrases=("a background",), templates=("a photo of {}", "a picture of {}", "{}"))


class NoPrompts(Objects):
    """No prompts but the concept's own."""

    def prompts(self, *_: Any, **__: Any) -> list[Prompt]:
        """None."""
        return []


def measure(backbone: str, rounds: int, looked_at: int, counted: int) -> dict[str, Any]:
    """The shares of both guides after debiasing, and what is drawn with and without."""
    plan = resolve(build({"method": "uce", "backbone": backbone, "task": "objects", "concepts": ("cat",)}), default())
    loaded = plan.backbone.load(plan.backbone_config)
    ctx = RunContext(loaded, (CONCEPT,), NoPrompts(), protocol=plan.protocol, component=default().components.get)
    config = plan.method_config.model_copy(update={"guides": GUIDES, "debias_rounds": rounds, "debias_images": looked_at})
    shares = Uce(config).shares(ctx)
    judge = Uce(config.model_copy(update={"debias_images": counted}))
    scorer = default().components.get("scorer", loaded.domain)()
    seen: dict[str, Any] = {"unedited": judge.seen(replace(ctx, seed=1), CONCEPT, scorer)}
    for name, weights in (("equal shares", {}), ("debiased", shares)):
        with merged(loaded.denoiser, summed(list(judge.edit(ctx, weights).values()))):
            seen[name] = judge.seen(replace(ctx, seed=1), CONCEPT, scorer)
    return {"shares": shares[CONCEPT.name], "drawn": seen}


def main() -> None:
    """Measure both mini models and print the shares as JSON."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--rounds", type=int, default=6)
    args.add_argument("--images", type=int, default=48, help="in each round")
    args.add_argument("--counted", type=int, default=96, help="images that are counted at the end")
    args.add_argument("--out", type=Path)
    args = args.parse_args()
    result = {"command": shlex.join(["python", "benchmarks/debias.py", *sys.argv[1:]]), "guides": GUIDES, **record.machine()}
    result |= {name: measure(name, args.rounds, args.images, args.counted) for name in ("sd15-mini", "flux-mini")}
    print(json.dumps(result, indent=1))
    if args.out:
        record.write(result, args.out)


if __name__ == "__main__":
    main()
