"""Two processes at one run: what one draws and trains alone, they draw and train together, and one of them writes.

They are forked, so that torch is loaded once.
"""

import hashlib
import json
import os
import socket
import sys

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from erasekit.cli import main
from erasekit.methods.context import RunContext
from erasekit.methods.training import TrainingConfig, train
from erasekit.processes import Processes, here
from erasekit.registration import plugins
from erasekit.runs.config import build, to_toml
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import run
from tests.sweeping import FILES, lines_of


def both(task):
    """Do a task in two processes that know of one another, as `accelerate launch --num_processes 2` starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def one(number):
        code = 70
        try:
            os.environ |= {"LOCAL_RANK": str(number), "RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            PartialState._reset_state()
            here.cache_clear()
            assert here() == Processes(number, 2)
            task()
            code = 0
        finally:
            os._exit(code)

    children = [os.fork() or one(number) for number in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


@pytest.fixture(scope="module")
def registries():
    return plugins.load(FILES)


@pytest.fixture(scope="module")
def configured(tiny_folder):
    def config(*overrides, **flags):
        names = {"method": "counted", "backbone": "counted", "task": "words", "concepts": ("cat",)}
        return build({**names, **flags}, overrides=[f"backbone.path={tiny_folder}", "backbone.device=cpu", *overrides])

    return config


@pytest.fixture
def counts(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTS", str(tmp_path / "counts.jsonl"))
    return tmp_path / "counts.jsonl"


def hashes(path):
    return {
        f"{side}/{row['text']}": hashlib.sha256((path / "images" / side / row["file"]).read_bytes()).hexdigest()
        for side in ("base", "erased")
        for row in json.loads((path / "images" / side / "index.json").read_text())
    }


def test_two_processes_come_to_the_weights_and_images_of_one_and_the_first_alone_writes(
    registries, configured, counts, tmp_path
):
    config = configured("method.accumulate=2")
    path = path_of(tmp_path, resolve(config, registries)).relative_to(tmp_path)
    alone = run(config, out=tmp_path / "alone", registries=registries)
    counts.unlink()
    both(lambda: run(config, out=tmp_path / "both", registries=registries))
    one, two = (load_file(tmp_path / name / path / "erasure" / "all.safetensors") for name in ("alone", "both"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)
    together = json.loads((tmp_path / "both" / path / "results.json").read_text())
    assert together["metrics"] == alone.model_dump(mode="json")["metrics"]
    assert hashes(tmp_path / "both" / path) == hashes(tmp_path / "alone" / path)
    lines = lines_of(counts)
    assert len({line["loaded"] for line in lines if "loaded" in line}) == 2
    drawn = {line["pid"] for line in lines if "images" in line}
    assert len(drawn) == 2  # both drew
    events = [json.loads(line)["event"] for line in (tmp_path / "both" / path / "log.jsonl").read_text().splitlines()]
    assert [name for name in events if name.startswith("Run")] == ["RunStarted", "RunFinished"]
    counts.unlink()
    both(lambda: run(config, out=tmp_path / "both", registries=registries))  # it is finished, and both know
    assert not counts.exists()


def test_two_processes_go_on_with_a_run_that_has_its_erasure(registries, configured, counts, tmp_path):
    config = configured("method.steps=2")
    path = path_of(tmp_path, resolve(config, registries))
    result = run(config, out=tmp_path, registries=registries)
    before = hashes(path)
    for file in (*(tmp_path / "cache" / "erased").glob("*/*.png"), path / "results.json"):
        file.unlink()
    counts.unlink()
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    plugged = [word for plugin in FILES for word in ("--plugin", str(plugin))]

    def command():
        with (tmp_path / f"said-{here().index}").open("w") as sys.stdout:
            assert main(["run", "--config", str(file), "--out", str(tmp_path), "--json", *plugged]) == 0

    both(command)
    assert (tmp_path / "said-1").read_text() == ""
    assert json.loads((tmp_path / "said-0").read_text())["config_hash"] == path.name
    assert not [line for line in lines_of(counts) if "erased" in line]
    assert hashes(path) == before
    assert json.loads((path / "results.json").read_text())["metrics"] == result.model_dump(mode="json")["metrics"]
    fewer = configured("method.steps=2", limit=1)
    both(lambda: run(fewer, out=tmp_path, registries=registries))  # the first takes the erasure, and both know
    assert not [line for line in lines_of(counts) if "erased" in line]
    taken = json.loads((path_of(tmp_path, resolve(fewer, registries)) / "results.json").read_text())
    assert taken["erasure_sha256"] == result.erasure_sha256


@pytest.mark.parametrize("clip", [0, 1e-2])
def test_a_step_is_made_of_the_batches_of_all_processes(tmp_path, clip):
    """Equal to one process with both batches, also where only one of them has a gradient for a parameter, or none has."""
    config = TrainingConfig(steps=6, lr=0.1, warmup=0, clip=clip, accumulate=2, checkpoint_every=4)

    def trained(folder):
        parameters = [torch.full((3,), float(i + 1 + here().index)).requires_grad_() for i in range(4)]

        def losses(batch, generator):
            parts = {"own": (parameters[batch % 2] - torch.randn(3, generator=generator)).square().sum()}
            return parts | ({"rare": parameters[2].square().sum()} if batch in (5, 6, 7) else {})

        train(losses, parameters, config, ctx=RunContext(None, (), None, directory=folder), name="toy")
        return torch.stack(parameters).detach()

    whole = trained(tmp_path / "alone")

    def half():
        torch.testing.assert_close(trained(tmp_path / "both"), whole, rtol=1e-6, atol=1e-6)

    both(half)
    one, two = (load_file(tmp_path / name / "checkpoints" / "toy.safetensors") for name in ("alone", "both"))
    assert one.keys() == two.keys()
    assert torch.equal(whole[3], torch.full((3,), 4.0))
