"""examples/experiments: every script runs in its smallest size, and prints its table. On a data set made up here."""

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]  # seconds: several simulations each

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "examples" / "experiments"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four files as Fashion-MNIST has them, of a few pictures whose brightness is their class."""
    for split, count in (("train", 400), ("t10k", 50)):
        classes = (np.arange(count) % 10).astype(np.uint8)
        images = np.repeat(classes * 25, 28 * 28)
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", (count, 28, 28), images)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", (count,), classes)
    return tmp_path


def write_idx(file: Path, shape: tuple[int, ...], values: np.ndarray) -> None:
    header = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
    file.write_bytes(gzip.compress(header + values.tobytes()))


def said_by(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXPERIMENTS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows_of(said: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The cells of the Markdown table, without its two lines of head."""
    assert said.returncode == 0, said.stderr
    lines = [line for line in said.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_mcmahan_says_never_where_a_target_was_not_reached(data: Path) -> None:
    case = ("--partitions", "labels", "--epochs", "5")
    said = said_by("mcmahan.py", "--quick", "--data", str(data), "--target", "1.1", *case)
    assert rows_of(said) == [["two labels a client", "5", "never in 2", "–", "–"]]


def test_low_communication_prints_what_a_way_moved_draws_it_and_keeps_it(data: Path, tmp_path: Path) -> None:
    plot, kept = tmp_path / "bytes.png", tmp_path / "kept"
    arguments = ("--quick", "--data", str(data), "--keep", str(kept), "--ways", "diloco, topk")
    first = said_by("low_communication.py", *arguments, "--plot", str(plot))
    ((way, rounds, seeds, accuracy, megabytes, _),) = rows_of(first)
    assert (way, rounds, seeds) == ("diloco, topk", "1", "1")
    assert 0 < float(accuracy) <= 1
    assert 0 < float(megabytes) < 0.05  # whole, two updates are 0.408
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert said_by("low_communication.py", *arguments).stdout == first.stdout  # nothing ran: it was kept
    assert len(list(kept.iterdir())) == 1


def test_a_simulation_that_fails_ends_the_experiment_with_what_it_said(data: Path) -> None:
    said = said_by("mcmahan.py", "--data", str(data), "--lr", "-1")
    assert said.returncode == 1
    assert "evenly, E = 1, seed 0 failed" in said.stderr
    assert "train.lr" in said.stderr
    assert said.stdout == ""
