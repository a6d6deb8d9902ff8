"""Seconds of a closed-form erase (UCE) at the sizes of SD1.5, beside a loop that adds one vector after the other.

    python benchmarks/closed_form.py --out benchmarks/results/closed-form.json

100 concepts in 30 templates (3,000 embeddings of width 768), 1,000 preserved tokens, the 32 key and value matrices of SD1.5.
Random numbers: the time does not depend on what they are. Both give the same weights, which is checked.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch

import record
from erasekit import closedform
from erasekit.deltas import to_dense

WIDTH = 768
OUTPUTS = (320,) * 10 + (640,) * 10 + (1280,) * 12  # keys and values of the 16 cross-attentions


def embeddings(n: int, generator: torch.Generator) -> torch.Tensor:
    """Rows with the norm of CLIP's embeddings, all alike in part, as real ones are."""
    common = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    return 0.7 * common + 0.7 * torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)


def one_by_one(
    weight: torch.Tensor, concept: torch.Tensor, neutral: torch.Tensor, preserve: torch.Tensor, lamb: float
) -> torch.Tensor:
    """UCE's Eq. 7 for one matrix, vector by vector."""
    values = lamb * weight
    gram = lamb * torch.eye(WIDTH, dtype=weight.dtype)
    for c, goal in zip(concept, neutral, strict=True):
        values = values + torch.outer(weight @ goal, c)
        gram = gram + torch.outer(c, c)
    for p in preserve:
        values = values + torch.outer(weight @ p, p)
        gram = gram + torch.outer(p, p)
    return values @ torch.linalg.inv(gram)


def main() -> None:
    """Time both, compare their weights, print and write."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--concepts", type=int, default=100)
    args.add_argument("--templates", type=int, default=30)
    args.add_argument("--preserve", type=int, default=1000)
    args.add_argument(
        "--loop-matrices", type=int, default=len(OUTPUTS), help="matrices that the loop does; the rest is scaled up"
    )
    args.add_argument("--out", type=Path)
    args = args.parse_args()
    generator = torch.Generator().manual_seed(0)
    rows = args.concepts * args.templates
    concept, neutral, preserve = (embeddings(n, generator) for n in (rows, rows, args.preserve))
    weights = [torch.randn(out, WIDTH, generator=generator) for out in OUTPUTS]

    began = time.perf_counter()
    edit = closedform.uce(concept, neutral, preserve, lamb=0.1, erase_scale=1.0, preserve_scale=1.0)
    shares = [share.compressed() for share in edit.split([args.templates] * args.concepts)]
    deltas = [closedform.layer_deltas(shares, w) for w in weights]
    ours = time.perf_counter() - began

    gram = concept.T @ concept + preserve.T @ preserve
    lamb = 0.1 * float(gram.diagonal().mean())
    began = time.perf_counter()
    looped = [one_by_one(w.double(), concept, neutral, preserve, lamb) for w in weights[-args.loop_matrices :]]
    loop = (time.perf_counter() - began) * sum(OUTPUTS) / sum(OUTPUTS[-args.loop_matrices :])

    mine = weights[-1].double() + sum(map(to_dense, deltas[-1]))
    error = float((mine - looped[-1]).norm() / (looped[-1] - weights[-1].double()).norm())
    if error > 1e-6:
        raise SystemExit(f"The two solutions differ by {error:.1e}.")
    result = {
        "command": shlex.join(["python", "benchmarks/closed_form.py", *sys.argv[1:]]),
        "erase_s": round(ours, 3),
        "per_vector_loop_s": round(loop, 1),
        "relative_difference": error,
        "matrices": len(OUTPUTS),
        **record.machine(),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        record.write(result, args.out)


if __name__ == "__main__":
    main()
