"""Registers what comes with erasekit."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, RegisterComponent, hookimpl


@hookimpl
def register_backbones(register: Register) -> None:
    """Stable Diffusion 1.x, XL and 3.5, FLUX.1 and FLUX.2."""
    sd = "erasekit.backbones.sd"
    register("sd15", f"{sd}:StableDiffusion", aliases=("sd1.5",), summary="Stable Diffusion 1.5, 860 M UNet, 512 x 512")
    register(
        "sd14",
        f"{sd}:StableDiffusion14",
        aliases=("sd1.4",),
        summary="Stable Diffusion 1.4, 512 x 512, the base of most papers",
    )
    register(
        "sdxl",
        "erasekit.backbones.sdxl:StableDiffusionXL",
        aliases=("sd-xl",),
        summary="Stable Diffusion XL base, 2.6 B UNet, 1024 x 1024",
    )
    sd3 = "erasekit.backbones.sd3"
    register(
        "sd35-medium",
        f"{sd3}:StableDiffusion35Medium",
        aliases=("sd3.5-medium",),
        summary="Stable Diffusion 3.5 medium, 2.2 B transformer, 1024 x 1024, gated",
    )
    register(
        "sd35-large",
        f"{sd3}:StableDiffusion35Large",
        aliases=("sd3.5-large",),
        summary="Stable Diffusion 3.5 large, 8 B transformer, 1024 x 1024, gated",
    )
    flux = "erasekit.backbones.flux"
    register(
        "flux", f"{flux}:Flux", aliases=("flux-dev", "flux.1-dev"), summary="FLUX.1-dev, 12 B transformer, 512 x 512, gated"
    )
    register(
        "flux-schnell", f"{flux}:FluxSchnell", aliases=("flux.1-schnell",), summary="FLUX.1-schnell, four steps, 512 x 512"
    )
    for size, gated in (("4B", ""), ("9B", ", gated")):
        for kind, how in (("Klein", "four steps"), ("KleinBase", "undistilled")):
            name = f"klein-{'base-' if 'Base' in kind else ''}{size.lower()}"
            register(
                f"flux2-{name}",
                f"erasekit.backbones.flux2:Flux2{kind}{size}",
                aliases=(f"flux.2-{name}",),
                summary=f"FLUX.2 [klein] {size}, {how}, 1024 x 1024{gated}",
            )


@hookimpl
def register_components(register: RegisterComponent) -> None:
    """What methods look at natural images with."""
    register("scorer", "natural", "erasekit.evaluation.scorer:ClipScorer", summary="CLIP ViT-B/32, differentiable")


@hookimpl
def register_tasks(register: Register) -> None:
    """The task for any concept, and the four that papers measure."""
    register("natural/free", "erasekit.evaluation.free:Free", summary="any concept in your own words; images, no scores")
    tasks = "../tasks"
    register("natural/objects", f"{tasks}/objects.toml", summary="the ten classes of CIFAR-10, with synonyms and plurals")
    register("natural/celebrities", f"{tasks}/celebrities.toml", summary="people by name, their faces told by your photos")
    register("natural/styles", f"{tasks}/styles.toml", summary="five artists, told by CLIP or by a probe on your paintings")
    register("natural/i2p", f"{tasks}/i2p.toml", summary="explicit content: the prompts of I2P, judged by NudeNet")


@hookimpl
def register_launchers(register: Register) -> None:
    """What starts the workers of a sweep."""
    register("local", "erasekit.sweeps.local:Local", summary="this machine: a worker for each GPU, or some on the CPU")
    register(
        "ray", "erasekit.sweeps.ray_cluster:RayCluster", summary="a Ray cluster, running or local (pip install 'erasekit[ray]')"
    )
    register("slurm", "erasekit.sweeps.slurm:Slurm", summary="an array of Slurm jobs (pip install 'erasekit[slurm]')")


@hookimpl
def register_exporters(register: Register) -> None:
    """What other programs load."""
    register("diffusers", "erasekit.erasures.lora_folder:LoraFolder", summary="one LoRA in a folder, for diffusers")
    register("kohya", "erasekit.erasures.kohya:Kohya", summary="one file for ComfyUI, Forge, A1111 and sd-scripts")
    register("merged", "erasekit.erasures.merging:Merged", summary="the base with the erasure in its weights")


@hookimpl
def register_evaluators(register: Register) -> None:
    """What judges natural images; the packages that each needs are imported when it is made."""
    natural = "erasekit.evaluation.natural"
    register("imagenet", f"{natural}.imagenet:Imagenet", summary="everyday names and ImageNet classes, by ResNet-50")
    register("imagenet-lite", f"{natural}.imagenet:ImagenetLite", summary="the same by EfficientNet-lite0, without a download")
    register("clip10", f"{natural}.clip10:Clip10", summary="the likeliest of ten names, by CLIP")
    register("faces", f"{natural}.faces:Faces", summary="whose face, by dlib and photos that you give")
    register("nudenet", f"{natural}.nudity:Nudenet", summary="nudity, by NudeNet 3.4.2")
    register("open-nsfw", f"{natural}.nudity:OpenNsfw", summary="a second opinion on nudity, by Yahoo's open_nsfw")
    register("styles", f"{natural}.styles:Styles", summary="whose style, by CLIP")
    register("styles-probe", f"{natural}.styles:StylesProbe", summary="whose style, by paintings that you give")
    register("clip-score", f"{natural}.clip_score:ClipScore", summary="how well an image fits its prompt, by CLIP")
    register("fid", f"{natural}.inception:Fid", summary="FID, as torch-fidelity computes it")
    register("fid-torchmetrics", f"{natural}.inception:FidTorchmetrics", summary="FID, as torchmetrics computes it")
    register("kid", f"{natural}.inception:Kid", summary="KID, of all images at once")
    register("cmmd", f"{natural}.cmmd:Cmmd", summary="a distance of sets of images for a few hundred, by CLIP")
    register("frechet-lite", f"{natural}.frechet_lite:FrechetLite", summary="Frechet distance by EfficientNet-lite0, no FID")
    register("lpips", f"{natural}.lpips:Lpips", summary="how far each image moved from the unedited model's")
