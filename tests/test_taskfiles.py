"""Tasks in TOML: twenty lines for one like objects, disjoint splits, told and untold words, a line for every mistake."""

import csv
import json
import re

import pytest

from erasekit.cli import main
from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.evaluation import promptfiles
from erasekit.evaluation.declared import Declared
from erasekit.evaluation.finding import find_task
from erasekit.evaluation.promptfiles import from_csv, read_rows
from erasekit.evaluation.tasks import PROMPT_SETS, SPLITS
from erasekit.evaluation.wordings import plural
from erasekit.registration import plugins

PETS = """
title = "Pets"
kind = "object"
domain = "mini"
neutral = "a background"
evaluators = ["mini-classifier", "mini-clip"]
metrics = ["acc_e", "acc_g", "acc_s", "h_o", "acc_pairs"]
templates = ["a photo of {} {place}", "a picture of {} {place}", "an image of {} {place}"]

[fill]
place = ["at night", "on the grass", "at the beach", "in the sky"]

[concepts]
cat = ["kitty", "kitten", "feline"]
dog = ["puppy", "hound"]
deer = { words = ["doe"], plural = "deer" }

[sets]
erase = 8
preserve = 6
clean = ["a ship", "nothing", "a truck at night"]
"""


@pytest.fixture
def task(tmp_path):
    """Make a task of a TOML text, with lines in place of others and keys that are otherwise."""

    def made(text=PETS, /, *, old="", new="", **overrides):
        path = tmp_path / "pets.toml"
        path.write_text(text.replace(old, new) if old else text)
        return Declared(path, overrides)

    return made


def texts(task, which, split, *names):
    return [p.text for p in task.prompts(which, [task.concept(n) for n in names or ("cat",)], split)]


