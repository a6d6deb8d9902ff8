"""Seconds, memory, rank and file size of closed-form erases (UCE) at the sizes of SD1.5 and FLUX.1, on random models.

    python benchmarks/closed_form.py --out benchmarks/results/closed-form.json       # both sizes, and 100 concepts in one solve

Text encoders and edited layers have the real shapes and random weights. `sd15`: one concept, about 300 prompts in CLIP's
twelve layers, their encoding included, 32 matrices. `flux`: one concept, about 130 prompts of 512 tokens; T5, which is one
small layer here, is not counted. `solve`: 100 concepts in 30 templates, beside a loop that adds one vector after the other;
both give the same weights, which is checked. Each is a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import T5Config, T5EncoderModel

import record
from erasekit.backbones.protocol import Conditioning, Site, concatenate
from erasekit.erasures.deltas import to_dense
from erasekit.evaluation.free import Free
from erasekit.methods import closedform
from erasekit.methods.context import RunContext
from erasekit.registration.plugins import default
from gpu import models

WIDTH = 768
OUTPUTS = (320,) * 10 + (640,) * 10 + (1280,) * 12  # keys and values of the 16 cross-attentions
MORE = {"sd15": 170, "flux": 0}  # captions that are preserved too, so that SD1.5 has some hundred prompts


def small_t5() -> T5EncoderModel:
    """One narrow layer between embeddings as wide as T5-XXL's."""
    narrow = {"d_ff": 64, "num_layers": 1, "num_heads": 1, "is_encoder_decoder": False, "use_cache": False}
    return T5EncoderModel(T5Config(**models.T5_XXL | narrow)).eval()


