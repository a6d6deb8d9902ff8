"""The task for any concept: its prompts, and the hub's models from the command line to the report."""

import json

import pytest

from erasekit.errors import UsageError
from erasekit.evaluation.free import Free
from erasekit.evaluation.tasks import PROMPT_SETS, SPLITS
from erasekit.testing import tiny, tiny_flux

TASK = Free()
DOG, MAN = (TASK.concept(text) for text in ("a dog:a puppy", "a man"))


def prompts(which, split, *concepts, limit=None):
    return TASK.prompts(which, concepts, split, limit)


@pytest.mark.parametrize("which", PROMPT_SETS)
def test_splits_share_neither_prompts_nor_seeds(which):
    found = [prompts(which, split, DOG, MAN) for split in SPLITS]
    for of in ("text", "seed"):
        values = [getattr(p, of) for split in found for p in split]
        assert len(set(values)) == len(values)


def test_no_set_but_one_is_empty_and_captions_are_for_training():
    for which in PROMPT_SETS:
        sizes = [len(prompts(which, split, DOG, MAN)) for split in SPLITS]
        assert all(sizes) == (which not in ("synonyms", "captions"))
        assert bool(sizes[0]) == (which != "synonyms")


def test_no_trained_template_is_an_evaluation_prompt():
    evaluated = {p.text for p in prompts("erase", "evaluation", DOG)}
    assert evaluated.isdisjoint(DOG.prompts())


def test_every_phrase_has_its_turn_and_says_whose_it_is():
    found = prompts("erase", "evaluation", DOG, MAN)
    assert {p.concept for p in found} == {"a dog", "a man"}
    assert any("a puppy" in p.text for p in found)
    assert all(("a man" in p.text) == (p.concept == "a man") for p in found)


def test_things_that_share_a_word_with_the_concept_are_not_kept():
    texts = [p.text for which in ("preserve", "clean", "captions") for p in prompts(which, "train", DOG, MAN)]
    assert not any("a man" in text.replace("a woman", "") for text in texts)
    assert any("a woman" in text for text in texts)


def test_what_of_its_kind_stays_is_for_the_user_to_name():
    assert DOG.preserve == ()
    named = DOG.model_copy(update={"preserve": ("a wolf",)})
    assert any("a wolf" in p.text for p in prompts("preserve", "train", named))
    soup = TASK.concept("a bowl of soup")  # articles and "of" are no words to share
    kept = [p.text for p in prompts("preserve", "train", soup)]
    assert any("a cup of coffee" in text for text in kept)
    assert not any("a bowl of fruit" in text for text in kept)


def test_limit_is_per_concept_for_what_is_erased_and_in_all_for_the_rest():
    assert len(prompts("erase", "evaluation", DOG, MAN, limit=3)) == 6
    assert len(prompts("preserve", "evaluation", DOG, MAN, limit=3)) == 3


def test_an_unknown_set_is_refused():
    with pytest.raises(UsageError, match="Did you mean 'erase'"):
        prompts("erased", "train", DOG)


# From the command line


def test_a_concept_of_ones_own_runs_on_stable_diffusion_to_the_report(erasekit, tmp_path):
    folder = tiny.save_pipeline(tmp_path / "sd", vae="kl")
    settings = [f"backbone.path={folder}", "backbone.device=cpu", "protocol.size=16", "protocol.steps=2", "method.steps=2"]
    settings += ["method.trajectories=2", "method.clean_trajectories=2", "method.batch=2", "method.rank=2"]
    flags = [part for setting in settings for part in ("-s", setting)]
    done = erasekit("run", "--backbone", "sd15", "--concept", "a cat", "--limit", 2, *flags, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["task"], result["domain"], result["metrics"]) == ("free", "natural", {})
    assert result["counts"] == {"images": 12, "scored": 0, "failed": 0, "no_face": 0}  # two of each set on both sides
    run = next((tmp_path / "runs/sd15/free/trace").glob("[!.]*"))
    page = (run / "report.html").read_text()
    assert all(p.text in page for p in prompts("erase", "evaluation", TASK.concept("a cat"), limit=2))
    assert "Nothing judged the images" in page
    assert "<th>value</th>" not in page
    assert "The images are blurred" not in page
    assert "Nothing has been measured" in (run / "erasure" / "README.md").read_text()
    assert (run / "samples" / "erase.png").is_file()
    assert (run / "erasure" / "all.safetensors").is_file()


def test_a_closed_form_erasure_of_flux_needs_no_task(erasekit, tmp_path):
    folder = tiny_flux.save_pipeline(tmp_path / "flux")
    flags = ["-s", f"backbone.path={folder}", "-s", "backbone.device=cpu", "-s", "protocol.size=16", "-s", "protocol.steps=2"]
    flags += ["--out", "erased"]
    done = erasekit("erase", "--method", "uce", "--backbone", "flux", "--concept", "a cat", *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "erased" / "all.safetensors").is_file()


def test_without_a_concept_one_is_asked_for(erasekit):
    done = erasekit("run", "--backbone", "flux", "--dry-run")
    assert (done.returncode, done.stderr) == (2, "The task 'free' declares no concepts. Name one: --concept 'a cat'.\n")


@pytest.mark.parametrize("text", ["a nude man", "someone:a NAKED_man"])
def test_images_of_sexual_prompts_are_blurred_whatever_the_task(text, erasekit, tmp_path):
    folder = tiny.save_pipeline(tmp_path / "sd", vae="kl")
    flags = ["-s", f"backbone.path={folder}", "-s", "backbone.device=cpu", "-s", "protocol.size=16", "-s", "protocol.steps=2"]
    done = erasekit("run", "--method", "uce", "--backbone", "sd15", "--concept", text, "--limit", 2, *flags)
    assert done.returncode == 0, done.stderr
    assert "Nothing judged the images" in done.stdout
    run = next((tmp_path / "runs/sd15/free/uce").glob("[!.]*"))
    assert "The images are blurred" in (run / "report.html").read_text()
    assert erasekit("report", run, "--reveal").returncode == 0
    assert "The images are blurred" not in (run / "report.html").read_text()
