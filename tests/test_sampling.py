import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from erasekit.errors import ErasekitError, UsageError
from erasekit.evaluation import sampling
from erasekit.evaluation.sampling import base_key, generate, intact, load_image, model_key, sample, set_sampler, write_index
from erasekit.evaluation.tasks import Prompt, Protocol
from erasekit.registration.plugins import default
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


def test_one_image_per_prompt(draw, tmp_path):
    told = []
    paths = draw(tmp_path, on_batch=lambda done, total: told.append((done, total)))
    assert told == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert len(set(hashes(paths))) == 5
    assert {p.name for p in tmp_path.glob("*.png")} == {p.name for p in paths}
    write_index(tmp_path, PROMPTS, [p.name for p in paths])
    index = json.loads((tmp_path / "index.json").read_text())
    assert [row["file"] for row in index] == [p.name for p in paths]
    assert index[1] | {"file": ""} == {"file": "", **PROMPTS[1]._asdict()}


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
    assert [p.name for p in again] == [p.name for p in whole]
    assert resumed[2].stat().st_mtime_ns == untouched


def test_a_run_stopped_between_batches_goes_on(draw, tmp_path):
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "stopped", on_batch=stop)
    assert len(list((tmp_path / "stopped").glob("*.png"))) == 2
    assert hashes(draw(tmp_path / "stopped")) == hashes(draw(tmp_path / "whole"))


def test_what_is_drawn_differently_has_another_name(draw, tmp_path):
    names = [p.name for p in draw(tmp_path)]
    others = [
        draw(tmp_path, protocol=PROTOCOL.model_copy(update=changed))
        for changed in ({"steps": 2}, {"guidance": 1.0}, {"sampler": "dpm"}, {"size": 24}, {"batch": 3})
    ]
    others += [draw(tmp_path, prompts=[p._replace(**changed) for p in PROMPTS]) for changed in ({"seed": 7}, {"height": 24})]
    several = [names, *([p.name for p in paths] for paths in others)]
    assert len({name for names in several for name in names}) == 5 * 7 + 4  # two of the prompts are one, but for the seed


def test_a_prompt_may_have_a_size_and_a_guidance_scale_of_its_own(draw, tmp_path):
    own = [
        PROMPTS[0],
        PROMPTS[1]._replace(width=24, height=16),
        PROMPTS[2]._replace(guidance=1.0),
        PROMPTS[3]._replace(guidance=3),
    ]
    paths, plain = draw(tmp_path, prompts=own), draw(tmp_path)
    assert [Image.open(p).size for p in paths] == [(16, 16), (24, 16), (16, 16), (16, 16)]
    assert (paths[0], paths[3]) == (plain[0], plain[3])  # what it says is what the protocol says
    assert paths[2:3] == draw(tmp_path, prompts=[PROMPTS[2]], protocol=PROTOCOL.model_copy(update={"guidance": 1.0}))


@pytest.mark.parametrize(("name", "threads"), [("sd15-mini", 1), ("flux-mini", 1), ("flux-mini", 2)])
def test_an_image_does_not_depend_on_what_is_drawn_with_it(name, threads, tmp_path):
    kind = default().backbones.get(name)
    mini, before = kind.load(kind.Config()), torch.get_num_threads()
    prompts = [Prompt(f"a photo of a {what}", i) for i, what in enumerate(["cat", "dog", "tree"] * 4)]
    protocol, found = Protocol(sampler="default", steps=1, size=64, batch=10), {}
    try:
        torch.set_num_threads(threads)
        for order in ([*range(12)], [11, 2, 7]):
            asked = [prompts[i] for i in order]
            encoded = mini.encode([p.text for p in asked])
            folder = tmp_path / "-".join(map(str, order))
            pipe = mini.pipeline(encoders=False, shared=True)
            for path in sample(mini, pipe, asked, encoded, mini.encode([""]), protocol, folder):
                found.setdefault(path.name, set()).update(hashes([path]))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert [len(each) for each in found.values()] == [1] * 12


def test_what_is_asked_for_twice_is_drawn_once(draw, backbone, tmp_path, monkeypatch):
    from erasekit.evaluation import sampling

    calls, plain = [], sampling._draw
    monkeypatch.setattr(sampling, "_draw", lambda pipe, seeds, *more: calls.append(list(seeds)) or plain(pipe, seeds, *more))
    paths = draw(tmp_path, prompts=[PROMPTS[0], PROMPTS[1], PROMPTS[0]._replace(set="clean")])
    assert paths[0] == paths[2]
    assert draw(tmp_path, prompts=PROMPTS[1:3]) == [paths[1], tmp_path / draw(tmp_path, prompts=PROMPTS[2:3])[0].name]
    assert calls == [[100, 101], [102, 102]]  # one alone fills its call up


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


def test_an_unreadable_or_a_black_image_is_none(draw, tmp_path):
    paths = draw(tmp_path)
    paths[1].write_bytes(b"")
    Image.new("RGB", (16, 16)).save(paths[3])
    images = [load_image(path) for path in paths]
    assert [image is None for image in images] == [False, True, False, True, False]
    assert images[2].dtype == torch.uint8
    assert torch.equal(images[2].permute(1, 2, 0), torch.from_numpy(np.array(Image.open(paths[2]))))


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
    assert model_key(backbone) != model_key(backbone, "an erasure")


def test_two_who_want_the_same_images_in_another_order_draw_them_once(draw, tmp_path, monkeypatch):
    """The second comes while the first draws; its call begins with another image."""
    drawing, calls, original = threading.Event(), [], sampling._draw

    def slowly(*arguments):
        calls.append(arguments)
        drawing.set()
        second.join(timeout=1)
        return original(*arguments)

    monkeypatch.setattr(sampling, "_draw", slowly)
    whole = PROTOCOL.model_copy(update={"batch": 5})
    second = threading.Thread(target=lambda: (drawing.wait(), draw(tmp_path, PROMPTS[::-1], whole)))
    second.start()
    draw(tmp_path, PROMPTS, whole)
    second.join()
    assert len(calls) == 1