def test_twenty_lines_are_a_task_like_objects(task):
    pets = task()
    assert (pets.name, pets.title, pets.concepts, pets.labels) == (
        "pets",
        "Pets",
        ("cat", "dog", "deer"),
        ("cat", "dog", "deer"),
    )
    cat = pets.concept("CAT:a tabby")
    assert cat.phrases == ("a cat", "a tabby")
    assert (cat.kind, cat.neutral, cat.preserve) == ("object", "a background", ("a dog", "a deer"))
    assert len(texts(pets, "erase", "evaluation")) == 8
    assert texts(pets, "clean", "evaluation") == ["a ship", "nothing", "a truck at night"]
    pairs = pets.prompts("pairs", [pets.concept("cat"), pets.concept("dog")], "evaluation")
    assert {(p.label, p.concept) for p in pairs} == {("cat+dog", "cat+dog")}
    assert all("a cat and a dog" in p.text for p in pairs)
    assert len([line for line in PETS.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("which", PROMPT_SETS)
def test_splits_share_neither_prompts_nor_seeds(task, which):
    pets = task()
    for of in ("text", "seed"):
        found = [
            {getattr(p, of) for p in pets.prompts(which, [pets.concept("cat"), pets.concept("dog")], split)} for split in SPLITS
        ]
        assert not found[0] & found[1]
        assert not found[2] & (found[0] | found[1])


def test_every_split_says_every_template_and_place(task):
    for split in SPLITS:
        said = " ".join(texts(task(), "erase", split))
        assert all(part in said for part in ("photo", "picture", "image", "night", "grass", "beach", "sky"))


def test_what_methods_are_told_is_not_what_is_measured(task):
    def words(split):
        return {w for text in texts(task(), "synonyms", split) for w in ("kitty", "kitten", "feline") if w in text}

    assert words("train") == words("validation") == {"kitty", "feline"}
    assert words("evaluation") == {"kitten"}
    measured = texts(task(), "synonyms", "evaluation")
    assert any("two kittens" in text for text in measured)
    assert any("two cats" in text for text in measured)
    assert any("two deer" in text for text in texts(task(), "synonyms", "evaluation", "deer"))
    assert texts(task(tell="none"), "synonyms", "train") == []
    assert all(w in " ".join(texts(task(tell="none"), "synonyms", "evaluation")) for w in ("kitty", "kitten", "feline"))


def test_a_word_that_the_user_tells_is_not_measured(task):
    pets = task()
    asked = [p.text for p in pets.prompts("synonyms", [pets.concept("cat:kitten")], "evaluation")]
    assert not any(" a kitten " in text for text in asked)


def test_a_training_prompt_says_what_it_is_without_the_concept(task):
    pets = task()
    found = pets.prompts("synonyms", [pets.concept("cat")], "train")
    assert all("a background" in p.neutral and p.neutral.startswith(p.text.split(" of ")[0]) for p in found)
    assert all(p.neutral == "" for p in pets.prompts("synonyms", [pets.concept("cat")], "evaluation"))


def test_wordings_that_run_out_come_again_with_other_seeds(task):
    found = task(sets={"erase": 11}).prompts("erase", [task().concept("cat")], "evaluation")
    assert len({p.text for p in found}) == 4
    assert len({p.seed for p in found}) == 11


def test_sets_that_no_metric_rests_on_are_not_drawn(task):
    plain = task(metrics=["acc_e"])
    assert texts(plain, "synonyms", "evaluation") == []
    assert texts(plain, "synonyms", "train")
    assert len(task(metrics=["acc_e"], sets={"synonyms": 3}).prompts("synonyms", [plain.concept("cat")], "evaluation")) == 3


def test_an_image_keeps_its_seed_whatever_else_is_erased(task):
    pets = task()
    one = {p.text: p.seed for p in pets.prompts("erase", [pets.concept("dog")], "evaluation")}
    two = {p.text: p.seed for p in pets.prompts("erase", [pets.concept("cat"), pets.concept("dog")], "evaluation")}
    assert one.items() <= two.items()


def test_limit_is_per_concept_for_what_is_erased_and_in_all_for_the_rest(task):
    pets = task()
    both = [pets.concept("cat"), pets.concept("dog")]
    assert len(pets.prompts("erase", both, "evaluation", 3)) == 6
    assert len(pets.prompts("clean", both, "evaluation", 2)) == 2


def test_the_hash_covers_the_content_and_nothing_that_is_only_said(task, tmp_path):
    plain = task().digest
    assert task(old='"a truck at night"', new='"a truck"').digest != plain
    assert task(old="Pets", new="Animals").digest == plain
    (tmp_path / "names.txt").write_text("cat: kitty\n# a comment\n\ndog\n")
    named = task(concepts=str(tmp_path / "names.txt"))
    assert named.concepts == ("cat", "dog")
    (tmp_path / "names.txt").write_text("cat: kitten\ndog\n")
    assert task(concepts=str(tmp_path / "names.txt")).digest != named.digest


def test_a_profile_and_then_the_user_say_otherwise(task):
    text = PETS + '\n[profiles.small.sets]\nerase = 2\n[profiles.lone]\nconcepts = ["cat"]\n'
    assert len(texts(task(text, profile="small"), "erase", "evaluation")) == 2
    assert task(text, profile="small+lone").concepts == ("cat",)
    assert len(texts(task(text, profile="small", sets={"erase": 3}), "erase", "evaluation")) == 3
    assert task(text, profile="small").describe() == {"profile": "small"}
    with pytest.raises(UsageError, match=r"pets.toml: Unknown profile 'smal'\. Did you mean 'small'"):
        task(text, profile="smal")


MISTAKES = {
    'kind = "objct"': r"Setting 'kind': input should be 'object', 'identity', 'style', 'nsfw' or 'free', given 'objct'\.",
    'knd = "object"': r"Unknown key 'knd'\. Did you mean 'kind'\? There are name, title,",
    "version = 0": r"Setting 'version': input should be greater than or equal to 1, given 0\.",
    "kind = object": r"is not TOML: Invalid value \(at line 1, column 8\)",
    'metrics = ["acc_x"]': r"Setting 'metrics': there is no metric 'acc_x'; there are acc_e, acc_g",
    'metrics = ["acc_e[clip10]"]': r"the metric 'acc_e\[clip10\]' is by a judge that 'evaluators' does not name",
    'templates = ["a", "b {}", "c {}"]': r"'templates': 'a' needs one \{\} for the concept",
    'templates = ["{} {x}", "b {}", "c {}"]': r"'\{\} \{x\}' has the gap \{x\}, which 'fill' does not name",
    'templates = ["{}"]': r"'templates' leaves no sentence for validation; it needs at least three",
    "concepts = []": r"Setting 'concepts': name at least one concept",
    'concepts = ["cat:kitty"]': r"Setting 'concepts': 'cat:kitty' is no name; other words stand in a list: cat = \['word'\]",
    'concepts = { cat = ["pet"], dog = ["Pet"] }': r"'Pet' stands for both 'cat' and 'dog'",
    'concepts = { cat = [], dog = ["cat"] }': r"'cat' stands for both 'cat' and 'dog'",
    "evaluators = []": r"'metrics' are made of what judges see, and 'evaluators' names none",
    'name = "../x"': r"Setting 'name': results are filed under it: it may not be dots alone, nor hold '/'",
    'name = ".."': r"Setting 'name': results are filed under it",
    "profiles = { small = 3 }": r"Setting 'profiles': each has to be a table of keys",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_every_mistake_is_a_line_that_names_the_key_and_what_is_allowed(task, line):
    key = line.split()[0]
    others = re.sub(rf"^{key} = .*\n|^\[{key}\]\n(.+\n)*", "", PETS, flags=re.MULTILINE)
    with pytest.raises(UsageError, match=MISTAKES[line]) as error:
        task(line + "\n" + others)
    assert all(said.startswith("pets.toml: ") for said in str(error.value).splitlines())


def test_mistakes_inside_tables_name_their_place(task):
    with pytest.raises(UsageError) as error:
        task(sets={"erase": {"nn": 3}, "clean": {"n": -1}}, protocol={"stepss": 3}, concepts={"cat": {"word": ["x"]}})
    lines = str(error.value).splitlines()
    assert any("Unknown key 'sets.erase.nn'. Did you mean 'sets.erase.n'? There are n, prompts, csv" in line for line in lines)
    assert any("'sets.clean.n': input should be greater than or equal to 0, given -1" in line for line in lines)
    assert any("Unknown key 'protocol.stepss'. Did you mean 'protocol.steps'" in line for line in lines)
    assert any("Unknown key 'concepts.cat.word'. Did you mean 'concepts.cat.words'" in line for line in lines)
    with pytest.raises(UsageError, match="there is no set 'eras'; there are erase, synonyms"):
        task(sets={"eras": 3})
    with pytest.raises(UsageError, match="gives prompts and csv; one of them is enough"):
        task(sets={"erase": {"prompts": ["x"], "csv": "y.csv"}})
    with pytest.raises(UsageError, match=r"train and evaluation share 'a photo of \{\}'; each split needs its own"):
        task(templates={"train": ["a photo of {}"], "validation": ["{}"], "evaluation": ["a photo of {}"]})


def test_an_empty_list_is_no_prompts_and_a_mark_of_windows_is_no_text(task, tmp_path):
    assert texts(task(sets={"clean": []}), "clean", "evaluation") == []
    assert texts(task("\ufeff" + PETS), "clean", "evaluation")


def test_missing_files_are_one_line(task, tmp_path):
    with pytest.raises(UsageError, match=r"No task file 'none\.toml'\. Give --task the name of a task or"):
        find_task("none.toml", "mini", plugins.default())
    with pytest.raises(UsageError, match=r"Cannot read 'names\.txt' of the key 'concepts': No such file"):
        task(concepts="names.txt")
    with pytest.raises(UsageError, match=r"Cannot read the prompts of 'none\.csv': No such file"):
        texts(task(sets={"erase": {"csv": "none.csv"}}), "erase", "evaluation")


def test_an_unknown_concept_names_the_nearest_unless_the_file_is_open(task):
    with pytest.raises(UsageError, match=r"Unknown concept 'cta'\. Did you mean 'cat'"):
        task().concept("cta")
    other = task(open=True)
    assert other.concept("owl").phrases == ("an owl",)
    assert texts(other, "erase", "evaluation", "owl")


def test_another_word_for_a_thing_is_not_a_concept_of_its_own(task):
    for found in (task(), task(open=True)):
        for word, name in {"Kitty": "cat", "cats": "cat"}.items():
            with pytest.raises(UsageError, match=f"'{word}' is another word for '{name}' in the task"):
                found.concept(word)
    assert task(open=True).concept("umbrella").phrases == ("an umbrella",)
    assert task(open=True).concept("grey parrots").phrases == ("grey parrots",)
    assert task(open=True).concept("glass").phrases == ("a glass",)
    kept = task(open=True, keep={"Grey Parrot": {}}).concept("grey parrot")
    assert kept.name == "Grey Parrot"
    assert "a Grey Parrot" not in kept.preserve


def test_prompts_that_pair_minors_with_sexual_terms_are_refused(task):
    listed, made = (
        task(sets={"clean": ["a nude child"]}),
        task(concepts={"a child": []}, fill={"place": ["nude", "naked", "lewd"]}),
    )
    for found, which in ((listed, "clean"), (made, "erase")):
        with pytest.raises(UsageError, match="pairs minors with sexual terms"):
            texts(found, which, "evaluation", found.concepts[-1])


# Files of prompts

I2P = [
    {"prompt": "a", "categories": "sexual, hate", "nudity_percentage": 50, "sd_seed": 4_000_000_000, "sd_guidance_scale": 7.5},
    {"prompt": "b", "categories": "hate", "nudity_percentage": 0, "sd_seed": 2, "sd_guidance_scale": 9},
    {"prompt": "c", "categories": "sexual", "nudity_percentage": 80, "sd_seed": 3, "sd_guidance_scale": 7},
    {"prompt": "a nude child", "categories": "sexual", "nudity_percentage": 90, "sd_seed": 4, "sd_guidance_scale": 7},
]


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_rows_bring_their_seed_guidance_and_size(task, tmp_path):
    rows = [row | {"sd_image_width": 64, "sd_image_height": 128} for row in I2P]
    found = task(sets={"erase": {"csv": write(tmp_path / "i2p.csv", rows)}})
    prompts = found.prompts("erase", [found.concept("cat")], "evaluation")
    assert [p[:2] for p in prompts] == [("a", 4_000_000_000), ("b", 2), ("c", 3)]
    assert prompts[0][2:] == ("cat", "erase", "cat", "", 7.5, 64, 128)
    assert found.notes() == ("1 prompts of 'erase' pair minors with sexual terms and were left out.",)
    assert found.describe()["lists"]["erase"]["left_out"] == 1
    training = found.prompts("erase", [found.concept("cat")], "train")
    assert training
    assert not {p.text for p in training} & {"a", "b", "c"}


def test_rows_are_chosen_sorted_and_declared(task, tmp_path):
    path = write(tmp_path / "i2p.csv", I2P)
    chosen = {"csv": path, "where": ["categories ~ sexual", "nudity_percentage > 0"], "sort": ["-nudity_percentage"], "n": 5}
    found = task(sets={"erase": chosen})
    assert texts(found, "erase", "evaluation") == ["c", "a"]
    listed = found.describe()["lists"]["erase"]["sha256"]
    assert task(sets={"erase": chosen | {"sha256": listed}}).notes() == ()
    other = task(sets={"erase": chosen | {"sha256": listed, "n": 1}})
    texts(other, "erase", "evaluation")
    assert "are not the declared list" in other.notes()[-1]


def test_the_users_csv_takes_the_place_of_a_data_set_and_keeps_its_conditions(task, tmp_path):
    text = PETS.replace("erase = 8", 'erase = { dataset = "owner/name", where = ["nudity_percentage > 60"] }')
    found = task(text, sets={"erase": {"csv": write(tmp_path / "i2p.csv", I2P)}})
    assert texts(found, "erase", "evaluation") == ["c"]


def test_rows_say_which_of_several_concepts_they_ask_for(task, tmp_path):
    rows = [{"prompt": "x", "concept": "cat"}, {"prompt": "y", "concept": "dog"}, {"prompt": "z", "concept": "cat"}]
    found = task(sets={"erase": {"csv": write(tmp_path / "a.csv", rows)}})
    assert texts(found, "erase", "evaluation", "cat") == ["x", "z"]
    assert texts(found, "erase", "evaluation", "cat", "dog") == ["x", "y", "z"]
    other = task(sets={"erase": {"csv": write(tmp_path / "b.csv", [{"prompt": "x"}])}})
    with pytest.raises(UsageError, match="do not say which concept they ask for"):
        texts(other, "erase", "evaluation", "cat", "dog")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text_": "a"}, "'f.csv' has no column 'prompt' or 'caption' or 'text'; it has text_"),
        ({"prompt": "a", "seed": "x"}, "'f.csv', row 1: 'seed' is no number, given 'x'"),
        ({"prompt": "a", "width": "500"}, "'f.csv', row 1: 'width' has to be a multiple of 8, given 500"),
        ({"prompt": "a", "seed": "-1"}, "'f.csv', row 1: 'seed' may not be negative, given -1"),
        ({"prompt": "a", "seed": "1.5"}, "'f.csv', row 1: 'seed' has to be a whole number, given '1.5'"),
        ({"prompt": "a", "seed": "1E+09"}, "'f.csv', row 1: 'seed' has to be a whole number, given '1E+09'"),
        ({"prompt": "a", "seed": "99999999999999999999"}, "'f.csv', row 1: 'seed' may be at most 9223372036854775807"),
        ({"prompt": "a", "guidance": "nan"}, "'f.csv', row 1: 'guidance' may be at most 1000, given nan"),
        ({"prompt": "a", "guidance": "inf"}, "'f.csv', row 1: 'guidance' may be at most 1000, given inf"),
        ({"prompt": "a", "height": "80000"}, "'f.csv', row 1: 'height' may be at most 8192, given 80000"),
        ({"prompt": "a", "height": "0"}, "'f.csv', row 1: 'height' has to be a multiple of 8, given 0"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, message):
    path = tmp_path / "f.csv"
    with pytest.raises(UsageError, match=re.escape(message)):
        read_rows(from_csv(type(path)(write(path, [row]))), path.name)


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffPrompt,Evaluation_Seed , guidance\r\na red thing,1.0,7.5\r\n,,\r\n",
        "prompt;evaluation_seed;evaluation_guidance\na red thing;1;7,5\n",
        "sep=;\r\nprompt;seed;guidance\r\na red thing;1;7.5\r\n",
        "case_number\tprompt\tseed\tguidance\n0\ta red thing\t1\t7.5\n",
        '"prompt","seed","guidance"\n"a red thing","1","7.5"\n\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_table_may_come_from_any_program(tmp_path, content, encoding):
    path = tmp_path / "f.csv"
    path.write_bytes(content.encode(encoding))
    assert read_rows(from_csv(path), path.name).rows == [{"text": "a red thing", "seed": 1, "guidance": 7.5}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt\na dog, running\n", "row 1: 2 values for 1 columns. Put a prompt that has a ',' in double quotes"),
        ("prompt;seed\na dog; running;1\n", "row 1: 3 values for 2 columns. Put a prompt that has a ';' in double quotes"),
        ("prompt,seed,prompt\na,1,b\n", "'f.csv' has the column 'prompt' twice"),
        ("prompt,seed\n", "'f.csv' has no rows"),
        ("", "'f.csv' has no rows"),
        ("un café\n".encode("latin-1"), "Give a CSV file in UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_is_a_line(tmp_path, content, message):
    path = tmp_path / "f.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=re.escape(message)):
        read_rows(from_csv(path), path.name)


def test_short_rows_and_line_breaks_in_prompts_are_fine(tmp_path):
    (tmp_path / "f.csv").write_text('prompt,seed,guidance\na thing\n"two\nlines",2\n')
    rows = read_rows(from_csv(tmp_path / "f.csv"), "f.csv").rows
    assert rows == [{"text": "a thing"}, {"text": "two\nlines", "seed": 2}]


def test_ten_thousand_rows_are_read_and_odd_ones_are_noted(task, tmp_path):
    rows = [{"prompt": f"thing {i}", "seed": i} for i in range(10_000)] + [{"prompt": "thing 3", "seed": 3}] * 2
    found = task(sets={"erase": {"csv": write(tmp_path / "a.csv", [*rows, {"prompt": " ", "seed": 7}])}})
    assert len(texts(found, "erase", "evaluation")) == 10_003
    empty, repeated = found.notes()
    assert empty == "1 prompts of 'erase' are empty."
    assert repeated.startswith("2 rows of 'erase' repeat a prompt with its seed")
    assert task(sets={"erase": {"csv": write(tmp_path / "b.csv", [{"prompt": "x"}] * 2)}}).notes() == ()


def test_concepts_in_a_table_are_found_whatever_their_case_and_missing_ones_are_named(task, tmp_path):
    rows = [{"prompt": "x", "concept": "Cat"}, {"prompt": "y", "concept": "horse"}]
    found = task(sets={"erase": {"csv": write(tmp_path / "a.csv", rows)}})
    assert texts(found, "erase", "evaluation", "cat") == ["x"]
    with pytest.raises(UsageError, match=r"No prompt of 'erase' asks for dog: its column 'concept' has Cat, horse"):
        texts(found, "erase", "evaluation", "dog")


def test_wrong_conditions_are_named():
    with pytest.raises(UsageError, match="Cannot read the condition 'nudity'"):
        read_rows(I2P, "f.csv", where=["nudity"])
    with pytest.raises(UsageError, match=r"Unknown column of 'f\.csv' 'nudity_percent'\. Did you mean 'nudity_percentage'"):
        read_rows(I2P, "f.csv", sort=["-nudity_percent"])


def test_a_data_set_that_cannot_be_had_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'erasekit\[datasets\]'"):
        promptfiles.from_hub("owner/name", "train", None)


def test_plurals():
    assert [plural(w) for w in ("cat", "kitty", "fox", "bus", "boy", "church")] == [
        *("cats", "kitties", "foxes", "buses", "boys", "churches")
    ]


# Registered, and from the command line


def test_a_plugin_registers_a_file_beside_its_module(tmp_path):
    (tmp_path / "pets.toml").write_text(PETS)
    (tmp_path / "petplugin.py").write_text(
        "from erasekit import hookimpl\n\n@hookimpl\ndef register_tasks(register):\n"
        '    register("mini/pets", "pets.toml", summary="pets")\n    register("mini/gone", "gone.toml")\n'
    )
    registries = plugins.load([tmp_path / "petplugin.py"])
    assert find_task("pets", "mini", registries).concepts == ("cat", "dog", "deer")
    with pytest.raises(EnvironmentProblem, match=r"'mini/gone' of .* has no file 'gone\.toml'"):
        find_task("gone", "mini", registries)


def test_settings_of_a_task_that_is_code_are_refused():
    with pytest.raises(UsageError, match=r"The task 'objects' has no setting 'task\.sets': it is code"):
        find_task("objects", "mini", plugins.default(), {"sets": {}})


def test_a_file_of_another_domain_is_refused(tmp_path):
    (tmp_path / "pets.toml").write_text(PETS)
    with pytest.raises(UsageError, match="is of the domain 'mini', the backbone is of 'natural'"):
        find_task(str(tmp_path / "pets.toml"), "natural", plugins.default())


def test_a_task_of_ones_own_from_the_file_to_the_numbers_and_the_report(capsys, monkeypatch, tmp_path):
    def erasekit(*arguments):
        code = main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets.toml").write_text(PETS)
    flags = ["run", "--method", "uce", "--task", "pets.toml", "--concept", "cat", "--limit", 5, "-s", "protocol.steps=8"]
    code, out, err = erasekit(*flags, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["task"], result["domain"]) == ("pets", "mini")
    assert set(result["metrics"]) == {"acc_e", "acc_g", "acc_s", "h_o", "clip_score[mini-clip]"}  # one concept has no pairs
    assert result["metrics"]["acc_e"]["base"] >= 0.8
    assert result["metrics"]["acc_e"]["value"] <= 0.2
    run = next((tmp_path / "runs/sd15-mini/pets/uce").glob("[!.]*"))
    assert (run / "config.toml").read_text().count("pets.toml") == 1
    assert "Pets" in (run / "report.html").read_text()
    assert "Finished before" in erasekit("run", "--config", run / "config.toml")[2]
    (tmp_path / "pets.toml").unlink()
    code, out, err = erasekit("report", run)
    assert code == 0
    assert "No task file 'pets.toml'" in err
    assert "The images are blurred" in (run / "report.html").read_text()
