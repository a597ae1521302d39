"""Masked update files: their sum is the plain sum of whole numbers, and one of them alone is noise."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from common.errors import BadUpdateError
from common.fixed import Fixed
from common.masked import length, mask_update
from common.secure import masks_left
from common.weights import Array, Notes, file_digest, load, read_layout, save
from server.folding import Stopped
from server.unmasking import inspect_masked, unmask
from tests.secure_kit import Sum

pytest.importorskip("cryptography")

FIXED = Fixed(clip=64.0, bits=38)
NOTES = Notes(variances={"bn.var": "bn.mean"})


def model(seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        "weight": random.normal(size=(7, 11)).astype(np.float32),
        "half": random.normal(size=5).astype(ml_dtypes.bfloat16),
        "wide": random.normal(size=3),
        "bn.mean": random.normal(size=4).astype(np.float32),
        "bn.var": random.uniform(size=4).astype(np.float32),
        "bn.count": np.array(seed, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }


class Round:
    """Files of one round: a base, what workers trained, and what they sent."""

    def __init__(self, folder: Path, samples: dict[int, int], *, threshold: int = 3) -> None:
        self.folder, self.samples = folder, samples
        self.sum = Sum.of(sorted(samples), threshold)
        self.base = folder / "base"
        save(self.base, model(0), NOTES)
        for shard in samples:
            save(folder / f"trained-{shard}", model(shard + 1), NOTES)

    def send(self, shard: int, *, block_elements: int = 8) -> Path:
        target = self.folder / f"update-{shard}"
        masks = self.sum.secrets[shard].masks(self.sum.roster, shard, sorted(self.samples))
        trained, samples = self.folder / f"trained-{shard}", self.samples[shard]
        mask_update(self.base, trained, target, FIXED, samples, masks, block_elements=block_elements)
        return target

    def unmasked(self, survivors: list[int], *, block_elements: int = 8) -> tuple[dict[str, Array], int]:
        group, target = sorted(self.samples), self.folder / "unmasked"
        masks = masks_left(self.sum.roster, group, survivors, self.sum.reveals(group, survivors, survivors))
        updates = [self.folder / f"update-{shard}" for shard in survivors]
        samples = unmask(self.base, updates, target, fixed=FIXED, masks=masks, block_elements=block_elements)
        return load(target), samples

    def plain(self, survivors: list[int]) -> dict[str, Array]:
        """The fixed-point mean, from the trained models themselves."""
        base, total = load(self.base), sum(self.samples[shard] for shard in survivors)
        made: dict[str, Array] = {}
        for name, old in base.items():
            if name == "bn.count":
                made[name] = old
                continue
            numbers = np.zeros(old.size, np.int64)
            for shard in survivors:
                new = load(self.folder / f"trained-{shard}")[name]
                change = new.astype(np.float64).reshape(-1) - old.astype(np.float64).reshape(-1)
                numbers += np.rint(change * 2.0**FIXED.fraction).astype(np.int64) * self.samples[shard]
            mean = numbers.astype(np.float64) / float(total) * 2.0**-FIXED.fraction
            value = old.astype(np.float64) + mean.reshape(old.shape)
            wide = value if old.dtype == np.float64 else value.astype(np.float32)
            made[name] = wide.astype(old.dtype)
        return made


@pytest.mark.parametrize("survivors", [[0, 1, 2, 3], [0, 2, 3]])
def test_the_unmasked_model_is_the_plain_fixed_point_mean_bit_by_bit(tmp_path: Path, survivors: list[int]) -> None:
    played = Round(tmp_path, {0: 10, 1: 1, 2: 300, 3: 7})
    for shard in survivors:
        played.send(shard)
    found, samples = played.unmasked(survivors)
    assert samples == sum(played.samples[shard] for shard in survivors)
    for name, value in played.plain(survivors).items():
        assert found[name].dtype == value.dtype
        assert found[name].tobytes() == value.tobytes(), name


def test_the_size_of_a_block_changes_no_byte(tmp_path: Path) -> None:
    played = Round(tmp_path, {0: 10, 1: 1, 2: 300})
    digests = {file_digest(played.send(0, block_elements=size)) for size in (1, 5, 1000)}
    assert len(digests) == 1
    for shard in (1, 2):
        played.send(shard)
    models = [played.unmasked([0, 1, 2], block_elements=size)[0] for size in (3, 1000)]
    assert all(models[0][name].tobytes() == models[1][name].tobytes() for name in models[0])


def test_numbers_beyond_the_clip_are_cut_and_counted(tmp_path: Path) -> None:
    played = Round(tmp_path, {0: 1, 1: 1, 2: 1})
    far = model(1)
    far["weight"][0, :2] += 1000.0
    save(tmp_path / "trained-0", far, NOTES)
    masks = played.sum.secrets[0].masks(played.sum.roster, 0, [0, 1, 2])
    done = mask_update(played.base, tmp_path / "trained-0", tmp_path / "update-0", FIXED, 1, masks)
    assert done.cut == 2


def test_a_diverged_model_is_not_sent(tmp_path: Path) -> None:
    played = Round(tmp_path, {0: 1, 1: 1, 2: 1})
    wrong = model(1)
    wrong["weight"][3, 4] = np.nan
    save(tmp_path / "trained-0", wrong, NOTES)
    with pytest.raises(BadUpdateError, match=r"the change of 'weight' at element 37 is not finite"):
        played.send(0)
    assert not (tmp_path / "update-0").exists()


def test_a_model_of_another_shape_is_not_sent(tmp_path: Path) -> None:
    played = Round(tmp_path, {0: 1, 1: 1, 2: 1})
    save(tmp_path / "trained-0", {**model(1), "weight": np.zeros((7, 12), np.float32)}, NOTES)
    with pytest.raises(BadUpdateError, match="has no 'weight' like the base"):
        played.send(0)


# ---------------------------------------------------------------- the coordinator's look


def test_a_masked_update_passes_the_look_and_another_file_does_not(tmp_path: Path) -> None:
    played = Round(tmp_path, {0: 1, 1: 1, 2: 1})
    update = played.send(0)
    inspect_masked(update, played.base, digest=file_digest(update))
    with pytest.raises(BadUpdateError, match="was damaged on its way") as damaged:
        inspect_masked(update, played.base, digest="0" * 64)
    assert damaged.value.code == "digest_mismatch"
    plain = tmp_path / "trained-1"
    with pytest.raises(BadUpdateError, match="a masked update of this model") as refused:
        inspect_masked(plain, played.base, digest=file_digest(plain))
    assert refused.value.code == "bad_encoding"
    assert read_layout(update).tensors[0].shape == (length(read_layout(played.base)),)


def test_a_sum_with_a_mask_left_in_it_is_refused_by_its_samples(tmp_path: Path) -> None:
    played = Round(tmp_path, {0: 1, 1: 1, 2: 1})
    updates = [played.send(shard) for shard in (0, 1)]
    with pytest.raises(BadUpdateError, match="2 masked updates say that they have") as refused:
        unmask(played.base, updates, tmp_path / "unmasked", fixed=FIXED, masks=[])
    assert refused.value.code == "bad_samples"
    assert not (tmp_path / "unmasked").exists()


def test_unmasking_can_be_broken_off(tmp_path: Path) -> None:
    played = Round(tmp_path, {0: 1, 1: 1, 2: 1})
    updates = [played.send(shard) for shard in (0, 1, 2)]
    masks = masks_left(played.sum.roster, [0, 1, 2], [0, 1, 2], played.sum.reveals([0, 1, 2], [0, 1, 2], [0, 1, 2]))
    with pytest.raises(Stopped, match="unmasking was broken off"):
        unmask(played.base, updates, tmp_path / "unmasked", fixed=FIXED, masks=masks, stopped=lambda: True)
    assert not (tmp_path / "unmasked").exists()
