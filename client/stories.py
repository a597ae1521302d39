"""How a model came about: what `lydian pull FOLDER/` writes beside the weights. Facts in, texts out.

    the job's facts ──▶ Story ──▶ README.md (model card), config.json

The shape of the folder is that of the Hugging Face hub: https://huggingface.co/docs/hub/model-cards. Nothing is sent
there. What a worker called itself, or a metric, is a text like any other: it cannot become markup.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from client import shown
from client.watching import read_event
from common.api import CoordinatorApi
from common.facts import Accepted, Evaluated, Initialised, RoundClosed, Submitted
from common.messages import Beginning, JobView
from common.privacy import shown_epsilon

NAMED = 20  # workers by name in the card; the rest are counted


@dataclass(frozen=True)
class Story:
    """What is told of one version of a job's model.

    Attributes:
        view: the job.
        round: whose model it is; 0: as it was built.
        task_digest: of the task file; None: it is built in.
        closed: the rounds up to it, oldest first.
        evaluated: on the held-out data; None: it was not measured.
        built: what the first worker found out; None: not known.
        workers: by name, those whose updates are in it.
        version: of the coordinator.
    """

    view: JobView
    round: int
    task_digest: str | None
    closed: tuple[RoundClosed, ...]
    evaluated: Evaluated | None
    built: Initialised | None
    workers: tuple[str, ...]
    version: str


def task_digest(api: CoordinatorApi, job: str) -> str | None:
    """Of a job's task file; None: it is built in."""
    for event in api.events(job):  # its first fact says so
        fact = read_event(event)
        if isinstance(fact, Submitted):
            return fact.task_digest
    return None


def story_of(api: CoordinatorApi, view: JobView, round_index: int) -> Story:
    """Read a job's facts, as far as there are some."""
    task, built, closed, workers = None, None, list[RoundClosed](), dict[str, None]()
    evaluated: Evaluated | None = None
    for event in api.events(view.id):
        match read_event(event):
            case Submitted() as sent:
                task = sent.task_digest
            case Initialised() as fact:
                built = fact
            case RoundClosed() as fact if fact.round <= round_index:
                closed.append(fact)
            case Accepted() as fact if fact.round <= round_index:
                workers[fact.worker_name] = None
            case Evaluated() as fact if fact.round == round_index:
                evaluated = fact
            case _ if "id" not in event:  # where it stands now: every fact has been told
                break
            case _:
                pass
    return Story(view, round_index, task, tuple(closed), evaluated, built, tuple(workers), api.version().version)


