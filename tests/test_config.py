import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from erasekit.errors import UsageError
from erasekit.evaluation.evaluators import Evaluator, EvaluatorConfig
from erasekit.methods.method import Method, MethodConfig
from erasekit.registration import plugins
from erasekit.registration.plugins import Registries
from erasekit.runs.config import RunConfig, build, parse_overrides, to_toml
from erasekit.runs.ready import judges
from erasekit.runs.resolve import resolve


@pytest.fixture(scope="module")
def registries(world) -> Registries:
    return plugins.load([world])


BASE = {"method": "pull", "backbone": "tiny", "task": "words"}


def plan_of(registries, *, overrides=(), **flags):
    return resolve(build({**BASE, **flags}, overrides=overrides), registries)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("method.refine=whitened", "whitened"),
        ("method.steps=20", 20),
        ("method.lr=1e-3", 1e-3),
        ("method.on=true", True),
        ("method.list=[1, 2]", [1, 2]),
        ('method.text="20"', "20"),
        ("method.equation=a=b", "a=b"),
        ("method.empty=", ""),
        ("method.two=1\nx=2", "1\nx=2"),
        ("method.lines=a\nb", "a\nb"),
        ("method.spaced= 3 ", 3),
    ],
)
def test_an_override_is_a_toml_value_or_text(text, value):
    key = text.partition("=")[0].partition(".")[2]
    assert parse_overrides([text]) == {"method": {key: value}}


@pytest.mark.parametrize(
    ("key", "takes", "refuses"),
    [("seed", (0, 2**32 - 1), (-1, 2**32)), ("limit", (1, 10**6), (0, -1)), ("sample_every", (0, 1), (-1,))],
)
def test_the_ends_of_what_a_number_may_be(key, takes, refuses):
    assert [getattr(build({key: value}), key) for value in takes] == [*takes]
    for value in refuses:
        with pytest.raises(UsageError, match=f"'{key}'"):
            build({key: value})


def test_what_is_left_out_is_the_default_that_the_documentation_says():
    config = build({})
    assert (config.method, config.backbone, config.task, config.preset, config.tracker) == ("trace", "sd15-mini", "", "", "")
    assert (config.seed, config.limit, config.files, config.keep_texts) == (0, None, "float32", False)
    assert (config.concepts, config.preserve, config.attacks, config.kind, config.neutral) == ((), (), (), None, None)
    assert config.sample_every is None
    assert not any(config.options.model_dump().values())


def test_a_configuration_stays_what_it_is_and_has_no_other_keys():
    for part in (build({}), build({}).options):
        with pytest.raises(ValidationError, match="frozen"):
            part.method = "uce"
        with pytest.raises(ValidationError, match="Extra"):
            type(part)(nope=1)


def test_overrides_nest_and_the_last_one_counts():
    texts = ["method.a.b=1", "method.a.c=2", "method.a.b=3", "protocol.steps=4"]
    assert parse_overrides(texts) == {"method": {"a": {"b": 3, "c": 2}}, "protocol": {"steps": 4}}


@pytest.mark.parametrize("text", ["steps=1", "method.steps", "method.=1", ".x=1"])
def test_an_override_without_a_key_is_refused(text):
    with pytest.raises(UsageError, match="Cannot read the setting"):
        parse_overrides([text])


def test_overrides_that_contradict_each_other_are_refused():
    with pytest.raises(UsageError, match="contradicts"):
        parse_overrides(["method.a=1", "method.a.b=2"])


