"""Time and memory of every method on SD1.5 and FLUX.1-dev at full size, with random weights: no network, one command.

    python benchmarks/gpu/bench.py                # a GPU, about nine minutes; writes benchmarks/results/gpu-*.json
    python benchmarks/gpu/bench.py --tiny         # the same on a CPU at tiny size, in a minute

The denoisers have their public configurations; text encoders have the right width but one layer, since prompts are encoded
once and are no part of what is timed. Models are written to a folder in the hub's layout and loaded as a user's would be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from erasekit import Concept, Prompt, Protocol, Task
from erasekit.errors import EnvironmentProblem
from erasekit.method import RunContext
from erasekit.plugins import default

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
FLUX = {"in_channels": 64, "guidance_embeds": True}  # the class's defaults are FLUX.1's
TINY_SD = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
TINY_FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
WORDS = ("cat", "dog", "ship", "bird", "horse", "truck")


class Animals(Task):
    """A few prompts: what is measured is time."""

    name = "bench"
    domain = "natural"
    concepts = WORDS

    def __init__(self, size: int, steps: int) -> None:
        """Pictures of `size` pixels in `steps` steps."""
        self.protocol: ClassVar[Protocol] = Protocol(sampler="default", steps=steps, guidance=3.5, size=size, batch=4)  # type: ignore[misc]

    def concept(self, text: str) -> Concept:
        """A word, erased towards a thing."""
        return Concept(name=text, phrases=(f"a {text}",), neutral="a thing")

    def prompts(self, which: str, concepts: Any, split: str, limit: int | None = None) -> list[Prompt]:
        """A photo of each word."""
        erased = [c.name for c in concepts]
        words = {"erase": erased, "synonyms": [], "pairs": []}.get(which, [w for w in WORDS if w not in erased])
        return [Prompt(f"a photo of a {w}", i, w, which, w if w in erased else "") for i, w in enumerate(words)][:limit]


def clip(folder: Path, width: int) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """A text encoder of one layer and a tokenizer that spells."""
    folder.mkdir(parents=True)
    vocabulary = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokens = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    ids = {f"{k}_token_id": getattr(tokens, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    config = CLIPTextConfig(vocab_size=len(tokens), hidden_size=width, num_hidden_layers=1, num_attention_heads=4, **ids)
    return CLIPTextModel(config), tokens


def t5(width: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """The same for T5."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)]
    tokens = T5TokenizerFast(vocab=pieces, extra_ids=0)
    tokens.model_max_length = 512
    config = T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=8, num_heads=2, d_ff=64, num_layers=1, is_encoder_decoder=False
    )
    return T5EncoderModel(config), tokens


def vae(channels: int, *, tiny: bool) -> AutoencoderKL:
    """The autoencoder of both families, random."""
    blocks = (8, 8) if tiny else (128, 256, 512, 512)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * len(blocks), "up_block_types": ("UpDecoderBlock2D",) * len(blocks)}
    groups = 4 if tiny else 32
    return AutoencoderKL(
        **kinds,
        block_out_channels=blocks,
        latent_channels=channels,
        layers_per_block=2,
        norm_num_groups=groups,
        shift_factor=0.0,
    )


def build(family: Literal["sd15", "flux"], folder: Path, device: str, *, tiny: bool) -> Path:
    """Write a pipeline with random weights in the layout of the hub."""
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    with torch.device(device):
        if family == "sd15":
            denoiser: Any = UNet2DConditionModel(**(TINY_SD if tiny else SD15))
        else:
            denoiser = FluxTransformer2DModel(**(TINY_FLUX if tiny else FLUX))
    config = denoiser.config
    channels = config.in_channels if family == "sd15" else config.in_channels // 4
    text, words = clip(folder / "tokenizer", config.cross_attention_dim if family == "sd15" else config.pooled_projection_dim)
    parts: dict[str, Any] = {"vae": vae(channels, tiny=tiny), "text_encoder": text, "tokenizer": words}
    if family == "sd15":
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe: Any = StableDiffusionPipeline(**parts, **unused, unet=denoiser, scheduler=scheduler)
    else:
        encoder, pieces = t5(config.joint_attention_dim)
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        pipe = FluxPipeline(**parts, text_encoder_2=encoder, tokenizer_2=pieces, transformer=denoiser, scheduler=scheduler)
    torch.set_default_dtype(torch.float32)
    pipe.save_pretrained(folder)
    return folder


class Clock:
    """Seconds and peak memory of a block, on a CPU or a GPU."""

    def __enter__(self) -> Clock:
        """Start."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *problem: object) -> None:
        """Stop."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.began
        self.peak_gb = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def context(backbone: Any, task: Animals) -> RunContext:
    """What a method is handed, for one concept."""
    return RunContext(backbone=backbone, concepts=(task.concept("cat"),), task=task)


def settings(method: Any, family: str, steps: int) -> Any:
    """A method's settings for a backbone's family, cut to what a timing needs."""
    values = dict(method.defaults.get(family, {}))
    small = {"steps": steps, "batch": 1, "trajectories": 1, "clean_trajectories": 1, "eta": 1.0}
    return method.Config(**values | {k: v for k, v in small.items() if k in method.Config.model_fields})


