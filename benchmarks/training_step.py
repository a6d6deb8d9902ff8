"""How much a training step of TRACE costs above the forward and backward passes that it needs (at most 1.15 is the aim).

Both loops run the same student on batches of the same size in one process, in turns; the ratio of the medians is printed.

    python benchmarks/training_step.py --steps 40 --out benchmarks/results/training-step.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import record
from erasekit.backbones.protocol import BackboneConfig, concatenate
from erasekit.methods.context import RunContext
from erasekit.methods.training import train
from erasekit.registration.plugins import default
from erasekit_mini.backbone import Sd15Mini
from erasekit_mini.tasks import Objects
from erasekit_trace.method import Trace, TraceConfig

COMPONENT = default().components.get


def main() -> None:
    """Time both and print the ratio."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--steps", type=int, default=40)
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--out", type=Path)
    args = args.parse_args()
    config = TraceConfig(steps=args.steps, refine="none", trajectories=16, clean_trajectories=16)
    task = Objects()
    ctx = RunContext(
        backbone=Sd15Mini.load(BackboneConfig()), concepts=(task.concept("cat"),), task=task, component=default().components.get
    )
    whole, bare = [], []
    with Trace(config).student(ctx, {}) as (_, step, parameters):
        batch = (
            step.pools[0].sample(config.batch, torch.Generator().manual_seed(0)),
            step.clean.sample(config.batch, torch.Generator().manual_seed(1)),
        )
        x, tau = (torch.cat([getattr(b, name) for b in batch]) for name in ("x", "tau"))
        cond = concatenate([b.cond for b in batch])

        def passes() -> None:
            for p in parameters:
                p.grad = None
            ctx.backbone.predict(x, tau, cond).square().mean().backward()

        passes()
        for _ in range(args.rounds):
            began = time.perf_counter()
            train(step, parameters, config, ctx=ctx, name="timed")
            whole.append((time.perf_counter() - began) / args.steps)
            began = time.perf_counter()
            for _ in range(args.steps):
                passes()
            bare.append((time.perf_counter() - began) / args.steps)
    result = {
        "command": f"python benchmarks/training_step.py --steps {args.steps} --rounds {args.rounds}",
        "step_s": round(statistics.median(whole), 5),
        "passes_s": round(statistics.median(bare), 5),
        "ratio": round(statistics.median(whole) / statistics.median(bare), 4),
        **record.machine(),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        record.write(result, args.out)


if __name__ == "__main__":
    main()
