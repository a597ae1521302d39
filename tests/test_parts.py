"""What is trained, what travels and what stays: frozen, personal and trainable_only, in the child and over a round."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from common.codecs import codec
from common.deltas import encode_update
from common.weights import read_layout
from server.folding import Rules, Targets, average
from server.inspection import inspect
from server.optimizers import FedAvg
from tests.test_terms import Desk
from worker import task_parts
from worker.task_host import Context
from worker.task_parts import UnfitError, freeze, matching, parts_of

pytestmark = pytest.mark.usefixtures("one_thread")

NET = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
    def forward(self, x):
        return self.head(self.encoder(x))

def model(config):
    return Net()

def dataset(config, split):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3].argmax(1))
"""
ENCODER = {"encoder.0.weight", "encoder.0.bias", "encoder.3.weight", "encoder.3.bias"}
NORM = {"encoder.1.weight", "encoder.1.bias", "encoder.1.running_mean", "encoder.1.running_var",
        "encoder.1.num_batches_tracked"}  # fmt: skip
HEAD = {"head.weight", "head.bias"}
SEED = {"seed": 3}  # what the coordinator's job would give


def desk(folder: Path, source: str = NET, **terms: Any) -> Desk:
    folder.mkdir(exist_ok=True)
    return Desk(folder, source, terms, batch_size=8, momentum=0.9)


def failed(answer: dict[str, Any]) -> tuple[str, str]:
    assert answer["event"] == "error", answer
    return answer["code"], answer["sentence"]


# ---------------------------------------------------------------- frozen


def test_frozen_parameters_stay_what_they_were_and_the_others_are_trained(tmp_path: Path) -> None:
    bench = desk(tmp_path, frozen=["encoder.[03].*"])
    base, found = load_file(bench.base), bench.trained(epochs=2)
    assert all(torch.equal(base[name], found[name]) for name in ENCODER)
    assert not any(torch.equal(base[name], found[name]) for name in NORM | HEAD)
    assert read_layout(bench.base).notes.untrained >= ENCODER  # neither codec nor optimiser, norm nor noise sees them
    counted = bench.answer("init", seed=3, out=str(tmp_path / "again"), labels=None)["parameters"]
    assert counted == sum(base[name].numel() for name in HEAD | {"encoder.1.weight", "encoder.1.bias"})


def test_an_optimiser_of_the_tasks_own_does_not_move_what_is_frozen(tmp_path: Path) -> None:
    own = "\ndef optimizer(model, config):\n    return torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)\n"
    bench = desk(tmp_path, NET + own, frozen=["encoder.0.*"])
    base, found = load_file(bench.base), bench.trained(epochs=1)
    assert torch.equal(base["encoder.0.weight"], found["encoder.0.weight"])


def test_a_pattern_that_matches_no_parameter_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    code, sentence = failed(desk(tmp_path, frozen=["head.*", "decoder.*"]).train(epochs=1))
    assert code == "bad_task"
    assert sentence.startswith(
        "train.frozen: 'decoder.*' matches no parameter of the model, which has encoder.0.weight"
    )


def test_a_model_of_which_nothing_is_left_to_train_is_refused(tmp_path: Path) -> None:
    assert "leaves nothing to train" in failed(desk(tmp_path, frozen=["*"]).train(epochs=1))[1]


def test_a_long_list_of_names_is_cut() -> None:
    with pytest.raises(UnfitError, match=r"p19 and 80 more$"):
        matching("train.frozen", ["x"], [f"p{number}" for number in range(100)], "parameter")


@given(st.lists(st.sampled_from(["a.b", "a.c", "d", "e.*", "[x]"]), min_size=1, unique=True))
def test_every_name_matches_itself_unless_it_has_wildcards(names: list[str]) -> None:
    plain = [name for name in names if "*" not in name and "[" not in name]
    assert matching("k", plain, names, "n") >= set(plain)


# ---------------------------------------------------------------- personal


