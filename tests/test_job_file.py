"""Job files, flags and --set: what they make, which counts more, and what is said about a wrong one."""

import json
import string
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from client.job_file import build_spec, builtin_layer, file_layer, flag_layer, merge, parse_value, read_job, set_layer
from client.job_keys import RESERVED, Key, job_keys, key_at, nearest
from client.task_file import check_task, read_task, task_name
from common.errors import BadJobError, BadTaskError, LydianError
from common.messages import OUTER_KEYS, JobSpec
from common.robustness import CUTTING
from common.tasks import BUILTIN

TASK_FILE = "def model(config): ...\n\n\ndef dataset(config, split): ...\n"


def spec_of(text: str) -> JobSpec:
    return build_spec(file_layer(text, "job.toml"))


def sentence_of(text: str) -> str:
    with pytest.raises(BadJobError) as caught:
        spec_of(text)
    return str(caught.value)


# ---------------------------------------------------------------- any valid job, written down and read back

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
NAMES = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=63)
ATTRIBUTES = st.text(string.ascii_letters, min_size=1, max_size=63)
SCALARS = st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | TEXTS


def values_of(key: Key) -> st.SearchStrategy[Any]:
    """Every value that a key allows, by its schema, so that a new key is tried without an edit here."""
    return st.one_of([one_of_schema(schema) for schema in key.alternatives])


def one_of_schema(schema: Any) -> st.SearchStrategy[Any]:
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    if schema["type"] == "string":
        pattern = schema.get("pattern")
        if pattern is None:
            return NAMES if "minLength" in schema else TEXTS
        return NAMES if "1,63" in pattern else ATTRIBUTES
    if schema["type"] == "array":
        return st.lists(one_of_schema(schema["items"]), min_size=1, max_size=4)
    if schema["type"] == "integer":
        top = schema.get("maximum", schema.get("exclusiveMaximum", 2**53) - 1)
        return st.integers(schema.get("minimum", 0), top)
    if schema["type"] == "boolean":
        return st.booleans()
    return st.floats(
        schema.get("minimum", schema.get("exclusiveMinimum")),
        schema.get("maximum", schema.get("exclusiveMaximum")),
        exclude_min="exclusiveMinimum" in schema,
        exclude_max="exclusiveMaximum" in schema,
        allow_nan=False,
        allow_infinity=False,
    )


CONFIGS = st.dictionaries(NAMES, SCALARS | st.lists(SCALARS, max_size=3), max_size=3)


LATE_FP32 = (
    "round.late = use needs updates that are changes, and aggregation.update = fp32 sends whole models: "
    "set bf16, int8, int4 or topk"
)


def make_possible(document: dict[str, Any]) -> None:
    """Leave out keys that do not go with the others."""
    if document.get("script"):
        document.pop("train", None)
        document.get("evaluation", {}).pop("per_class", None)
        if document.get("aggregation", {}).get("algorithm") == "fednova":
            del document["aggregation"]["algorithm"]
    else:
        document.pop("arguments", None)
    train, data = document.get("train", {}), document.get("data", {})
    if "local_steps" not in train:
        for name in ("schedule", "warmup_steps"):
            train.pop(name, None)
    if train.get("local_steps") == 1:
        train.pop("proximal", None)
    if set(train.get("frozen", [])) & set(train.get("personal", [])):
        del train["personal"]
    if train.get("schedule") != "step":
        for name in ("milestones", "gamma"):
            train.pop(name, None)
    elif "milestones" not in train:
        train["schedule"] = "cosine"
        train.pop("gamma", None)
    else:
        train["milestones"] = sorted(set(train["milestones"]))
    if (data.get("partition") == "natural") != ("by" in data):
        for name in ("partition", "by"):
            data.pop(name, None)
    evaluation = document.get("evaluation", {})
    if document.get("round", {}).get("evaluate_every") == 0:
        evaluation.pop("patience", None)
    if "patience" not in evaluation:
        evaluation.pop("min_delta", None)