def config_json(story: Story) -> str:
    """The least that tells what the weights are of: the task, its configuration, and how many numbers it has."""
    view = story.view
    document = {
        "model_type": "lydian-task",
        "architectures": [view.task],
        "task": view.task,
        "task_file": "task.py" if story.task_digest else None,
        "task_digest": story.task_digest,
        "config": view.spec.config,
        "parameters": view.parameters,
        "job": view.id,
        "round": story.round,
        "seed": view.spec.seed,
        "began_with": _begun(story.view.begins_with),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def model_card(story: Story, digest: str) -> str:
    """README.md.

    Args:
        story: how the model came about.
        digest: SHA-256 of model.safetensors beside it, in hex.
    """
    view = story.view
    title = view.name or view.task
    lines = ["---", "library_name: pytorch", "tags:", "- federated-learning", "- lydian-training", "---", ""]
    lines += [f"# {_plain(title)}", "", _summary(story), ""]
    lines += ["## Training", "", *_rows(_training(story)), ""]
    lines += ["## Results", "", *_results(story), ""]
    lines += ["## Privacy", "", _privacy(story), ""]
    lines += ["## Where it comes from", "", *_rows(_origin(story, digest)), ""]
    lines += ["## How to load it", "", *_loading(story)]
    return "\n".join(lines) + "\n"


def _summary(story: Story) -> str:
    many = shown.several(len(story.workers), "worker")
    name = f"The model of job `{story.view.id}` after round {story.round} of {story.view.rounds}"
    return f"{name}, trained by {many} that sent their updates and kept their data."


def _training(story: Story) -> Mapping[str, str]:
    spec, built = story.view.spec, story.built
    names = ", ".join(map(_plain, story.workers[:NAMED]))
    more = f" and {len(story.workers) - NAMED} more" if len(story.workers) > NAMED else ""
    cut = f"{spec.data.partition}, shards = {spec.data.shards}, fraction = {spec.data.fraction:g}"
    rows = {
        "Data": f"task `{_plain(spec.task)}`, cut {cut}",
        "Training samples": "" if built is None else shown.count(built.facts.train_samples),
        "Parameters": "" if built is None else shown.count(built.facts.parameters),
        "Rounds": f"{story.round} of {spec.rounds}",
        "Workers": names + more,
        "Samples trained on": shown.count(sum(one.samples for one in story.closed)),
        "Algorithm": spec.aggregation.algorithm,
        "Robust rule": "" if spec.aggregation.robust == "none" else spec.aggregation.robust,
        "Updates travelled as": spec.aggregation.update,
        "Optimiser": f"{spec.train.optimizer}, lr = {spec.train.lr:g}, batch_size = {spec.train.batch_size}",
        "Drift control": "" if spec.train.drift == "none" else spec.train.drift,
        "Secure aggregation": "yes" if spec.secure.enabled else "",
        "Seed": str(spec.seed),
    }
    return {name: value for name, value in rows.items() if value}


def _results(story: Story) -> list[str]:
    if story.evaluated is None:
        return [f"The model of round {story.round} was not evaluated."]
    measured = {_plain(name): shown.measure(value) for name, value in story.evaluated.metrics.items()}
    on = f"Measured on {shown.several(story.evaluated.samples, 'held-out sample')} when round {story.round} had closed."
    return [*_rows(measured), "", on]


def _privacy(story: Story) -> str:
    spent = story.closed[-1].privacy if story.closed else None
    before = ""
    if story.view.begins_with is not None:
        before = " What the model that it began with gives away comes on top."
    if spent is None:
        return "No differential privacy: the model may give away something of the data that it was trained on."
    epsilon = shown_epsilon(spent.epsilon)
    return f"ε = {epsilon} at δ = {spent.delta:g}, for each {spent.level}, over all rounds up to this one.{before}"


def _begun(beginning: Beginning | None) -> dict[str, str | int | None] | None:
    """What the job began with, for config.json."""
    return None if beginning is None else beginning.model_dump(include={"digest", "job", "round"})


def _origin(story: Story, digest: str) -> Mapping[str, str]:
    kept = story.closed[-1].digest if story.closed else story.built.digest if story.built else ""
    rows = {
        "model.safetensors (SHA-256)": f"`{digest}`",
        "As the coordinator keeps it (SHA-256)": f"`{kept}`" if kept else "",
        "Began with": _began_words(story.view.begins_with),
        "Code": f"task.py, SHA-256 `{story.task_digest}`" if story.task_digest else f"built in: {story.view.task}",
        "Job": f"`{story.view.id}`, submitted {_plain(story.view.submitted_at)}",
        "Made with": f"LydianAI distributed training {_plain(story.version)}",
    }
    return {name: value for name, value in rows.items() if value}


def _began_words(beginning: Beginning | None) -> str:
    """The row of the card; empty: with what model(config) builds."""
    if beginning is None:
        return ""
    of = "a file" if beginning.job is None else f"the model of job `{beginning.job}` after round {beginning.round}"
    return f"{of}, SHA-256 `{beginning.digest}`"


def _loading(story: Story) -> Iterator[str]:
    partly = story.view.spec.train.personal or story.view.spec.train.trainable_only
    strict = ", strict=False" if partly else ""
    yield "```python"
    yield "import json"
    yield "from safetensors.torch import load_file"
    if story.task_digest:
        yield "from task import model  # runs task.py: read it first"
    else:
        yield f"# model is the one of the built-in task {story.view.task}: common/tasks of the repository"
    yield ""
    yield 'net = model(json.load(open("config.json"))["config"])'
    yield f'net.load_state_dict(load_file("model.safetensors"){strict})'
    yield "```"


def _rows(rows: Mapping[str, str]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]


def _plain(text: str) -> str:
    """A text that no reader of Markdown takes for markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!&" else c for c in shown.one_line(text))