def test_personal_tensors_are_in_no_file_that_travels(tmp_path: Path) -> None:
    bench = desk(tmp_path, personal=["head.*"], **SEED)
    assert load_file(bench.base).keys() == ENCODER | NORM
    assert bench.trained(epochs=1).keys() == ENCODER | NORM


def test_batchnorm_keeps_parameters_and_buffers_of_those_layers_and_of_no_others(tmp_path: Path) -> None:
    bench = desk(tmp_path, personal="batchnorm", **SEED)
    assert bench.trained(epochs=1).keys() == ENCODER | HEAD
    layout = read_layout(bench.base)
    assert (layout.notes.variances, layout.notes.buffers) == ({}, ())


@pytest.mark.parametrize(
    ("source", "terms", "words"),
    [
        (NET, {"personal": ["tail.*"]}, "train.personal: 'tail.*' matches no tensor of the model, which has"),
        (NET, {"personal": ["*"]}, "nothing that is trained is left to travel"),
        (NET, {"personal": ["head.*"], "frozen": ["encoder.*"]}, "nothing that is trained is left to travel"),
        (NET.replace("BatchNorm1d", "LayerNorm"), {"personal": "batchnorm"}, "has no BatchNorm layer"),
        (
            NET.replace("self.head = nn.Linear(8, 3)", "self.head = nn.Linear(8, 8)\n        "
                        "self.head.weight = self.encoder[3].weight"),
            {"personal": ["head.*"]},
            "'head.weight', which is tied to 'encoder.3.weight', and that is not in it",
        ),
    ],
)  # fmt: skip
def test_what_fits_no_model_is_refused_in_words(tmp_path: Path, source: str, terms: dict[str, Any], words: str) -> None:
    code, sentence = failed(desk(tmp_path, source, **terms, **SEED).train(epochs=1))
    assert code == "bad_task"
    assert words in sentence


def keeping(folder: Path, after: int, before: int = 0) -> dict[str, Any]:
    ends, begins = str(folder / f"after-{after}"), str(folder / f"after-{before}")
    return {"round": after, "personal": ends, "personal_from": begins, "personal_of": before}


def personal_in(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith("model.")}  # noqa: SIM118


def test_a_round_goes_on_from_the_personal_tensors_of_the_one_before(tmp_path: Path) -> None:
    """Two rounds with everything shared, and two where the head stays: one worker, so the same must come out."""
    whole, parted = desk(tmp_path / "whole"), desk(tmp_path / "parted", personal=["head.*"], **SEED)
    for bench, kept in ((whole, False), (parted, True)):
        for number in (1, 2):
            more = keeping(bench.folder, number, number - 1) if kept else {"round": number}
            done = bench.train(f"out-{number}", epochs=2, **{**more, "seed": number})
            assert done["event"] == "done", done
            assert done["metrics"].get("fresh_personal") == ([float(number == 1), 1.0] if kept else None)
            bench.base = bench.folder / f"out-{number}"
    truth, shared = load_file(whole.base), load_file(parted.base)
    own = personal_in(parted.folder / "after-2")
    assert own.keys() == {"model.head.weight", "model.head.bias"}
    for name, tensor in truth.items():
        assert torch.equal(tensor, own[f"model.{name}"] if name in HEAD else shared[name]), name


def test_two_shards_in_one_child_do_not_see_each_others_personal_tensors(tmp_path: Path) -> None:
    bench = desk(tmp_path, personal=["head.*"], **SEED)
    alone = bench.trained("alone", epochs=1)
    bench.trained("other", epochs=3)
    again = bench.trained("again", epochs=1)
    assert all(torch.equal(alone[name], again[name]) for name in alone)


