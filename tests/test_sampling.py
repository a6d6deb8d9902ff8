import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from erasekit.errors import ErasekitError, UsageError
from erasekit.evaluation.sampling import base_key, generate, intact, load_images, sample, set_sampler
from erasekit.evaluation.tasks import Prompt, Protocol
from erasekit.testing import tiny

PROTOCOL = Protocol(sampler="ddim", steps=3, guidance=3.0, size=16, batch=2)
PROMPTS = [
    Prompt(f"a photo of a {what}", 100 + i, what, "erase", what) for i, what in enumerate(("cat", "dog", "ship", "cat", "red"))
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny.load(tiny.save_pipeline(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def draw(backbone):
    def drawn(folder: Path, prompts=PROMPTS, protocol=PROTOCOL, **options) -> list[Path]:
        texts = backbone.encode([p.text for p in prompts])
        return sample(backbone, backbone.pipeline(), prompts, texts, backbone.encode([""]), protocol, folder, **options)

    return drawn


def hashes(paths) -> list[str]:
    return [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]


def test_one_image_per_prompt_with_an_index(draw, tmp_path):
    told = []
    paths = draw(tmp_path, on_batch=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert len(set(hashes(paths))) == 5
    index = json.loads((tmp_path / "index.json").read_text())
    assert [row["file"] for row in index] == [p.name for p in paths]
    assert index[1] | {"file": ""} == {"file": "", **PROMPTS[1]._asdict()}
    assert {p.name for p in tmp_path.iterdir()} == {"index.json", *(p.name for p in paths)}


def test_images_equal_the_plain_pipeline_call_with_texts(draw, backbone, tmp_path):
    paths = draw(tmp_path)
    pipe = backbone.pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    for start in (0, 2, 4):
        part = PROMPTS[start : start + 2]
        seeds = [torch.Generator().manual_seed(p.seed) for p in part]
        arguments = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 16, "width": 16, "generator": seeds}
        plain = pipe([p.text for p in part], **arguments).images
        for image, path in zip(plain, paths[start:], strict=False):
            assert np.array_equal(np.array(image), np.array(Image.open(path)))


def test_generate_draws_the_same_images(draw, backbone, tmp_path):
    paths = draw(tmp_path)
    images = generate(backbone, backbone.pipeline(), [p.text for p in PROMPTS], [p.seed for p in PROMPTS], PROTOCOL)
    assert [np.array(p).tobytes() for p in images] == [np.array(Image.open(p)).tobytes() for p in paths]


def test_a_resumed_run_draws_the_same_bytes(draw, tmp_path):
    whole, resumed = draw(tmp_path / "whole"), draw(tmp_path / "resumed", on_batch=None)
    resumed[1].unlink()  # half of a batch
    resumed[4].write_bytes(resumed[4].read_bytes()[:-30])  # cut short
    untouched = resumed[2].stat().st_mtime_ns
    again = draw(tmp_path / "resumed")
    assert again == resumed
    assert hashes(again) == hashes(whole)
    assert resumed[2].stat().st_mtime_ns == untouched


def test_a_run_stopped_between_batches_goes_on(draw, tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "stopped", on_batch=stop)
    assert len(list((tmp_path / "stopped").glob("*.png"))) == 2
    assert hashes(draw(tmp_path / "stopped")) == hashes(draw(tmp_path / "whole"))


def test_what_is_drawn_differently_has_another_name(draw, tmp_path):
    names = [p.name for p in draw(tmp_path)]
    other = [p.name for p in draw(tmp_path, protocol=PROTOCOL.model_copy(update={"steps": 2}))]
    shorter = [p.name for p in draw(tmp_path, prompts=PROMPTS[:3])]
    assert not set(names) & set(other)
    assert shorter[:2] == names[:2]
    assert shorter[2] != names[2]  # alone in its batch now


def test_any_flipped_bit_is_seen(tmp_path):
    path = tmp_path / "a.png"
    Image.effect_noise((16, 16), 90).convert("RGB").save(path)
    whole = path.read_bytes()
    for position in range(0, len(whole) - 12, 7):  # the last 12 bytes are the end mark
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert not intact(path), position
    path.write_bytes(whole)
    assert intact(path)
    assert not intact(tmp_path / "none.png")
    assert not intact(tmp_path)


def test_unreadable_images_are_reported_by_index(draw, tmp_path):
    paths = draw(tmp_path)
    paths[1].write_bytes(b"")
    images, unreadable = load_images(paths)
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert unreadable == [1]
    assert torch.equal(images[1].permute(1, 2, 0), torch.from_numpy(np.array(Image.open(paths[2]))))
    assert load_images(paths[1:2])[0].shape[0] == 0


def test_a_black_image_is_none(draw, tmp_path):
    paths = draw(tmp_path)
    Image.new("RGB", (16, 16)).save(paths[3])
    images, unreadable = load_images(paths)
    assert (len(images), unreadable) == (4, [3])


def test_samplers(backbone):
    pipe = backbone.pipeline()
    before = pipe.scheduler
    set_sampler(pipe, "default")
    assert pipe.scheduler is before
    set_sampler(pipe, "dpm")
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    set_sampler(pipe, "ddim")
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]  # trailing: begins at pure noise
    assert pipe.scheduler.config.beta_schedule == before.config.beta_schedule
    assert not pipe.scheduler.config.clip_sample
    with pytest.raises(UsageError, match="default, ddim, dpm"):
        set_sampler(pipe, "euler")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UsageError, match="FlowMatchEulerDiscreteScheduler"):
        set_sampler(pipe, "ddim")


def test_a_broken_model_is_an_error_and_writes_no_image(backbone, tmp_path):
    pipe = backbone.pipeline()
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(ErasekitError, match="not finite"):
        sample(backbone, pipe, PROMPTS[:2], backbone.encode(["a", "a"]), backbone.encode([""]), PROTOCOL, tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_prompts_and_their_encodings_must_match(backbone, tmp_path):
    with pytest.raises(ValueError, match="5 prompts"):
        sample(backbone, backbone.pipeline(), PROMPTS, backbone.encode(["a"]), backbone.encode([""]), PROTOCOL, tmp_path)


def test_the_base_key_holds_all_that_decides_the_bytes(backbone, tmp_path_factory):
    folder = tiny.save_pipeline(tmp_path_factory.mktemp("other"), seed=1)
    keys = [
        base_key(backbone, PROTOCOL, PROMPTS),
        base_key(tiny.load(folder), PROTOCOL, PROMPTS),
        base_key(tiny.load(folder, dtype="bfloat16"), PROTOCOL, PROMPTS),
        base_key(backbone, PROTOCOL.model_copy(update={"guidance": 1.0}), PROMPTS),
        base_key(backbone, PROTOCOL, PROMPTS[:4]),
        base_key(backbone, PROTOCOL, [PROMPTS[0]._replace(seed=1), *PROMPTS[1:]]),
    ]
    assert len(set(keys)) == len(keys)
    assert base_key(backbone, PROTOCOL, PROMPTS) == keys[0]