@st.composite
def specs(draw: st.DrawFn) -> JobSpec:
    document: dict[str, Any] = {
        "config": draw(st.dictionaries(NAMES, SCALARS | st.lists(SCALARS, max_size=3), max_size=3))
    }
    length = draw(st.sampled_from(["local_epochs", "local_steps", "local_seconds"]))
    for path, key in job_keys().items():
        other_length = path[-1].startswith("local_") and path[-1] != length
        if key.open or other_length or (path != ("task",) and not draw(st.booleans())):
            continue
        section = document if len(path) == 1 else document.setdefault(path[0], {})
        section[path[-1]] = draw(values_of(key))
    for name in ("drift", "dyn_alpha"):  # go with few other keys: tests/test_drift.py
        document.get("train", {}).pop(name, None)
    make_possible(document)
    document.get("secure", {}).pop("enabled", None)  # most of the others exclude it
    if document.get("aggregation", {}).get("update", "fp32") in ("fp32", "auto"):
        document.get("round", {}).pop("late", None)
    aggregation = document.get("aggregation", {})
    if aggregation.get("algorithm") == "fednova":
        schedule = ("schedule", "warmup_steps", "milestones", "gamma")
        for name in ("optimizer", "batch_size", "keep_optimizer", "proximal", *schedule):
            document.get("train", {}).pop(name, None)
    for name in {name for keys in OUTER_KEYS.values() for name in keys} - set(
        OUTER_KEYS[aggregation.get("algorithm", "fedavg")]
    ):
        aggregation.pop(name, None)
    _let_a_robust_rule_fit(document)
    _suit_the_mode(document)
    private = document.pop("privacy", None)
    spec = JobSpec.model_validate(document)
    if private is not None:
        with suppress(ValidationError):  # most of what is drawn is no promise that can be kept
            spec = JobSpec.model_validate({**document, "privacy": private})
    return spec


def _let_a_robust_rule_fit(document: dict[str, Any]) -> None:
    """What a rule needs of the rest of its job, and what is nothing without one."""
    rule = document.get("aggregation", {})
    if rule.get("robust", "none") not in CUTTING:
        rule.pop("clip_norm", None)
    if rule.get("robust", "none") == "none":
        rule.pop("faulty", None)
        return
    rule["faulty"] = min(rule.get("faulty", 1), 3)
    rule["algorithm"] = {"fednova": "fedavg"}.get(rule.get("algorithm", "fedavg"), rule.get("algorithm", "fedavg"))
    rule["update"] = {"topk": "int4"}.get(rule.get("update", "fp32"), rule.get("update", "fp32"))
    document["data"] = {**document.get("data", {}), "shards": 100, "fraction": 1.0, "partition": "iid"}
    document["data"].pop("by", None)
    for name in ("late", "quorum"):
        document.get("round", {}).pop(name, None)


def _suit_the_mode(document: dict[str, Any]) -> None:
    """Leave out what synchronous rounds, or asynchronous ones, have not."""
    section, data = document.get("round", {}), document.get("data", {})
    only_async, only_sync = ("buffer", "max_staleness"), ("quorum", "deadline", "late")
    is_async = section.get("mode") == "async"
    for name in only_sync if is_async else only_async:
        section.pop(name, None)
    if is_async:
        data.pop("fraction", None)
        for name in ("keep_optimizer", "personal"):
            document.get("train", {}).pop(name, None)
        for name in ("robust", "faulty", "clip_norm", "norm_outlier"):
            document.get("aggregation", {}).pop(name, None)
        if isinstance(data.get("shards"), int):
            section.pop("buffer", None)


