"""The checks that authors call find what they are for, and say it in a line that names it."""

import re
import sys
import textwrap

import pytest

from erasekit.errors import ErasekitError, UsageError
from erasekit.registration import plugins
from erasekit.registration.registry import Entry
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit.testing import check_attack, check_backbone, check_evaluator, check_method, check_task, tiny_folder
from erasekit.testing.worlds import with_world
from tests.conftest import THIRD_PARTY

HEAD = """
from dataclasses import replace
import torch
from pydantic import Field
from erasekit import Attack, Evaluator, Method, MethodConfig, Prompt, Task, hookimpl
from erasekit.erasures.deltas import LowRank
from erasekit.evaluation.evaluators import Scores
from erasekit.evaluation.results import Metric
from erasekit.testing.tiny import TinySD
from erasekit.testing.world import Pull, PullConfig, Red, Words

SITE = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"

class Plain(PullConfig):
    steps: int = Field(2, description="few")
"""


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Writes a plugin file whose class `Given` derives from one that is right, with a body of its own."""

    def write(kind: str, base: str, body: str, name: str = "given") -> dict:
        hook = f"@hookimpl\ndef register_{kind}(register):\n    register('{name}', Given)\n"
        file = tmp_path / "given_plugin.py"
        file.write_text(f"{HEAD}\n\nclass Given({base}):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n\n\n{hook}")
        monkeypatch.delitem(sys.modules, "given_plugin", raising=False)
        return {"plugin": file}

    yield write
    sys.modules.pop("given_plugin", None)


NAMED = "name = 'given'\n"
METHODS = {
    "nothing returned": ("def erase(self, ctx): pass", "Method 'given' returns NoneType from 'erase', not an Erasure"),
    "None for deltas": ("def erase(self, ctx): return self.erasure(ctx, deltas=None)", "Method 'given': deltas is None"),
    "no part": (
        "def erase(self, ctx): return self.erasure(ctx, deltas={'cat': {SITE: LowRank(torch.ones(16, 1), torch.ones(1, 16))}})",
        f"'cat'/'{'mid_block.attentions.0.transformer_blocks.0.attn2.to_k'}' is a LowRank",
    ),
    "wrong shape": (
        "def erase(self, ctx):\n"
        "    return self.erasure(ctx, deltas={'cat': {'a': {SITE: LowRank(torch.ones(3, 1), torch.ones(1, 16))}}})",
        "attn2.to_k' in 'cat'/'a' is (3, 16), the layer (out, in) = (16, ",
    ),
    "unknown layer": (
        "def erase(self, ctx):\n"
        "    return self.erasure(ctx, deltas={'cat': {'a': {SITE + 'x': LowRank(torch.ones(3, 1), torch.ones(1, 3))}}})",
        "'tiny' has no such linear layer. Did you mean 'mid_block.attentions.0.transformer_blocks.0.attn2.to_k'",
    ),
    "setting without a description": (
        "class Config(PullConfig):\n    strength: float = 1.0",
        "'given': the setting 'strength' has no description. Write Field(..., description='...').",
    ),
    "preset of a setting that there is not": ("presets = {'short': {'stps': 2}}", "'given', presets['short']: 'stps' is wrong"),
    "slot that is no setting": ("slots = ('refine',)", "'given': the slot 'refine' is no setting of its Config."),
    "needs what no backbone has": (
        "requires = frozenset({'telepathy'})",
        "'given' requires telepathy, which none of tiny has.",
    ),
    "changes the base": (
        "def erase(self, ctx):\n"
        "    with torch.no_grad(): ctx.backbone.denoiser.get_submodule(SITE).weight.add_(1)\n"
        "    return super().erase(ctx)",
        "it changed 'mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight' of the denoiser",
    ),
    "random without a seed": (
        "drawn = 0\n"
        "def erase(self, ctx):\n"
        "    Given.drawn += 1\n"
        "    columns = ctx.backbone.weight(SITE).shape[1]\n"
        "    deltas = {SITE: LowRank(torch.full((16, 1), float(self.drawn)), torch.ones(1, columns))}\n"
        "    return self.erasure(ctx, deltas={'cat': {'a': deltas}})",
        "the same settings and seed gave another file",
    ),
    "changes nothing": (
        "def erase(self, ctx):\n"
        "    deltas = {SITE: LowRank(torch.zeros(16, 1), torch.zeros(1, ctx.backbone.weight(SITE).shape[1]))}\n"
        "    return self.erasure(ctx, deltas={'cat': {'a': deltas}})",
        "the erasure changes nothing of",
    ),
    "encodes late": (
        "def erase(self, ctx):\n"
        "    ctx.backbone.denoiser, ctx.backbone.encode(['an unknown prompt'])\n"
        "    return super().erase(ctx)",
        "an unknown prompt",
    ),
}


@pytest.mark.parametrize("wrong", METHODS)
def test_methods(given, wrong):
    body, line = METHODS[wrong]
    with pytest.raises((AssertionError, ErasekitError), match=re.escape(line)) as raised:
        check_method(
            "given",
            settings={"steps": 1},
            backbones=["tiny"],
            concepts=["cat"],
            **given("methods", "Pull", NAMED + "Config = Plain\n" + body),
        )
    assert "\n" not in str(raised.value)


BACKBONES = {
    "other noise": (
        "def latents(self, seeds, size=None): return 2 * super().latents(seeds, size)",
        "away from the pipeline's latents",
    ),
    "time turned round": (
        "def add_noise(self, x0, noise, tau): return super().add_noise(x0, noise, 1 - tau)",
        "add_noise at tau 0.02 is nearer to the image. Turn tau round.",
    ),
    "site that is no layer": (
        "def text_sites(self): return [replace(site, name=site.name + 'x') for site in super().text_sites()]",
        "to_kx' is no layer of the denoiser",
    ),
    "half the sites": ("def text_sites(self): return super().text_sites()[:1]", "text enters elsewhere too"),
    "phrase to the end token": (
        "def spans(self, prompt, phrase): return [range(s.start, 99) for s in super().spans(prompt, phrase)]",
        "spans() counts a phrase to the end token or the pads",
    ),
}


@pytest.mark.parametrize("wrong", BACKBONES)
def test_backbones(given, wrong):
    body, line = BACKBONES[wrong]
    settings = {"path": str(tiny_folder("tiny"))}
    with pytest.raises(AssertionError, match=re.escape(line)):
        check_backbone("given", settings=settings, size=16, **given("backbones", "TinySD", NAMED + body))


TASKS = {
    "missing set": (
        "def prompts(self, which, concepts, split, limit=None):\n"
        "    return [] if which == 'erase' else super().prompts(which, concepts, split, limit)",
        "there are no prompts in the set 'erase' of the evaluation split",
    ),
    "raises for a set": (
        "def prompts(self, which, concepts, split, limit=None):\n"
        "    return {'erase': super().prompts(which, concepts, split, limit)}[which]",
        "fails in prompts('synonyms', ..., 'train'): KeyError: 'synonyms'. It is asked for prompts(which, ",
    ),
    "one seed for all splits": (
        "def prompts(self, which, concepts, split, limit=None):\n"
        "    return [p._replace(seed=0) for p in super().prompts(which, concepts, split, limit)]",
        "seed 0 is in 'train' and in 'validation'. Splits share no seeds.",
    ),
    "no evaluator of that name": ("evaluators = ('rde',)", "Unknown evaluator 'rde'. Did you mean 'red'?"),
    "unknown concept": (
        "def concept(self, text): return {'cat': super().concept('cat')}[text]",
        "concept('no such thing') raises KeyError('no such thing')",
    ),
    "metric of a missing score": (
        "def aggregate(self, rows, concepts): return {'acc_e': rows['base'][0]['green']}",
        "The task 'given' fails in 'aggregate': KeyError: 'green'. Its rows have index, prompt",
    ),
    "metric that is a number": (
        "def aggregate(self, rows, concepts): return {'acc_e': 1.0}",
        "'acc_e' is no erasekit.evaluation.results.Metric",
    ),
    "unknown metric": ("metrics = ('acc_x',)", "acc_x"),
}


@pytest.mark.parametrize("wrong", TASKS)
def test_tasks(given, wrong):
    body, line = TASKS[wrong]
    with pytest.raises((AssertionError, ErasekitError), match=re.escape(line)):
        check_task("mini/given", concepts=["cat"], **given("tasks", "Words", NAMED + body, "mini/given"))


EVALUATORS = {
    "a row too few": ("def compute(self): return Scores(self.rows[1:])", "compute() gives 5 rows for 6 images"),
    "depends on the batch": (
        "def update(self, batch): self.rows += [{'red': float(len(batch.images))} for _ in batch.images]",
        "an image's scores depend on its batch",
    ),
    "no sha256": ("def describe(self): return {'model': 'mine', 'version': '1'}", "describe() does not say 'sha256' as text"),
    "changes the images": (
        "def update(self, batch):\n    super().update(batch)\n    batch.images.zero_()",
        "update() changes the images that it is given",
    ),
    "name that is taken": (
        "def compute(self): return Scores([{'label': 'x'} for _ in self.rows])",
        "a score is called 'label', which a row has already. Rename it.",
    ),
    "metric without a meaning": (
        "def compute(self):\n"
        "    return Scores(self.rows, {'redness': Metric(value=1, n=1, higher_is_better=True, evaluator='given')})",
        "nothing says what 'redness' means. Put it into `meanings`.",
    ),
    "half taken": (
        "def update(self, batch):\n    self.rows += [{}] * len(batch.images)\n    batch.images.float().max()",
        "after an image that it could not judge it gives 4 rows for 3 images taken",
    ),
}


@pytest.mark.parametrize("wrong", EVALUATORS)
def test_evaluators(given, wrong):
    body, line = EVALUATORS[wrong]
    with pytest.raises(AssertionError, match=re.escape(line)):
        check_evaluator("given", **given("evaluators", "Red", NAMED + body))


ATTACKS = {
    "no budget kept": ("", "it draws no image"),
    "unnamed text": (
        "def rounds(self, target, prompt): yield target.draw(['an unknown text'], [0])",
        "it encodes 'an unknown text', which its `texts` does not name.",
    ),
    "knows too much": ("knows = 'everything'", "it knows 'everything', which is none of"),
}


@pytest.mark.parametrize("wrong", ATTACKS)
def test_attacks(given, wrong):
    body, line = ATTACKS[wrong]
    body = (
        NAMED + ("" if "knows" in body else "knows = 'nothing'\n") + (body or "def rounds(self, target, prompt): yield from ()")
    )
    with pytest.raises(AssertionError, match=re.escape(line)):
        check_attack("given", backbones=["tiny"], **given("attacks", "Attack", body))


WRONG = {
    "method of no base": (
        "methods",
        "object",
        NAMED,
        "The method 'given' is 'Given', which does not derive from erasekit.Method",
    ),
    "method without erase": ("methods", "Method", NAMED, "The method 'given' is 'Given', which has no 'erase'. Write it"),
    "settings of no base": (
        "methods",
        "Pull",
        NAMED + "class Config: pass",
        "has settings that do not derive from MethodConfig",
    ),
    "evaluator of no base": ("evaluators", "object", NAMED, "which does not derive from erasekit.Evaluator"),
    "evaluator without update": (
        "evaluators",
        "Evaluator",
        NAMED + "describe = compute = len",
        "'Given', which has no 'update'",
    ),
    "attack without rounds": ("attacks", "Attack", NAMED, "The attack 'given' is 'Given', which has no 'rounds'"),
    "task of no base": ("tasks", "object", NAMED + "domain = 'mini'", "which does not derive from erasekit.Task"),
    "task without prompts": ("tasks", "Task", NAMED + "domain = 'mini'\nconcept = len", "'Given', which has no 'prompts'"),
    "text for evaluators": (
        "tasks",
        "Words",
        NAMED + "evaluators = 'red'",
        "the evaluators 'red', one text. Give a tuple: ('red',)",
    ),
    "dictionary for a protocol": (
        "tasks",
        "Words",
        NAMED + "protocol = {}",
        "a protocol that is a dict. Give an erasekit.Protocol",
    ),
    "text for a concept": (
        "tasks",
        "Words",
        NAMED + "def concept(self, text): return text",
        "The task 'given' returns str from 'concept', not an erasekit.Concept.",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_run_says_what_a_class_lacks_before_anything_is_loaded(given, wrong):
    kind, base, body, line = WRONG[wrong]
    registries = with_world(given(kind, base, body, "mini/given" if kind == "tasks" else "given")["plugin"])
    flags = {"method": "pull", "backbone": "tiny", "task": "words", "concepts": ("cat",)}
    if kind == "evaluators":
        judged = type("Judged", (registries.tasks.get("words", "mini"),), {"name": "judged", "evaluators": ("given",)})
        registries.tasks.add(Entry("mini/judged", judged, "test", "here"))
        flags["task"] = "judged"
    else:
        flags |= {"attacks": ("given",)} if kind == "attacks" else {kind.removesuffix("s"): "given"}
    with pytest.raises(UsageError, match=re.escape(line)) as raised:
        resolve(build(flags), registries)
    assert "\n" not in str(raised.value)


def test_a_plugin_that_is_broken_says_how(given, tmp_path):
    file = given("methods", "Pull", "pass")["plugin"]
    (info,) = plugins.load([file]).broken()
    assert info.error.endswith("is 'Given', which has the name 'pull'. Give both one name")
    file.write_text(file.read_text().replace("register_methods", "register_method"))
    sys.modules.pop("given_plugin", None)
    (info,) = plugins.load([file]).broken()
    assert info.error == "there is no hook 'register_method'. Did you mean 'register_methods'?"


def test_a_name_that_the_class_does_not_have_and_a_file_that_does_not_import(given, tmp_path):
    for check in (check_method, check_backbone, check_evaluator, check_attack):
        with pytest.raises(AssertionError, match="raises_on_import"):
            check("given", plugin=THIRD_PARTY / "raises_on_import.py")
    with pytest.raises(AssertionError, match=r"has the name 'given'\. Give both one name"):
        check_method("other", **given("methods", "Pull", NAMED, "other"))


def test_there_is_a_folder_for_each_family_and_no_other():
    names = ("tiny", "tiny-flux", "tiny-xl", "tiny-sd3", "tiny-flux2", "tiny-flux2-base")
    assert all((tiny_folder(name) / "model_index.json").is_file() for name in names)
    with pytest.raises(AssertionError, match="no tiny model 'tiny-dalle'"):
        tiny_folder("tiny-dalle")