def measure_method(name: str, backbone: Any, task: Animals, steps: int) -> dict[str, Any]:
    """Seconds per training step (median over the steps after the first), seconds in all, peak memory."""
    method = default().methods.get(name)
    ctx, marks = context(backbone, task), []
    ctx.log = lambda step, total, values: marks.append(time.perf_counter())
    with Clock() as clock:
        method(settings(method, backbone.capabilities.family, steps)).erase(ctx)
    between = [b - a for a, b in itertools.pairwise(marks)]
    step = round(statistics.median(between), 4) if between else None
    return {"step_s": step, "erase_s": round(clock.seconds, 3), "peak_gb": clock.peak_gb}


def raw_passes(backbone: Any, task: Animals, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of the forward and backward passes of one step of TRACE: a concept and a clean prompt per batch."""
    from erasekit.adapters import AdapterBank

    ctx = context(backbone, task)
    scope = {"unet": "kv", "dit": "qk_dual"}[backbone.capabilities.family]
    x = backbone.latents(list(range(2 * batch)), task.protocol.size)
    cond, tau = backbone.encode(["a photo of a cat"] * 2 * batch), torch.full((2 * batch,), 0.5)
    times = []
    with AdapterBank(backbone) as bank:
        bank.add("raw", backbone.lora_targets(scope), 4, ctx.generator("raw"))
        bank.train_only("raw")
        for _ in range(repeats + 1):
            with Clock() as clock:
                ctx.predict(x, tau, cond).square().mean().backward()
            times.append(clock.seconds)
    return {"passes_s": round(statistics.median(times[1:]), 4)}


@torch.no_grad()
def measure_sampling(backbone: Any, task: Animals) -> dict[str, Any]:
    """Pictures per second of the plain pipeline with text, and with encoded prompts as erasekit samples."""
    pipe, protocol, result = backbone.pipeline(), task.protocol, {}
    prompts = [f"a photo of a {w}" for w in WORDS[:4]]
    encoded = backbone.call_arguments(backbone.encode(prompts), empty=backbone.encode([""]), guidance=protocol.guidance)
    size = {"height": protocol.size, "width": protocol.size, "num_inference_steps": protocol.steps}
    text = {"prompt": prompts, "guidance_scale": protocol.guidance}
    for name, arguments in {"bare": text, "erasekit": encoded}.items():
        pipe(**arguments, **size | {"num_inference_steps": 2}, output_type="latent")
        with Clock() as clock:
            pipe(**arguments, **size, output_type="latent")
        result[f"{name}_pictures_per_s"] = round(len(prompts) / clock.seconds, 3)
    return result


def measure(family: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one family: each size of GPU, then each method at the largest."""
    kind = default().backbones.get(family)
    task = Animals(size=16 if args.tiny else 512, steps=4 if args.tiny else 20)
    dtype = "float32" if args.tiny else "bfloat16"

    def load(vram: str) -> Any:
        return kind.load(kind.Config(path=str(folder), device=args.device, dtype=dtype, vram=vram))

    report: dict[str, Any] = {"methods": {}, "vram": {}}
    methods = [e.name for e in default().methods.entries()]
    for vram in args.vram:
        backbone = load(vram)
        try:
            report["vram"][vram] = measure_method("trace", backbone, task, args.steps)
        except (EnvironmentProblem, torch.OutOfMemoryError, NotImplementedError) as error:
            report["vram"][vram] = {"failed": str(error).splitlines()[0]}
        backbone.release("denoiser")
    backbone = load("80")
    for name in methods:
        try:
            report["methods"][name] = measure_method(name, backbone, task, args.steps)
        except Exception as error:  # one method that fails must not cost the others' figures
            report["methods"][name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    report["raw"] = raw_passes(backbone, task, batch=1, repeats=args.steps)
    if report["methods"].get("trace", {}).get("step_s"):
        report["raw"]["trace_ratio"] = round(report["methods"]["trace"]["step_s"] / report["raw"]["passes_s"], 3)
    report["sampling"] = measure_sampling(backbone, task)
    return report


def main() -> None:
    """Measure both families and write a file for each."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--tiny", action="store_true", help="tiny models")
    args.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args.add_argument("--families", nargs="+", default=["sd15", "flux"], choices=["sd15", "flux"])
    args.add_argument("--vram", nargs="+", default=["80", "48", "24", "16", "8"])
    args.add_argument("--steps", type=int, default=8)
    args.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = args.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for family in args.families:
        folder = Path(tempfile.mkdtemp())
        try:
            build(family, folder / "base", args.device, tiny=args.tiny)
            report = measure(family, folder / "base", args)
        finally:
            shutil.rmtree(folder)
        where = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        head = {"family": family, "device": where, "torch": torch.__version__, "tiny": args.tiny, "steps": args.steps}
        name = f"gpu-{family}{'-tiny' if args.tiny else ''}.json"
        (args.out / name).write_text(json.dumps(head | report, indent=1) + "\n")


if __name__ == "__main__":
    main()
