"""Registers the mini world: its model, its four tasks, and what judges its images."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, RegisterComponent, hookimpl


@hookimpl
def register_backbones(register: Register) -> None:
    """Register the embedded models."""
    register("sd15-mini", "erasekit_mini.backbone:Sd15Mini", summary="a trained 64 px model in the classes of SD1.5, shipped")
    register("flux-mini", "erasekit_mini.backbone:FluxMini", summary="a trained 64 px model in the classes of FLUX.1, shipped")


@hookimpl
def register_tasks(register: Register) -> None:
    """Register the mini domain's tasks."""
    register("mini/objects", "erasekit_mini.tasks:Objects", summary="ten object classes")
    register("mini/celebrities", "erasekit_mini.tasks:Celebrities", summary="ten invented people")
    register("mini/styles", "erasekit_mini.tasks:Styles", summary="six invented artists")
    register("mini/control", "erasekit_mini.control:Control", summary="what no mini model has learned, for attacks")
    register("mini/i2p", "erasekit_mini.tasks:Hazards", summary="a stand-in: hazards take the place of explicit content")


@hookimpl
def register_evaluators(register: Register) -> None:
    """Register what judges images of the mini world."""
    register("mini-classifier", "erasekit_mini.evaluators:Classifier", summary="which objects, people, styles an image shows")
    register("mini-control", "erasekit_mini.control:ControlJudge", summary="whether an image shows a mushroom, for attacks")
    register("mini-clip", "erasekit_mini.evaluators:ClipScore", summary="how well an image fits its prompt")
    register("mini-frechet", "erasekit_mini.evaluators:Frechet", summary="distance of image statistics")


@hookimpl
def register_components(register: RegisterComponent) -> None:
    """Register the scorer that TRACE's `clip` divergence uses on the mini world."""
    register("scorer", "mini", "erasekit_mini.evaluators:ClipScorer", summary="the mini CLIP, differentiable")