class Shapes:
    """As much of a backbone as a closed form meets: text encoders, and the layers that read text."""

    name, revision, device = "shapes", "", torch.device("cpu")

    def __init__(self, size: str) -> None:
        """Of one size, random."""
        self.source, self.encoded = size, dict[str, Conditioning]()
        self.prefix = "unet" if size == "sd15" else "transformer"
        torch.manual_seed(0)
        self.clip, self.words = models.clip(tiny=False)
        self.clip.eval()
        self.t5, self.pieces = (None, None) if size == "sd15" else (small_t5(), models.t5(tiny=True)[1])
        shapes = {f"kv.{i}": (out, WIDTH) for i, out in enumerate(OUTPUTS)}
        if size == "flux":
            shapes = {"context_embedder": (3072, 4096), "pooled": (3072, WIDTH)}
        self.weights = {name: torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}

    def text_sites(self) -> list[Site]:
        """The edited layers."""
        return [Site(name, "pooled" if name == "pooled" else "tokens") for name in self.weights]

    def weight(self, module: str) -> torch.Tensor:
        """The weight of one of them."""
        return self.weights[module]

    def fingerprint(self, modules: Sequence[str]) -> str:
        """Of nothing: the weights are drawn on the spot."""
        return hashlib.sha256().hexdigest()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Each prompt once."""
        for prompt in prompts:
            if prompt not in self.encoded:
                self.encoded[prompt] = self._one(prompt)
        return concatenate([self.encoded[prompt] for prompt in prompts])

    def _one(self, prompt: str) -> Conditioning:
        words = self.words(prompt, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        read = self.clip(words.input_ids)
        if self.t5 is None:
            return Conditioning(read.last_hidden_state, None, words.input_ids, words.attention_mask.sum(1))
        pieces = self.pieces(prompt, padding="max_length", truncation=True, max_length=512, return_tensors="pt")
        tokens = self.t5(pieces.input_ids).last_hidden_state.bfloat16()
        return Conditioning(tokens, read.pooler_output.bfloat16(), pieces.input_ids, pieces.attention_mask.sum(1))


class Many(Free):
    """The task for any concept, some of its captions preserved too."""

    more: ClassVar[int] = 0

    def prompts(self, which: str, concepts: Any, split: Any, limit: int | None = None) -> list[Any]:
        """One prompt set."""
        found = super().prompts(which, concepts, split, limit)
        return [*found, *super().prompts("captions", concepts, split, self.more)] if which == "preserve" else found


def erase(size: str) -> dict[str, Any]:
    """One concept, from prompts to files."""
    task = Many()
    Many.more = MORE[size]
    method = default().methods.get("uce")
    with tempfile.TemporaryDirectory() as name:
        backbone: Any = Shapes(size)
        ctx = RunContext(backbone, (task.concept("a cat"),), task)
        if size == "flux":  # T5 is not counted
            _encode_all(ctx)
        began = time.perf_counter()
        erasure = method(method.Config()).erase(ctx)
        solved = time.perf_counter()
        erasure.save(Path(name) / "erasure")
        written = time.perf_counter()
        files = [path.stat() for path in (Path(name) / "erasure").rglob("*.safetensors")]
        return {
            "erase_s": round(solved - began, 1),
            "write_s": round(written - solved, 1),
            "prompts": len(backbone.encoded),
            "rank": max(delta.down.shape[0] for delta in erasure.total().values()),
            "file_mb": round(max(file.st_size for file in files) / 1e6, 1),
            "disk_mb": round(sum({file.st_ino: file.st_size for file in files}.values()) / 1e6, 1),
        }


def _encode_all(ctx: RunContext) -> None:
    """All prompts that the closed form will ask for."""
    from erasekit.methods.prompts import concept_prompts, preserve_prompts

    (concept,) = ctx.concepts
    prompts = concept_prompts(concept, ctx.prompts("erase"))
    ctx.backbone.encode([*preserve_prompts(ctx), *prompts, *(concept.neutralise(prompt) for prompt in prompts)])


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


def solve(concepts: int = 100, templates: int = 30) -> dict[str, Any]:
    """100 concepts in one solve for the matrices of SD1.5, and one matrix by the loop."""
    generator = torch.Generator().manual_seed(0)
    rows = concepts * templates
    concept, neutral, preserve = (embeddings(n, generator) for n in (rows, rows, 1000))
    weights = [torch.randn(out, WIDTH, generator=generator) for out in OUTPUTS]

    began = time.perf_counter()
    of_each = zip(concept.split(templates), neutral.split(templates), strict=True)
    pairs = [closedform.Pairs.empty(WIDTH).add(w, u) for w, u in of_each]
    shares = closedform.uce(pairs, preserve.T @ preserve, lamb=0.1, error=0)
    deltas = [closedform.layer_deltas(shares, w) for w in weights]
    ours = time.perf_counter() - began

    gram = concept.T @ concept + preserve.T @ preserve
    lamb = 0.1 * float(gram.diagonal().mean())
    began = time.perf_counter()
    looped = one_by_one(weights[-1].double(), concept, neutral, preserve, lamb)
    loop = (time.perf_counter() - began) * sum(OUTPUTS) / OUTPUTS[-1]

    mine = weights[-1].double() + sum(map(to_dense, deltas[-1]))
    error = float((mine - looped).norm() / (looped - weights[-1].double()).norm())
    if error > 1e-6:
        raise SystemExit(f"The two solutions differ by {error:.1e}.")
    ranks = [len(share.read_ND) for share in shares]
    return {"erase_s": round(ours, 3), "per_vector_loop_s": round(loop, 1), "relative_difference": error, "rank": max(ranks)}


def main() -> None:
    """Measure in processes of their own; print and write."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("what", nargs="*", help="sd15, flux, solve; all of them, if left out")
    args.add_argument("--here", action="store_true", help="in this process, one of them")
    args.add_argument("--out", type=Path)
    args = args.parse_args()
    if args.here:
        found = solve() if args.what == ["solve"] else erase(*args.what)
        print(json.dumps(found | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
        return
    result: dict[str, Any] = {"command": shlex.join(["python", "benchmarks/closed_form.py", *sys.argv[1:]])}
    for what in args.what or ("sd15", "flux", "solve"):
        done = subprocess.run([sys.executable, __file__, what, "--here"], stdout=subprocess.PIPE, text=True, check=True)
        result[what] = json.loads(done.stdout.splitlines()[-1])
        print(what, result[what], file=sys.stderr, flush=True)
    result |= record.machine()
    print(json.dumps(result, indent=1))
    if args.out:
        record.write(result, args.out)


if __name__ == "__main__":
    main()
