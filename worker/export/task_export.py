"""Builds a model by a task file, puts weights into it, and writes it as a program of torch.export.

Runs as a script, with torch and the user's task file and none of our packages. On stdin one JSON object: task, model,
to, config, shape (of one sample; null: the data set is asked for one). The number of samples a call is left open.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def task_of(file: Path) -> Any:  # noqa: ANN401 - a module
    """The task file as a module; files beside it can be imported by it."""
    sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location("lydian_task", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file.name} is not a Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sample_of(task: Any, config: dict[str, Any], shape: list[int] | None) -> torch.Tensor:  # noqa: ANN401
    """Two samples as one batch: with one, the number of samples a call would be taken for a constant.

    Raises:
        SystemExit: there is no data here, or it is not (x, y) with a tensor x; --shape says it instead.
    """
    if shape is not None:
        return torch.zeros([2, *shape])
    try:
        x = next(part for part in task.dataset(config, "train")[0] if isinstance(part, torch.Tensor))
    except (OSError, StopIteration, TypeError) as error:
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise SystemExit(
            f"dataset(config, 'train') gives no sample (x, y) here ({words}): say its shape with --shape, e.g. 3,32,32"
        ) from error
    return torch.stack([x, x])


def main() -> None:
    """Export what stdin asks for."""
    asked = json.load(sys.stdin)
    task, config = task_of(Path(asked["task"])), asked["config"]
    model = task.model(config)
    model.load_state_dict(load_file(asked["model"]))
    model.eval()
    batch = sample_of(task, config, asked["shape"])
    program = torch.export.export(model, (batch,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, asked["to"])


if __name__ == "__main__":
    main()
