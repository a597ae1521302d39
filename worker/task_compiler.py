"""torch's compiler, loaded when somebody compiles and not before.

Part of the child (worker/task_host.py), which loads it by its path: torch, none of our packages.

The first optimiser of a process imports torch._dynamo only to say that its methods are not to be compiled: 890
modules, about as long as torch itself takes, and 150 MB, for nothing where nothing is compiled. So until then a
stand-in says the two things that optimisers ask for. Whatever else is asked for, of it or below it, brings the real
one, which then has the say in all that went through the stand-in before.

Source: torch/_compile.py (`_disable_dynamo`) and torch/optim/optimizer.py (`_use_grad_for_differentiable`) of torch 2.7
to 2.14. A torch whose optimisers ask for more than these gets the real one, and the time is what it was.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"


class StandIn(ModuleType):
    """torch._dynamo, until somebody wants more of it than to be let alone."""

    def __init__(self) -> None:
        super().__init__(COMPILER)
        self.__spec__ = importlib.util.find_spec(COMPILER)
        self.__file__ = None if self.__spec__ is None else self.__spec__.origin  # who walks all modules asks for it

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the real one has there
        if name.startswith("__") and name != "__path__":  # of any module; to look at it is not to use it
            raise AttributeError(f"module {COMPILER!r} has no attribute {name!r}")
        return getattr(self._real(), name)

    def _real(self) -> ModuleType:
        """The compiler itself, in this one's place; imported when it is asked for first."""
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        return importlib.import_module("torch._dynamo")

    def graph_break(self, *arguments: Any, **named: Any) -> None:  # noqa: ANN401 - as the real one takes it
        """Nothing is being compiled, so there is nothing to break."""
        if sys.modules.get(COMPILER) is not self:
            self._real().graph_break(*arguments, **named)

    def disable(self, method: Callable[..., Any] | None = None, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - likewise
        """The method, which the compiler leaves alone as soon as there is one."""
        if method is None or sys.modules.get(COMPILER) is not self:
            return self._real().disable(method, *arguments, **named)
        left_alone: list[Callable[..., Any]] = []

        @wraps(method)
        def either(*given: Any, **by_name: Any) -> Any:  # noqa: ANN401 - the method's own
            if sys.modules.get(COMPILER) is self:
                return method(*given, **by_name)
            if not left_alone:
                left_alone.append(self._real().disable(method, *arguments, **named))
            return left_alone[0](*given, **by_name)

        return either


def wait_until_asked_for() -> None:
    """Have torch's compiler loaded by the first that uses it. Nothing happens where it is loaded already."""
    if COMPILER not in sys.modules:
        sys.modules[COMPILER] = StandIn()