def spoiled(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "before", "why"),
    [
        (lambda path: path.unlink(), 1, "No such file"),
        (spoiled, 1, "damaged"),
        (lambda _: None, 3, "of round 1, not of round 3"),
    ],
    ids=["missing", "damaged", "another round"],
)
def test_without_what_was_kept_a_shard_begins_as_it_was_built_and_says_so(
    tmp_path: Path, harm: Callable[[Path], object], before: int, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = desk(tmp_path, personal=["head.*"], **SEED)
    bench.trained(epochs=2, **keeping(tmp_path, 1))
    fresh = bench.trained("fresh", epochs=1, **{**keeping(tmp_path, 9), "round": 2})
    harm(tmp_path / "after-1")
    done = bench.train("out", epochs=1, **{**keeping(tmp_path, 2, 1), "personal_of": before})
    assert done["metrics"]["fresh_personal"] == [1.0, 1.0]
    found = load_file(tmp_path / "out")
    assert all(torch.equal(found[name], fresh[name]) for name in fresh)
    assert f"personal: begins as it was built: what was kept is {why}" in capsys.readouterr().err.replace(
        "[Errno 2] ", ""
    )


def test_personal_tensors_that_the_disk_does_not_take_are_an_error(tmp_path: Path) -> None:
    bench = desk(tmp_path, personal=["head.*"], **SEED)
    (tmp_path / "full.part").symlink_to("/dev/full")
    code, sentence = failed(bench.train(epochs=1, **{**keeping(tmp_path, 1), "personal": str(tmp_path / "full")}))
    assert code == "worker_error"
    assert "[Errno 28]" in sentence


def test_a_shard_with_personal_tensors_that_is_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    bench = desk(tmp_path, personal="batchnorm", proximal=0.1, **SEED)
    bench.trained("one", epochs=1, **keeping(tmp_path, 1))
    bench.trained("two", epochs=2, **keeping(tmp_path, 2, 1))
    truth = (tmp_path / "two").read_bytes(), (tmp_path / "after-2").read_bytes()
    kept = {"checkpoint": str(tmp_path / "checkpoint"), "checkpoint_every_s": 0.0, "base_digest": "b"}
    (tmp_path / "after-2").unlink()
    assert broken_off(bench, 6, epochs=2, **keeping(tmp_path, 2, 1), **kept)
    done = bench.train("two", bench.opened(), epochs=2, **keeping(tmp_path, 2, 1), **kept)
    assert done["resumed_at"] == 6
    assert done["metrics"]["fresh_personal"] == [0.0, 1.0]
    assert ((tmp_path / "two").read_bytes(), (tmp_path / "after-2").read_bytes()) == truth


class Killed(BaseException):
    pass


def broken_off(bench: Desk, at: int, **fields: Any) -> bool:
    """A life that ends by kill -9 after so many steps."""
    real = Context.wants_more

    def wants_more(context: Context) -> bool:
        more = real(context)
        if context._taken == at:
            raise Killed
        return more

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "wants_more", wants_more)
        with pytest.raises(Killed):
            bench.train("broken", bench.opened(), **fields)
    return True


def test_no_term_pulls_at_personal_tensors_since_no_round_has_a_value_for_them(tmp_path: Path) -> None:
    host = desk(tmp_path, personal=["head.*"], proximal=0.5, frozen=["encoder.0.*"], **SEED).host
    (term,) = host._terms(host._built(0))
    pulled = {"encoder.1.weight", "encoder.1.bias", "encoder.3.weight", "encoder.3.bias"}
    assert term.args[1].keys() == pulled  # type: ignore[attr-defined]


def test_an_evaluation_measures_the_global_model_with_the_workers_own_personal_tensors(tmp_path: Path) -> None:
    bench = desk(tmp_path, personal=["head.*"], **SEED)
    bench.trained("out", epochs=6, **keeping(tmp_path, 1))
    bench.base = tmp_path / "out"

    def measured(**fields: Any) -> dict[str, Any]:
        done = bench.answer("evaluate", base=str(bench.base), batch_size=16, **fields)
        found: dict[str, Any] = done["metrics"]
        return found

    own, built = measured(personal_from=str(tmp_path / "after-1")), measured()
    assert (own["fresh_personal"], built["fresh_personal"]) == ([0.0, 1.0], [1.0, 1.0])
    assert own["loss"][0] < built["loss"][0]
    assert measured(personal_from=str(tmp_path / "gone"))["loss"] == built["loss"]


# ---------------------------------------------------------------- trainable_only