def test_flags_go_over_the_file_and_overrides_over_both(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('seed = 1\nlimit = 2\nconcepts = ["cat"]\n[options.method]\nsteps = 3\nlr = 0.5\n')
    config = build({"seed": 7, "limit": None, "concepts": ()}, file=file, overrides=["method.steps=9"])
    assert (config.seed, config.limit, config.concepts) == (7, 2, ("cat",))
    assert config.options.method == {"steps": 9, "lr": 0.5}


def test_a_broken_file_is_one_line_with_the_place(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("seed = 1\nmethod = = 2\n")
    with pytest.raises(UsageError, match=r"is not TOML: .*line 2") as raised:
        build({}, file=file)
    assert "\n" not in str(raised.value)


def test_unknown_keys_of_a_file_get_a_suggestion(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('metod = "x"\nseed = "a"\n[options.metod]\na = 1\n')
    with pytest.raises(UsageError) as raised:
        build({}, file=file)
    text = str(raised.value)
    assert "Unknown setting 'metod'. Did you mean 'method'?" in text
    assert "Unknown setting 'options.metod'. Did you mean 'options.method'?" in text
    assert "Setting 'seed': input should be a valid integer" in text
    assert len(text.splitlines()) == 3


SCALARS = st.one_of(st.booleans(), st.integers(-(2**40), 2**40), st.floats(-1e9, 1e9), st.text(max_size=20))
LISTS = st.lists(SCALARS, max_size=3)
KEYS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=10)


@settings(max_examples=60, deadline=None)
@given(
    concepts=st.lists(st.text(min_size=1, max_size=10), max_size=3),
    seed=st.integers(0, 2**31),
    options=st.dictionaries(KEYS, st.one_of(SCALARS, LISTS, st.dictionaries(KEYS, SCALARS, max_size=2))),
)
def test_a_written_configuration_reads_back_the_same(concepts, seed, options):
    config = RunConfig(concepts=tuple(concepts), seed=seed, options={"method": options})
    assert RunConfig.model_validate(tomllib.loads(to_toml(config))) == config


def test_all_mistakes_come_at_once(registries):
    overrides = ["method.stps=3", "method.rank=0", "protocol.steps=-1", "backbone.dtype=float8"]
    with pytest.raises(UsageError) as raised:
        plan_of(registries, overrides=overrides, concepts=("cta", "dog", "dog"))
    lines = str(raised.value).splitlines()
    assert len(lines) == 6
    for part in ("'method.stps'. Did you mean 'method.steps'", "'method.rank'", "'protocol.steps'", "'backbone.dtype'"):
        assert sum(part in line for line in lines) == 1
    assert "Unknown concept 'cta'. Did you mean 'cat'?" in str(raised.value)
    assert "'dog' is given twice" in str(raised.value)


def test_wordings_that_may_not_be_drawn_are_refused(registries):
    with pytest.raises(UsageError, match="refuses to draw"):
        plan_of(registries, concepts=("cat:a naked child",))


def test_unknown_names_come_together(registries):
    with pytest.raises(UsageError) as raised:
        plan_of(registries, method="pul", backbone="tinny")
    assert "Did you mean 'pull'?" in str(raised.value)
    assert "Did you mean 'tiny'?" in str(raised.value)


def test_presets_stand_between_defaults_and_overrides(registries):
    assert plan_of(registries).method_config.steps == 12
    assert plan_of(registries, preset="short").method_config.steps == 2
    assert plan_of(registries, preset="short", overrides=["method.steps=5"]).method_config.steps == 5
    with pytest.raises(UsageError, match=r"Unknown preset of 'pull' 'shrt'\. Did you mean 'short'\?"):
        plan_of(registries, preset="shrt")


class Velocity(Method):
    erase = print
    name = "velocity"
    requires = frozenset({"velocity", "unet"})


class PerBackbone(Method):
    erase = print

    class Config(MethodConfig):
        a: int = 0
        b: int = 0

    name = "per-backbone"
    defaults = {"unet": {"a": 1, "b": 1}, "tiny": {"b": 2}, "other": {"a": 9}}


class Slotted(Method):
    erase = print

    class Config(MethodConfig):
        refine: str = "none"
        divergence: tuple[str, ...] = ()

    name = "slotted"
    slots = ("refine", "divergence")


class Strict(Evaluator):
    describe = update = compute = print

    class Config(EvaluatorConfig):
        threshold: float = 0.5
        classes: tuple[str, ...] = ("a", "b")

    name = "strict"


@pytest.fixture
def more(world):
    registries = plugins.load([world])
    from erasekit.registration.registry import Entry

    for method in (Velocity, PerBackbone, Slotted):
        registries.methods.add(Entry(method.name, method, "test", "test"))
    return registries


def test_a_method_says_what_it_needs(more):
    with pytest.raises(UsageError) as raised:
        plan_of(more, method="velocity")
    assert str(raised.value) == "'velocity' needs velocity; 'tiny' predicts epsilon."


def test_defaults_of_the_family_and_of_the_backbone(more):
    config = plan_of(more, method="per-backbone", overrides=["method.a=5"]).method_config
    assert (config.a, config.b) == (5, 2)


def test_settings_that_name_components_are_looked_up(more):
    assert plan_of(more, method="slotted", overrides=['method.divergence=["clip"]']).method_config.divergence == ("clip",)
    with pytest.raises(UsageError) as raised:
        plan_of(more, method="slotted", overrides=["method.refine=whitend", 'method.divergence=["clp"]'])
    assert "Unknown choice for 'refine' 'whitend'. Did you mean 'whitened'?" in str(raised.value)
    assert "Unknown choice for 'divergence' 'clp'. Did you mean 'clip'?" in str(raised.value)


def test_settings_of_evaluators_are_the_tasks_then_the_users_and_name_the_run(more, monkeypatch):
    from erasekit.registration.registry import Entry

    plain = plan_of(more).hash
    more.evaluators.add(Entry("strict", Strict, "test", "test"))
    task = type(plan_of(more).task)
    monkeypatch.setattr(task, "evaluators", ("red", "strict"))
    monkeypatch.setattr(task, "evaluator_settings", {"strict": {"threshold": 0.7}})
    plan, other = plan_of(more), plan_of(more, overrides=["evaluators.strict.threshold=0.9", 'evaluators.strict.classes=["a"]'])
    assert [e.config.model_dump() for e in judges(plan, more)[1:]] == [{"threshold": 0.7, "classes": ("a", "b")}]
    assert judges(other, more)[1].config.model_dump() == {"threshold": 0.9, "classes": ("a",)}
    assert len({plain, plan.hash, other.hash}) == 3
    with pytest.raises(UsageError) as raised:
        plan_of(more, overrides=["evaluators.strict.treshold=1", "evaluators.blue.a=1"])
    assert "Unknown setting 'evaluators.strict.treshold'. Did you mean 'evaluators.strict.threshold'?" in str(raised.value)
    assert "The task 'words' has no evaluator 'blue' to set; it has red, strict." in str(raised.value)


def test_another_version_of_a_method_is_another_run(registries, monkeypatch):
    plan = plan_of(registries, concepts=("cat",))
    before = plan.hash
    monkeypatch.setattr(plan.method, "version", plan.method.version + 1)
    assert plan.hash != before


def test_the_hash_is_of_what_decides_the_result(registries):
    plan = plan_of(registries, concepts=("cat",))
    assert len(plan.hash) == 8
    same = [
        {"concepts": ("cat",), "backbone": "tiny-sd"},
        {"concepts": (" cat ",), "task": "mini/words"},
        {"concepts": ("cat",), "overrides": ["method.steps=12", "protocol.steps=2"]},
    ]
    different = [
        {"concepts": ("dog",)},
        {"concepts": ("cat:kitten",)},
        {"concepts": ("cat", "dog")},
        {},
        {"concepts": ("cat",), "seed": 1},
        {"concepts": ("cat",), "limit": 1},
        {"concepts": ("cat",), "preset": "short"},
        {"concepts": ("cat",), "overrides": ["protocol.steps=3"]},
        {"concepts": ("cat",), "overrides": ["backbone.dtype=bfloat16"]},
    ]
    assert {plan_of(registries, **p).hash for p in same} == {plan.hash}
    hashes = [plan.hash, *(plan_of(registries, **p).hash for p in different)]
    assert len(set(hashes)) == len(hashes)
    assert plan_of(registries, concepts=("cat",), backbone="tiny-sd").config.backbone == "tiny"


def test_without_a_concept_each_is_a_run(registries):
    plan = plan_of(registries)
    assert plan.separate
    singles = plan.singles()
    assert [p.concepts[0].name for p in singles] == ["cat", "dog"]
    assert [p.hash for p in singles] == [plan_of(registries, concepts=(c,)).hash for c in ("cat", "dog")]
    joint = plan_of(registries, concepts=("cat", "dog"))
    assert not joint.separate
    assert joint.hash != plan.hash
