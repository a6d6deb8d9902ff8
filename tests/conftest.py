"""Fixtures that several tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Tests run side by side, a process for each core: more threads than cores would wait for one another. Before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

THIRD_PARTY = Path(__file__).parent / "third_party"


def pytest_addoption(parser):
    parser.addoption("--matrix", action="store_true", help="methods in closed form and 20 steps, on all models that can be had")


@pytest.fixture(scope="session")
def world() -> Path:
    """The plugin file with a whole tiny world."""
    return THIRD_PARTY / "tiny_world.py"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion folder with random weights."""
    from erasekit.testing import tiny

    return tiny.save_pipeline(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="session")
def tiny_flux_folder(tmp_path_factory) -> Path:
    """A tiny FLUX folder with random weights."""
    from erasekit.testing import tiny_flux

    return tiny_flux.save_pipeline(tmp_path_factory.mktemp("base") / "flux")


@pytest.fixture(scope="session")
def tiny_sd3_folder(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion 3.5 folder with random weights."""
    from erasekit.testing import tiny_sd3

    return tiny_sd3.save_pipeline(tmp_path_factory.mktemp("base") / "sd3")


@pytest.fixture(scope="session")
def tiny_flux2_folder(tmp_path_factory) -> Path:
    """A tiny distilled FLUX.2 folder with random weights."""
    from erasekit.testing import tiny_flux2

    return tiny_flux2.save_pipeline(tmp_path_factory.mktemp("base") / "flux2")


@pytest.fixture(scope="session")
def tiny_flux2_base_folder(tmp_path_factory) -> Path:
    """A tiny FLUX.2 folder that is not distilled."""
    from erasekit.testing import tiny_flux2

    return tiny_flux2.save_pipeline(tmp_path_factory.mktemp("base") / "flux2-base", distilled=False)


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory) -> Path:
    """A tiny CLIP with random weights, as open_clip keeps its models in a folder."""
    import json

    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    folder.mkdir()
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def sd(tiny_folder):
    """The tiny Stable Diffusion, loaded."""
    from erasekit.testing import tiny

    return tiny.load(tiny_folder)


@pytest.fixture(scope="module")
def sd3(tiny_sd3_folder):
    """The tiny Stable Diffusion 3.5, loaded."""
    from erasekit.testing import tiny_sd3

    return tiny_sd3.load(tiny_sd3_folder)


@pytest.fixture(scope="module")
def flux2(tiny_flux2_folder):
    """The tiny distilled FLUX.2, loaded."""
    from erasekit.testing import tiny_flux2

    return tiny_flux2.load(tiny_flux2_folder)


@pytest.fixture(scope="module")
def flux(tiny_flux_folder):
    """The tiny FLUX, loaded."""
    from erasekit.testing import tiny_flux

    return tiny_flux.load(tiny_flux_folder)


@pytest.fixture(scope="module", params=["sd", "flux"])
def backbone(request):
    """Each of both families in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def ctx(backbone):
    """A run that erases the cat of the tiny world, on each of both families, with short trajectories."""
    from erasekit.methods.context import RunContext
    from erasekit.registration.plugins import default
    from tests.third_party.tiny_world import Words

    task = Words()
    ctx = RunContext(backbone, (task.concept("cat"),), task, component=default().components.get)
    ctx.protocol = ctx.protocol.model_copy(update={"steps": 4})
    return ctx


@pytest.fixture(scope="module", params=["sd", "flux"])
def wide(request, tmp_path_factory):
    """A model with far more dimensions than positions, as real ones have, so that an edit can leave something alone."""
    from erasekit.testing import tiny, tiny_flux

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "WIDTH", 256)
        patch.setattr(tiny_flux, "WIDTH", 256)
        patch.setattr(tiny_flux, "TOKENS", 256)
        module = tiny if request.param == "sd" else tiny_flux
        return module.load(module.save_pipeline(tmp_path_factory.mktemp("wide") / request.param))


@pytest.fixture
def erasekit(tmp_path):
    """Run the command line in a process of its own, in an empty folder."""

    def call(*arguments: object, environment: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess[str]:
        root = str(Path(__file__).parents[1])
        paths = os.pathsep.join([root, str(Path(root) / "plugins"), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(environment or {})}
        command = [sys.executable, "-m", "erasekit", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False, **options)

    return call