LORA = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Lora(nn.Module):
    \"\"\"y = x W^T + (x A^T) B^T / rank, W fixed: Hu et al. 2021, arXiv 2106.09685.\"\"\"
    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, inputs) / rank)
        self.b = nn.Parameter(torch.zeros(outputs, rank))
    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T

def pretrained(net):
    torch.manual_seed(PRETRAINED)  # stands for weights that are read from a file
    for module in net.modules():
        if isinstance(module, Lora):
            module.base.reset_parameters()

PRETRAINED = 11

def model(config):
    net = nn.Sequential(Lora(4, 64, 2), nn.ReLU(), nn.BatchNorm1d(64), Lora(64, 3, 2))
    net[2].requires_grad_(False)
    net.register_buffer("scale", torch.ones(100))
    pretrained(net)
    return net

def dataset(config, split):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3].argmax(1))
"""
ADAPTERS = {"0.a", "0.b", "3.a", "3.b"}
RUNNING = {"2.running_mean", "2.running_var", "2.num_batches_tracked"}


def test_adapters_alone_travel_and_the_bytes_of_an_update_are_theirs(tmp_path: Path) -> None:
    whole, adapters = desk(tmp_path / "whole", LORA), desk(tmp_path / "lora", LORA, trainable_only=True, **SEED)
    full, found = whole.trained(epochs=2), adapters.trained(epochs=2)
    assert found.keys() == ADAPTERS | RUNNING  # of a normalisation layer, what it counts changes in training
    assert all(torch.equal(full[name], found[name]) for name in found)
    carried = sum(tensor.nbytes for tensor in found.values())
    assert carried == 4 * (2 * 4 + 64 * 2 + 2 * 64 + 3 * 2) + 4 * 128 + 8
    sizes = [(one.folder / "out").stat().st_size for one in (adapters, whole)]
    assert sizes[0] == carried + len(read_layout(adapters.folder / "out").header)
    assert sizes[0] - sizes[1] == carried - sum(t.nbytes for t in full.values()) + (
        len(read_layout(adapters.folder / "out").header) - len(read_layout(whole.folder / "out").header)
    )


@pytest.mark.parametrize("update", ["fp32", "int8"])
def test_a_round_of_adapters_is_averaged_and_goes_on_in_the_next(tmp_path: Path, update: str) -> None:
    bench = desk(tmp_path, LORA, trainable_only=True, **SEED)
    chosen = None if update == "fp32" else codec("int8")
    files = []
    for shard in (0, 1):
        bench.trained(f"trained-{shard}", epochs=1, seed=shard)
        files.append(tmp_path / f"trained-{shard}")
        if chosen is not None:
            encode_update(bench.base, files[-1], tmp_path / f"encoded-{shard}", chosen)
            files[-1] = tmp_path / f"encoded-{shard}"
        inspect(files[-1], bench.base, digest=digest_of(files[-1]), norm_bound=None, codec=chosen)
    average(bench.base, [(file, 40) for file in files], Targets(tmp_path / "next"), rules=Rules(FedAvg(), chosen))
    assert read_layout(tmp_path / "next").notes.rest == read_layout(bench.base).notes.rest
    bench.base = tmp_path / "next"
    bench.trained("later", epochs=1)


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_worker_that_builds_another_rest_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    here = desk(tmp_path / "here", LORA, trainable_only=True, **SEED)
    there = desk(tmp_path / "there", LORA.replace("PRETRAINED = 11", "PRETRAINED = 12"), trainable_only=True, **SEED)
    there.base = here.base
    code, sentence = failed(there.train(epochs=1))
    assert code == "no_data"  # this worker cannot do the job; another may
    assert "give this machine the same pretrained weights and torch" in sentence
    assert failed(there.answer("evaluate", base=str(there.base), batch_size=8))[0] == "no_data"


def test_what_model_draws_is_the_same_whenever_a_child_builds_it(tmp_path: Path) -> None:
    source = LORA.replace("    torch.manual_seed(PRETRAINED)", "    pass")
    bench = desk(tmp_path, source, trainable_only=True, **SEED)
    later = bench.opened()
    assert bench.train("late", later, seed=99, round=7, epochs=1)["event"] == "done"


COUNTING = LORA.replace(
    "def dataset", "def loss(model, batch, config):\n    model.scale.add_(1.0)\n"
    "    return nn.functional.cross_entropy(model(batch[0]), batch[1])\n\ndef dataset"
)  # fmt: skip


def test_a_tensor_that_changes_and_does_not_travel_ends_the_job_in_words_and_is_not_trained_on(tmp_path: Path) -> None:
    bench = desk(tmp_path, COUNTING, trainable_only=True, **SEED)
    for _ in range(2):  # the second command must not find what the first one left
        code, sentence = failed(bench.train(epochs=1))
        assert code == "bad_task"
        assert sentence.startswith("'scale' changes while the model trains, and train.trainable_only lets only")
    assert torch.equal(bench.host._loaded(str(bench.base), 0).scale, torch.ones(100))  # type: ignore[arg-type]
    assert desk(tmp_path / "whole", COUNTING).train(epochs=1)["event"] == "done"


def test_a_checkpoint_has_the_adapters_and_not_the_rest(tmp_path: Path) -> None:
    bench = desk(tmp_path, LORA, trainable_only=True, **SEED)
    truth = bench.trained("truth", epochs=2)
    kept = {"checkpoint": str(tmp_path / "checkpoint"), "checkpoint_every_s": 0.0, "base_digest": "b"}
    assert broken_off(bench, 6, epochs=2, **kept)
    assert personal_in(tmp_path / "checkpoint").keys() == {f"model.{name}" for name in ADAPTERS | RUNNING}
    done = bench.train("again", bench.opened(), epochs=2, **kept)
    assert done["resumed_at"] == 6
    assert all(torch.equal(tensor, load_file(tmp_path / "again")[name]) for name, tensor in truth.items())


def test_the_notes_of_other_jobs_are_what_they_were(tmp_path: Path) -> None:
    with safe_open(desk(tmp_path).base, "pt") as file:
        assert json.loads(file.metadata()["lydian"]).keys() == {"aliases", "buffers", "variances"}


# ---------------------------------------------------------------- for any model


def test_every_tensor_is_shared_or_personal_or_built_and_never_two_of_them() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
            self.head.weight = self.embedding.weight
            self.norm, self.deep = nn.BatchNorm1d(4), nn.Linear(4, 4)
            self.register_buffer("mask", torch.ones(3))

    tied = {"head.weight": "embedding.weight"}
    for terms in (
        {"trainable_only": True, "frozen": ["deep.*", "embedding.*"]},
        {"personal": "batchnorm", "frozen": ["head.weight"]},
    ):
        model = Tied()
        freeze(model, terms["frozen"])
        assert not model.head.weight.requires_grad  # frozen under either name
        parts = parts_of(terms, model, tied)
        assert not parts.personal & parts.built
        assert ("head.weight" in parts.stays) == ("embedding.weight" in parts.stays)
    assert parts_of({}, Tied(), tied) == task_parts.WHOLE


def test_the_digest_of_the_rest_sees_names_dtypes_shapes_and_every_byte() -> None:
    state = {"a": torch.arange(6.0), "b": torch.tensor(True), "c": torch.zeros(0)}
    first = task_parts.digest_of(state, state)
    assert first == task_parts.digest_of(dict(reversed(state.items())), list(state))
    others = [{**state, "a": torch.arange(6.0).reshape(2, 3)}, {**state, "b": torch.tensor(False)}]
    others += [{**state, "a": torch.arange(6.0).double()}, {"x": state["a"], "b": state["b"], "c": state["c"]}]
    assert len({first, *(task_parts.digest_of(other, other) for other in others)}) == 5


def test_how_much_is_read_at_once_changes_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"a": torch.arange(100.0)}
    whole = task_parts.digest_of(state, state)
    monkeypatch.setattr(task_parts, "DIGEST_BYTES", 16)
    assert whole == task_parts.digest_of(state, state)