def toml(value: Any) -> str:
    """A value as TOML. JSON's strings are TOML's, but for the one control character that JSON leaves alone."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    return str(value).lower()


def given_keys(spec: JobSpec) -> dict[tuple[str, ...], Any]:
    """What a job file must say for this spec: every key that is set."""
    document = spec.model_dump(mode="python", exclude_none=True)
    sections = {name: document.pop(name) for name, value in list(document.items()) if isinstance(value, dict)}
    nested = {(name, leaf): value for name, section in sections.items() for leaf, value in section.items()}
    return {(name,): value for name, value in document.items()} | nested


ONE_STEP = "proximal has no effect with local_steps = 1: the only step of a round begins at the global model"


@pytest.mark.parametrize(
    ("written", "frozen", "personal"),
    [
        ('frozen = "encoder.*"', ("encoder.*",), ()),
        ('personal = "batchnorm"\nfrozen = ["batchnorm"]', ("batchnorm",), "batchnorm"),
        ('personal = "head.*"', (), ("head.*",)),
        ('personal = ["head.*", "norm.*"]', (), ("head.*", "norm.*")),
    ],
)
def test_one_pattern_is_a_list_of_one_and_batchnorm_is_a_word(written: str, frozen: object, personal: object) -> None:
    train = spec_of(f'task = "d"\n[train]\n{written}').train
    assert (train.frozen, train.personal) == (frozen, personal)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        (
            'frozen = ["a.*", "head.*"]\npersonal = ["head.*"]',
            "[train]: 'head.*' is in frozen and in personal: what is never trained is nobody's own; keep one of them",
        ),
        (
            "proximal = 0.1\nlocal_steps = 1",
            f"[train]: {ONE_STEP}; take more steps, or leave it out",
        ),
        ("proximal = -1.0", "train.proximal = -1.0 in job.toml: a number (at least 0) is allowed"),
        ("frozen = 3", "train.frozen = 3 in job.toml: a list, each a text is allowed"),
        ('personal = [""]', "train.personal = [''] in job.toml: \"batchnorm\" or a list, each a text is allowed"),
    ],
)
def test_client_terms_that_make_no_sense_are_refused_in_words(written: str, why: str) -> None:
    assert sentence_of(f'task = "d"\n[train]\n{written}') == why


@given(specs())
def test_any_valid_job_survives_being_written_as_a_job_file(spec: JobSpec) -> None:
    lines = [f"{'.'.join(toml(part) for part in path)} = {toml(value)}" for path, value in given_keys(spec).items()]
    assert spec_of("\n".join(lines)) == spec


@given(specs())
def test_any_valid_job_survives_being_written_as_set_options(spec: JobSpec) -> None:
    items = [f"{'.'.join(path)}={toml(value)}" for path, value in given_keys(spec).items()]
    assert build_spec(set_layer(items)) == spec


@given(specs())
def test_any_valid_job_survives_being_written_as_flags(spec: JobSpec) -> None:
    flags: dict[tuple[str, ...], Any] = {}
    for path, value in given_keys(spec).items():
        if path[0] == "config":
            flags.setdefault(("config",), []).append(f"{path[1]}={toml(value)}")
        else:
            flags[path] = value if isinstance(value, str) else toml(value)
    assert build_spec(flag_layer(flags)) == spec


def test_the_example_is_a_job_and_says_what_it_shows() -> None:
    spec = spec_of((Path(__file__).parent.parent / "examples" / "job.toml").read_text())
    assert (spec.task, spec.rounds, spec.data.partition, spec.round.quorum) == ("fashion-mnist", 20, "dirichlet", 0.75)


# ---------------------------------------------------------------- keys


def test_every_key_has_a_flag_of_its_own() -> None:
    flags = [key.flag for key in job_keys().values()]
    assert len(set(flags)) == len(flags)
    assert not {flag.removeprefix("--") for flag in flags} & RESERVED


def test_a_name_in_a_section_does_not_take_the_flag_of_one_at_the_top() -> None:
    assert job_keys()[("name",)].flag == "--name"
    assert job_keys()[("data", "name")].flag == "--data-name"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (("train", "learning_rate"), "train.lr"),
        (("lr",), "train.lr"),
        (("train", "shards"), "data.shards"),
        (("epochs",), "train.local_epochs"),
        (("round", "quorun"), "round.quorum"),
        (("rouds",), "rounds"),
        (("optimizer",), "train.optimizer"),
        (("warmup",), "train.warmup_steps"),
        (("train", "xyzzy"), None),
    ],
)
def test_the_nearest_key_is_the_one_that_was_meant(written: tuple[str, ...], meant: str | None) -> None:
    assert nearest(written) == meant


def test_the_open_section_takes_any_key_and_the_others_only_their_own() -> None:
    assert key_at(("config", "anything")) is job_keys()[("config",)]
    assert key_at(("config",)) is None
    assert key_at(("train", "anything")) is None


# ---------------------------------------------------------------- wrong jobs

NAME_WORDS = "a name (letters, digits, dots, dashes, underscores; at most 63)"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('task = "d"\ntrain.learning_rate = 1', "unknown key train.learning_rate in job.toml: did you mean train.lr?"),
        ('task = "d"\nepochs = 1', "unknown key epochs in job.toml: did you mean train.local_epochs?"),
        ('task = "d"\n[training]\nlr = 1', "unknown section [training] in job.toml: did you mean [train]?"),
        (
            'task = "d"\n[aggregation]\nxyz = 1',
            (
                "unknown key aggregation.xyz in job.toml: there are algorithm, outer_lr, outer_momentum, outer_beta1, "
                "outer_beta2, outer_tau, robust, faulty, clip_norm, norm_outlier, update, download, feedback, "
                "norm_bound"
            ),
        ),
        (
            'task = "d"\nrounds = "5"',
            'rounds = "5" in job.toml: a whole number (at least 1 and at most 1,000,000) is allowed',
        ),
        (
            'task = "d"\nrounds = true',
            "rounds = true in job.toml: a whole number (at least 1 and at most 1,000,000) is allowed",
        ),
        ('task = "d"\ntrain.lr = -0.5', "train.lr = -0.5 in job.toml: a number (above 0) is allowed"),
        (
            'task = "d"\ndata.shards = "many"',
            'data.shards = "many" in job.toml: "auto" or a whole number (at least 1 and at most 1,000,000) is allowed',
        ),
        (
            'task = "d"\ndata.partition = "random"',
            (
                'data.partition = "random" in job.toml: "iid" or "quantity" or "dirichlet" or "labels" or "natural" or '
                '"local" is allowed'
            ),
        ),
        ('task = "d"\nname = "two words"', f'name = "two words" in job.toml: {NAME_WORDS} is allowed'),
        ('task = "d"\ntrain = 3', "train = 3 in job.toml: [train] is a section of keys"),
        ('task = "d"\nconfig = 3', "config = 3 in job.toml: [config] is a section of keys"),
        ('task = "d"\n[train.lr]\nx = 1', "train.lr = a table in job.toml: a number (above 0) is allowed"),
        (
            'task = "d"\n[config]\nday = 2024-01-01',
            "config.day = 2024-01-01 in job.toml: a text, a number, true or false, or a list of these is allowed",
        ),
        (
            'task = "d"\n[train]\nlocal_epochs = 1\nlocal_steps = 2',
            "[train]: local_epochs and local_steps are both set; a round has one length: keep one of them",
        ),
        (
            'task = "d"\n[train]\nschedule = "cosine"',
            (
                "train.schedule counts the steps of the whole job, and with data.shards = auto they are not known: set "
                "train.local_steps; or, with iid data and epochs, data.shards and train.batch_size to numbers"
            ),
        ),
        (
            (
                'task = "d"\n[train]\nwarmup_steps = 5\nlocal_seconds = 1\nbatch_size = "auto"\n[data]\nshards = 4\n'
                'partition = "dirichlet"'
            ),
            (
                "train.warmup_steps counts the steps of the whole job, and with train.local_seconds and "
                "data.partition = dirichlet and train.batch_size = auto they are not known: set "
                "train.local_steps; or, with iid data and epochs, data.shards and train.batch_size to numbers"
            ),
        ),
        (
            'task = "d"\n[train]\nlocal_steps = 5\ngamma = 0.5',
            "[train]: gamma belongs to schedule = step, and schedule is constant",
        ),
        (
            'task = "d"\n[train]\nlocal_steps = 5\nschedule = "linear"\nmilestones = [5]',
            "[train]: milestones belongs to schedule = step, and schedule is linear",
        ),
        (
            'task = "d"\n[train]\nlocal_steps = 5\nschedule = "step"',
            "[train]: schedule = step needs milestones, steps that rise: they are []",
        ),
        (
            'task = "d"\n[train]\nlocal_steps = 5\nschedule = "step"\nmilestones = [9, 9]',
            "[train]: schedule = step needs milestones, steps that rise: they are [9, 9]",
        ),
        (
            'task = "d"\n[train]\nlocal_steps = 5\nschedule = "step"\nmilestones = [1.5]',
            "train.milestones = [1.5] in job.toml: a list, each a whole number (at least 1) is allowed",
        ),
        (
            'task = "d"\n[data]\npartition = "natural"',
            (
                "[data]: partition = natural needs by, the attribute of the task's dataset that has an id for each "
                'sample, e.g. by = "users"'
            ),
        ),
        (
            'task = "d"\n[data]\nby = "users"',
            "[data]: by is given, which partition = natural alone can use, and partition is iid",
        ),
        (
            'task = "d"\n[data]\npartition = "natural"\nby = "my users"',
            (
                'data.by = "my users" in job.toml: a name as Python has it (letters, digits, underscores; a letter '
                "first) is allowed"
            ),
        ),
        (
            'task = "d"\n[evaluation]\nmin_delta = 0.01',
            "[evaluation]: min_delta = 0.01 counts only where patience is set, and it is not",
        ),
        (
            'task = "d"\n[evaluation]\npatience = 3\n[round]\nevaluate_every = 0',
            (
                "evaluation.patience = 3 counts evaluations, and with round.evaluate_every = 0 there is one, after "
                "the last round: set it to 1 or more"
            ),
        ),
        (
            'task = "d"\n[round]\nlate = "use"',
            LATE_FP32,
        ),
        (
            'task = "d"\n[aggregation]\nouter_tau = 0.5',
            (
                "[aggregation]: outer_tau = 0.5 is of no use to fedavg, which has no such keys: leave it out, "
                "or set algorithm to fedadagrad or fedadam or fedyogi"
            ),
        ),
        (
            'task = "d"\n[aggregation]\nalgorithm = "fedavgm"\nouter_beta2 = 0.5',
            (
                "[aggregation]: outer_beta2 = 0.5 is of no use to fedavgm, which takes outer_lr, outer_momentum: "
                "leave it out, or set algorithm to fedadam or fedyogi"
            ),
        ),
        (
            'task = "d"\ntrain.batch_size = "auto"\n[aggregation]\nalgorithm = "fednova"',
            (
                "aggregation.algorithm = fednova weighs updates by what their gradients add up to, and "
                "train.batch_size = auto gives each worker a learning rate of its own: change that, or use fedavg"
            ),
        ),
        ("rounds = 5", "the job names no task: give a built-in one or --task FILE.py"),
    ],
)
def test_a_wrong_job_file_is_refused_by_one_sentence(text: str, sentence: str) -> None:
    assert sentence_of(text) == sentence


def test_every_fault_of_a_job_has_a_line() -> None:
    lines = sentence_of('task = "d!"\nfoo = 1\n[train]\nlr = "fast"\nbatch = 8\n[round]\nquorum = 7.5').splitlines()
    assert [line.split(" in job.toml")[0] for line in lines] == [
        "unknown key foo",
        "unknown key train.batch",
        'task = "d!"',
        'train.lr = "fast"',
        "round.quorum = 7.5",
    ]


def test_a_syntax_error_is_told_with_its_line() -> None:
    with pytest.raises(BadJobError, match=r"^job\.toml is not TOML: .*line 2") as caught:
        file_layer('task = "digits"\nrounds 5\n', "job.toml")
    assert caught.value.code == "bad_job"


def test_a_job_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadJobError, match=r"none\.toml cannot be read: No such file or directory"):
        read_job(tmp_path / "none.toml", {}, {})


def test_a_job_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_bytes(b'task = "\xff"')
    with pytest.raises(BadJobError, match=r"job\.toml is not UTF-8: .* at byte 8"):
        read_job(tmp_path / "job.toml", {}, {})


@pytest.mark.parametrize("item", ["train.lr", "=1", " =1"])
def test_a_set_option_without_key_and_value_is_refused(item: str) -> None:
    with pytest.raises(BadJobError, match=r"^--set .* is not section\.key=value$"):
        set_layer([item])


def test_a_fault_says_whether_a_flag_or_set_brought_it() -> None:
    layer = merge(flag_layer({("task",): "d", ("train", "lr"): "fast"}), set_layer(["data.shards=none"]))
    with pytest.raises(BadJobError) as caught:
        build_spec(layer)
    first, second = str(caught.value).splitlines()
    assert first.startswith('train.lr = "fast" in --lr: ')
    assert second.startswith('data.shards = "none" in --set: ')


# ---------------------------------------------------------------- values on the command line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("0.1", 0.1),
        ("true", True),
        ('"8"', "8"),
        ("[1, 2]", [1, 2]),
        ("auto", "auto"),
        ("2024-01-01", "2024-01-01"),
        ("{a = 1}", "{a = 1}"),
        ('1\nother = "x"', '1\nother = "x"'),
        ("", ""),
    ],
)
def test_a_value_is_toml_or_else_a_bare_text(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert (parsed, type(parsed)) == (value, type(value))


@given(TEXTS)
def test_a_text_on_the_command_line_is_always_a_value(text: str) -> None:
    assert isinstance(parse_value(text), str | int | float | list)


def test_a_number_is_a_name_where_only_a_name_is_allowed() -> None:
    layer = merge(flag_layer({("task",): "d", ("name",): "7"}), set_layer(["data.name=8"]))
    spec = build_spec(layer)
    assert (spec.name, spec.data.name) == ("7", "8")


# ---------------------------------------------------------------- layers


def test_set_counts_more_than_a_flag_than_the_file_than_the_task(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('task = "digits"\nrounds = 2\n[train]\nbatch_size = 2\nlr = 2\n')
    flags = flag_layer({("train", "batch_size"): "3", ("train", "lr"): "3"})
    spec = read_job(tmp_path / "job.toml", flags, set_layer(["train.lr=4"])).spec
    default = BUILTIN["digits"].defaults["train.momentum"]
    assert (spec.train.lr, spec.train.batch_size, spec.rounds, spec.train.momentum) == (4, 3, 2, default)


def test_another_optimizer_than_a_task_was_made_for_gets_its_own_learning_rate() -> None:
    train = read_job(None, flag_layer({("task",): "digits", ("train", "optimizer"): "adamw"}), {}).spec.train
    assert (train.lr, train.momentum, train.weight_decay, train.beta2) == (4e-4, 0.0, 0.1, 0.95)
    named = flag_layer({("task",): "digits", ("train", "optimizer"): "adamw", ("train", "lr"): "0.01"})
    assert read_job(None, named, {}).spec.train.lr == 0.01
    train = read_job(None, flag_layer({("task",): "digits", ("train", "optimizer"): "sgd"}), {}).spec.train
    assert (train.lr, train.momentum) == (0.05, 0.9)


@pytest.mark.parametrize("length", ["local_steps", "local_seconds"])
def test_another_length_of_a_round_replaces_the_default_one(length: str) -> None:
    spec = build_spec(merge(builtin_layer("digits"), set_layer(["task=digits", f"train.{length}=10"])))
    assert (spec.train.local_epochs, getattr(spec.train, length)) == (None, 10)


def test_lengths_of_one_layer_are_not_dropped_in_silence() -> None:
    layer = merge(builtin_layer("digits"), flag_layer({("train", "local_steps"): "1", ("train", "local_epochs"): "1"}))
    with pytest.raises(BadJobError, match="keep one of them"):
        build_spec(merge(layer, set_layer(["task=digits"])))


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_the_defaults_of_every_built_in_task_make_a_job(name: str) -> None:
    spec = read_job(None, flag_layer({("task",): name}), {}).spec
    assert spec.task == name
    assert spec.config == BUILTIN[name].config


def test_an_unknown_task_is_answered_with_the_nearest_ones() -> None:
    with pytest.raises(
        BadTaskError, match=r'^there is no built-in task "fashon-mnist": did you mean fashion-mnist\?$'
    ) as e:
        read_job(None, flag_layer({("task",): "fashon-mnist"}), {})
    assert e.value.code == "unknown_task"
    assert all(name in e.value.advice for name in BUILTIN)


# ---------------------------------------------------------------- task files


def test_a_task_file_in_a_job_file_is_looked_for_beside_it(tmp_path: Path) -> None:
    (tmp_path / "my task.py").write_text(TASK_FILE)
    (tmp_path / "job.toml").write_text('task = "my task.py"')
    job = read_job(tmp_path / "job.toml", {}, {})
    assert (job.spec.task, job.task_source) == ("my-task", TASK_FILE)


def test_a_task_file_in_a_flag_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "job.toml").write_text('task = "digits"')
    (tmp_path / "mine.py").write_text(TASK_FILE)
    monkeypatch.chdir(tmp_path)
    job = read_job(Path("jobs/job.toml"), flag_layer({("task",): "mine.py"}), {})
    assert (job.spec.task, job.task_source) == ("mine", TASK_FILE)
    assert job.spec.train == JobSpec(task="mine").train  # no defaults of digits


def test_a_task_file_is_sent_byte_for_byte(tmp_path: Path) -> None:
    content = "\ufeff# é\r\n" + TASK_FILE.replace("\n", "\r\n")
    (tmp_path / "t.py").write_bytes(content.encode())
    assert read_task(tmp_path / "t.py") == content


def test_a_task_file_is_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "t.py").write_text(f"open({str(trace)!r}, 'w').close()\n{TASK_FILE}")
    read_task(tmp_path / "t.py")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"def model(config):\n    return (\n", "t.py:2: '(' was never closed"),
        (b"def model(config): ...", "t.py does not define dataset(config, split) at its top level"),
        (b"class model: ...", "t.py does not define dataset(config, split) at its top level"),
        (
            b"if 1:\n  def f():\n    model = 1",
            "t.py does not define model(config) and dataset(config, split) at its top level",
        ),
        (b"# \xff", "t.py is not UTF-8: invalid start byte at byte 2"),
        (b"a = (" + b"(" * 300 + b")" * 301, "t.py:1: too many nested parentheses"),
    ],
)  # fmt: skip
def test_a_wrong_task_file_is_refused_by_one_sentence(content: bytes, sentence: str) -> None:
    with pytest.raises(BadTaskError) as caught:
        check_task(content, "t.py")
    assert (str(caught.value), caught.value.code) == (sentence, "bad_task")


@pytest.mark.parametrize(
    "content",
    [
        TASK_FILE,
        "from mine import model, data as dataset",
        "from mine import *",
        "model = dataset = None",
        "if True:\n    def model(c): ...\ntry:\n    dataset: object = 1\nfinally:\n    pass",
        TASK_FILE + "s = '\\d'",  # a doubtful escape is no fault
    ],
)
def test_a_task_file_may_bind_its_functions_as_python_does(content: str) -> None:
    check_task(content.encode(), "t.py")


@given(st.binary(max_size=60) | TEXTS.map(str.encode))
def test_any_bytes_are_a_task_or_are_refused(content: bytes) -> None:
    sentence = "t.py is a task"
    try:
        check_task(content, "t.py")
    except LydianError as error:
        sentence = str(error)
    assert sentence.startswith("t.py")


def test_a_task_file_that_is_missing_or_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadTaskError, match="cannot be read: No such file"):
        read_task(tmp_path / "none.py")
    (tmp_path / "long.py").write_text(TASK_FILE + "#" * (1 << 20))
    with pytest.raises(BadTaskError, match=r"has 1,048,6\d\d bytes"):
        read_task(tmp_path / "long.py")


@given(st.text(min_size=1, max_size=100))
def test_any_file_name_becomes_a_name_that_a_job_may_have(stem: str) -> None:
    name = task_name(Path("/x") / f"{stem.replace('/', '').replace(chr(0), '')}.py")
    assert JobSpec(task=name).task == name
