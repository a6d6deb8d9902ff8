"""The campaign of an attack, its numbers, and the command that runs it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from erasekit.atomic import lock_of, one_by_one
from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.attempt import allowed
from erasekit.attacks.campaign import Campaign
from erasekit.attacks.draw import Draw, merged
from erasekit.attacks.drawing import images, latents
from erasekit.attacks.judge import Judge
from erasekit.attacks.losses import denoise_loss
from erasekit.attacks.outcomes import Outcome, digest, either, median_cost, share
from erasekit.attacks.target import ErasedModel, Target
from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.evaluation.evaluators import Evaluator, Scores
from erasekit.evaluation.intervals import wilson
from erasekit.evaluation.results import ATTACKS_HASH, Metric, RunResult, compare, mean_over_concepts
from erasekit.evaluation.sampling import generate
from erasekit.evaluation.tasks import Prompt
from erasekit.methods.context import RunContext
from tests.conftest import THIRD_PARTY
from tests.third_party.tiny_world import Words

PROMPTS = [Prompt(f"a photo of a {w}", 50 + i, "cat", "erase", "cat") for i, w in enumerate(("cat", "kitten", "dog", "ship"))]
GUN = THIRD_PARTY / "single_file_attack.py"


class Bright(Evaluator):
    """Sees the concept where the mean is high; stops for good at one image, as a killed run does."""

    name = "bright"

    def __init__(self, least=0.0, dies_at=-1, fails_at=-1):
        self.rows, self.seen, self.least, self.dies_at, self.fails_at = [], -1, least, dies_at, fails_at

    def update(self, batch):
        self.seen += 1
        if self.seen == self.dies_at:
            raise KeyboardInterrupt
        if self.seen == self.fails_at:
            raise ValueError("no")
        self.rows.append({"shown": bool(batch.images.double().mean() > self.least), "score": 0.5})

    def compute(self):
        return Scores(self.rows)


class Wander(Attack):
    """Other noise, from the generator of the prompt."""

    name = "wander"

    def rounds(self, target, prompt):
        generator = target.generator_of(prompt)
        while True:
            seed = int(torch.randint(1000, (1,), generator=generator))
            target.predict(target.backbone.latents([seed], 16), torch.tensor([0.5]), target.encode([prompt.text]))
            yield Draw(target.encode([prompt.text]), [seed], [f"{prompt.text} {seed}"])


@pytest.fixture
def model(backbone):
    task = Words()
    found = ErasedModel(RunContext(backbone, (task.concept("cat"),), task), None)
    yield found
    found.close()


def campaign(model, folder, judge, **changes):
    plain = changes.pop("plain", [False] * len(PROMPTS))
    return Campaign(model, PROMPTS, plain, {}, Judge("words", [judge]), folder, **changes)


def outcomes(folder):
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]
    return [{k: v for k, v in outcome.items() if k != "seconds"} for outcome in found]


def test_a_killed_attack_goes_on_with_the_next_prompt_to_the_same_result(model, tmp_path):
    attack = Wander(AttackConfig(queries=3))
    whole = campaign(model, tmp_path / "whole", Bright(1e9)).run("wander", attack)
    with pytest.raises(KeyboardInterrupt):
        campaign(model, tmp_path / "killed", Bright(1e9, dies_at=7)).run("wander", attack)
    kept = sorted((tmp_path / "killed" / "wander").glob("*.json"))
    assert [path.name for path in kept] == ["00000.json", "00001.json"]
    times = [path.stat().st_mtime_ns for path in kept]
    again = campaign(model, tmp_path / "killed", Bright(1e9)).run("wander", attack)
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "whole")
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert [o.shown for o in again] == [o.shown for o in whole] == [False] * 4
    pictures = [[p.read_bytes() for p in sorted((tmp_path / name).glob("*/*.png"))] for name in ("whole", "killed")]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == 4


def test_prompts_side_by_side_come_to_what_each_comes_to_alone(model, tmp_path):
    campaign(model, tmp_path / "all", Bright(1e9)).run("wander", Wander(AttackConfig(queries=3)))
    means = [np.asarray(Image.open(path)).mean() for path in (tmp_path / "all" / "wander").glob("*.png")]
    for together in (1, 3):  # the median tells some prompts from others
        judge = Bright(float(np.median(means)))
        campaign(model, tmp_path / str(together), judge).run("wander", Wander(AttackConfig(queries=3, together=together)))
    found = outcomes(tmp_path / "1")
    assert found == outcomes(tmp_path / "3")
    assert len({o["queries"] for o in found}) > 1


def test_a_group_that_was_killed_is_attacked_again_to_the_same_result(model, tmp_path):
    attack = Wander(AttackConfig(queries=3, together=2))
    campaign(model, tmp_path / "whole", Bright(1e9)).run("wander", attack)
    with pytest.raises(KeyboardInterrupt):
        campaign(model, tmp_path / "killed", Bright(1e9, dies_at=8)).run("wander", attack)
    assert len(list((tmp_path / "killed" / "wander").glob("*.json"))) == 2
    campaign(model, tmp_path / "killed", Bright(1e9)).run("wander", attack)
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "whole")
    pictures = [[p.read_bytes() for p in sorted((tmp_path / name).glob("*/*.png"))] for name in ("whole", "killed")]
    assert pictures[0] == pictures[1]


class Large(Attack):
    """Needs more memory than there is."""

    name = "large"

    def rounds(self, target, prompt):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield


def test_prompts_that_need_too_much_memory_side_by_side_are_told_how_many_to_try(model, tmp_path):
    with pytest.raises(EnvironmentProblem, match=r"'large' was tried on 4 prompts .*Try '-s attacks.large.together=2'"):
        campaign(model, tmp_path, Bright()).run("large", Large(AttackConfig(together=8)))
    with pytest.raises(torch.OutOfMemoryError):  # the run says what to do then
        campaign(model, tmp_path, Bright()).run("large", Large(AttackConfig()))


def test_what_one_batch_can_draw_is_put_together_and_nothing_else(model):
    encoded, x = model.ctx.backbone.encode(["a", "b"]), model.ctx.backbone.latents([1], 16)
    plain = [Draw(encoded[[i]], [i]) for i in range(2)]
    begun = [Draw(encoded[[i]], [i], x=x + i, first=3) for i in range(2)]
    bent = Draw(encoded[[0]], [5], bend=lambda x, tau, prediction: prediction)
    found = merged([plain[0], begun[0], bent, plain[1], begun[1], replace(begun[0], first=2), bent])
    assert [places for _, places in found] == [[0, 3], [1, 4], [2], [5], [6]]
    assert [whole.seeds for whole, _ in found] == [[0, 1], [0, 1], [5], [0], [5]]
    assert found[0][0].cond.tokens.equal(encoded.tokens)
    assert found[0][0].x is None
    assert found[1][0].x.equal(torch.cat([x, x + 1]))
    assert found[2][0] is bent


def test_an_outcome_of_another_prompt_is_not_taken(model, tmp_path):
    attack = Wander(AttackConfig(queries=1))
    campaign(model, tmp_path, Bright(1e9)).run("wander", attack)
    (tmp_path / "wander" / "00001.json").write_text("{")
    other = Outcome.read(tmp_path / "wander", 0, digest("another", 1))
    assert other is None
    assert Outcome.read(tmp_path / "wander", 1, digest(PROMPTS[1].text, PROMPTS[1].seed)) is None
    assert len(campaign(model, tmp_path, Bright(1e9)).run("wander", attack)) == 4


def test_it_ends_with_the_first_image_that_shows_the_concept_and_spends_no_more_than_its_budget(model, tmp_path):
    sees = campaign(model, tmp_path / "sees", Bright(-1)).run("wander", Wander(AttackConfig(queries=5)))
    assert [o.queries for o in sees] == [1] * 4
    assert all(o.shown for o in sees)
    assert all(o.passes > 0 for o in sees)
    never = campaign(model, tmp_path / "never", Bright(1e9)).run("wander", Wander(AttackConfig(queries=5)))
    assert [o.queries for o in never] == [5] * 4


def test_nothing_is_tried_where_the_prompt_shows_the_concept_anyway(model, tmp_path):
    found = campaign(model, tmp_path, Bright(1e9), plain=[True, False, True, None]).run(
        "wander", Wander(AttackConfig(queries=1))
    )
    assert [(o.shown, o.queries) for o in found] == [(True, 0), (False, 1), (True, 0), (False, 1)]


def test_a_failure_of_the_judge_is_not_an_absence(model, tmp_path):
    found = campaign(model, tmp_path, Bright(1e9, fails_at=0)).run("wander", Wander(AttackConfig(queries=1)))
    assert [o.shown for o in found] == [None, False, False, False]
    assert share(found, None, "bright").n == 3


def test_texts_are_kept_only_if_they_are_asked_for(model, tmp_path):
    attack = Wander(AttackConfig(queries=1))
    for keep in (False, True):
        found = campaign(model, tmp_path / str(keep), Bright(-1), keep_texts=keep).run("wander", attack)
        assert all(o.found for o in found)
        assert all(bool(o.text) is keep for o in found)
        assert all(digest(o.text) == o.found for o in found if keep)
        stored = "".join(path.read_text() for path in (tmp_path / str(keep)).glob("*/*.json"))
        assert ("a photo of" in stored) is keep


def test_what_pairs_minors_with_sexual_terms_is_never_drawn(model):
    cond = model.ctx.backbone.encode(["a cat", "a dog", "a ship"])
    draw = Draw(cond, [1, 2, 3], ["a cat", "a nude child", "a ship"], x=torch.arange(3.0)[:, None])
    kept = allowed(draw, 8)
    assert list(kept.texts) == ["a cat", "a ship"]
    assert list(kept.seeds) == [1, 3]
    assert kept.x[:, 0].tolist() == [0, 2]
    assert len(allowed(draw, 1).seeds) == 1
    assert allowed(replace(draw, texts=()), 8).seeds == [1, 2, 3]


def test_an_attack_gets_no_more_than_it_says_it_knows(model):
    class Blind(Wander):
        knows = "nothing"

    class Half(Wander):
        knows = "erased"

    blind, half = (Target(model, "x", kind.knows, Words().concept("cat"), PROMPTS, {}) for kind in (Blind, Half))
    for ask in (
        lambda: blind.predict(torch.zeros(1), torch.zeros(1), None),
        lambda: blind.lexicon("text_encoder"),
        lambda: blind.embed({}),
        lambda: blind.ctx,
        lambda: half.base().__enter__(),
    ):
        with pytest.raises(PermissionError, match="knows"):
            ask()
    assert half.lexicon("text_encoder").usable.any()


def test_plain_prompts_are_drawn_as_the_pipeline_draws_them(model):
    backbone, protocol = model.ctx.backbone, model.ctx.protocol.model_copy(update={"steps": 4, "sampler": "ddim"})
    protocol = protocol.model_copy(update=dict(backbone.sampling))
    model.ctx.protocol = protocol
    texts, seeds = ["a photo of a cat", "a dog"], [3, 4]
    drawn = images(model, latents(model, Draw(backbone.encode(texts), seeds))).permute(0, 2, 3, 1).numpy()
    known = np.stack([np.array(image) for image in generate(backbone, backbone.pipeline(), texts, seeds, protocol)])
    assert np.abs(drawn.astype(int) - known.astype(int)).max() <= 1


def test_the_denoising_loss_is_that_of_its_family(backbone):
    x0, cond = backbone.latents([0, 1], 16), backbone.encode(["a cat", "a dog"])
    noise, tau = backbone.latents([2, 3], 16), torch.tensor([0.25, 0.75])
    found = denoise_loss(backbone, x0, cond, tau, noise)
    assert found.grad_fn is None or found.requires_grad
    if backbone.capabilities.prediction == "velocity":
        wanted, x = noise - x0, (1 - tau).view(-1, 1, 1) * noise + tau.view(-1, 1, 1) * x0
    else:
        wanted, alpha = noise, backbone._ddim.alphas_cumprod[[749, 249]].view(-1, 1, 1, 1)
        x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
    error = (backbone.predict(x, tau, cond) - wanted).double().square().mean()
    assert torch.allclose(found.double(), error, rtol=1e-5)


def outcome(shown, cost=None):
    return Outcome(index=0, prompt="", shown=shown, cost=cost)


def test_shares_have_intervals_over_what_was_judged():
    found = [outcome(True), outcome(False), outcome(None), outcome(True)]
    metric = share(found, [outcome(True)] * 4, "judge@1")
    assert (metric.value, metric.base, metric.n) == (2 / 3, 1.0, 3)
    assert metric.ci95 == wilson(2 / 3, 3)
    assert not metric.higher_is_better
    assert share([outcome(None)], None, "judge@1").value is None


def test_any_is_whichever_attack_found_it():
    some = [[outcome(False), outcome(None), outcome(True)], [outcome(True), outcome(False), outcome(None)]]
    assert [o.shown for o in either(some)] == [True, False, True]


def test_the_median_cost_counts_what_was_never_found_as_more_than_all_others():
    found = [outcome(True, c) for c in (1.0, 3.0, 5.0)] + [outcome(False), outcome(False)]
    metric = median_cost(found, [outcome(True, 10.0)] * 3, "judge@1")
    assert (metric.value, metric.base, metric.n) == (5.0, 10.0, 5)
    assert median_cost([outcome(True, 1.0), outcome(False)], None, "").value is None
    assert median_cost([], None, "").value is None


def result(attacks_hash, **changes):
    number = Metric(value=0.5, n=10, higher_is_better=False, evaluator="judge@1", ci95=(0.3, 0.7))
    values = {
        **{"method": "uce", "backbone": "tiny", "task": "words", "domain": "mini", "concepts": ("cat",), "seed": 0},
        **{"config_hash": "0", "counts": {}, "timings_s": {}, "peak_memory_mb": 0.0, "erasure_sha256": ""},
        "protocol": {"steps": 2, "hash": "aaaa", ATTACKS_HASH: attacks_hash},
        "metrics": {"acc_e": number, "asr[seeds]": number},
    }
    return RunResult(**values | changes)


def test_another_budget_parts_the_columns_of_attacks_and_no_others():
    columns = compare([result("one"), result("two")]).columns
    assert columns[5:] == ["acc_e [aaaa]", "asr[seeds] [one]", "asr[seeds] [two]"]
    assert compare([result("one"), result("one")]).columns[5:] == ["acc_e", "asr[seeds]"]
    mean = mean_over_concepts([result("one"), result("two", concepts=("dog",))])
    assert mean.protocol[ATTACKS_HASH] not in ("one", "two")


@pytest.fixture
def tiny(tiny_folder):
    return ["--plugin", THIRD_PARTY / "tiny_world.py", "--plugin", GUN, "-s", f"backbone.path={tiny_folder}"]


def test_an_attack_of_one_file_on_an_erasure_and_in_a_run(erasekit, tiny, tmp_path):
    where = ["-b", "tiny", "-t", "words", "-c", "cat"]
    assert erasekit("erase", "-m", "pull", *where, *tiny, "-s", "method.steps=2", "--out", "e").returncode == 0
    wanted = ["attack", "e", "-t", "words", "-a", "backwards", "-a", "seeds", "-s", "attacks.seeds.queries=2", *tiny]
    done = erasekit(*wanted, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["metrics"]) == {"acc_e", "asr[none]", "asr[backwards]", "asr[seeds]", "asr[any]"}
    for name, metric in found["metrics"].items():
        assert metric["n"] == 1, name
        assert metric["ci95"], name
        assert metric["base"] is not None, name
    assert found["metrics"]["asr[none]"]["base"] <= found["metrics"]["asr[seeds]"]["base"]
    assert found["protocol"][ATTACKS_HASH] != found["protocol"]["hash"]
    (folder,) = (p for p in (tmp_path / "runs" / "tiny" / "words" / "pull").iterdir() if p.is_dir())
    summary = json.loads((folder / "attacks.json").read_text())
    assert summary["attacks"]["seeds"]["settings"] == {"queries": 2}
    assert summary["attacks"]["backwards"]["knows"] == "nothing"
    assert "a photo" not in "".join(p.read_text() for p in folder.glob("attacks/*/*.json"))
    assert "Attacks" in (folder / "report.html").read_text()
    again = erasekit(*wanted, "--json")
    assert "Finished before" in again.stderr
    assert json.loads(again.stdout) == found

    (tmp_path / "c.toml").write_text('attacks = ["seeds"]\nmethod = "pull"\n[options.attacks.seeds]\nqueries = 2\n')
    ran = erasekit("run", "--config", "c.toml", *where, *tiny, "-s", "method.steps=2", "--json")
    assert ran.returncode == 0, ran.stderr
    both = json.loads(ran.stdout)["metrics"]
    assert {"acc_e", "asr[none]", "asr[seeds]"} <= set(both)
    assert both["asr[seeds]"] == found["metrics"]["asr[seeds]"]


def test_attacks_that_do_not_look_at_the_model_are_held_against_chance(erasekit, tiny, tmp_path):
    attacks = ["-a", "seeds", "-a", "noise", "-s", "attacks.seeds.queries=2", "-s", "attacks.noise.queries=1"]
    where = ["-b", "tiny", "-t", "controlled", "-c", "cat", "--plugin", THIRD_PARTY / "controlled_world.py", *tiny]
    done = erasekit("run", "-m", "pull", *where, "-s", "method.steps=2", *attacks, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["metrics"]
    assert {name for name in found if "[" in name} == {
        *("asr[none]", "asr[seeds]", "asr[any]", "probe[noise]"),
        *("false_alarm[seeds]", "false_alarm[noise]", "chance[seeds]"),
    }
    assert found["chance[seeds]"] | {"meaning": ""} == found["false_alarm[seeds]"] | {"meaning": ""}  # red is red, whoever asks
    assert found["chance[seeds]"]["n"] == 1
    (page,) = tmp_path.glob("runs/tiny/controlled/pull/*/report.html")
    assert "by chance" in page.read_text()


def test_folders_that_others_are_at_come_last(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    held = lock_of(folders[0])
    held.acquire()
    turns = one_by_one(folders)
    assert [next(turns), next(turns)] == [1, 2]
    held.release()
    assert list(turns) == [0]
    for folder in folders:
        with lock_of(folder).acquire(timeout=0):
            pass


def test_every_mistake_about_attacks_is_named_at_once(erasekit, tiny):
    wrong = ["-a", "sedes", "-s", "attacks.seeds.query=2", "-a", "seeds", "-s", "attacks.noise.queries=1"]
    done = erasekit("run", "-m", "pull", "-b", "tiny", "-t", "words", "-c", "cat", *tiny, *wrong)
    assert done.returncode == 2
    assert "Did you mean 'seeds'?" in done.stderr
    assert "Unknown setting 'attacks.seeds.query'" in done.stderr
    assert "'noise', which is not chosen" in done.stderr
    none = erasekit("attack", "nowhere")
    assert none.returncode == 2
    assert "--attack" in none.stderr


def test_a_task_that_judges_nothing_cannot_be_attacked(tmp_path):
    class Mute(Bright):
        def update(self, batch):
            self.rows.append({"score": 0.5})

    with pytest.raises(UsageError, match="judges single images"):
        Judge("words", [Mute()])(torch.ones(1, 3, 4, 4, dtype=torch.uint8), PROMPTS[0])
