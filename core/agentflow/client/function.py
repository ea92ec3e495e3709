"""Functions as tasks: the decorator and the registry of what a worker can run."""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
import typing
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Generic, Literal, ParamSpec, TypeVar, overload

import msgspec
from msgspec import Struct

from agentflow.errors import InvalidRequest
from agentflow.events import Needs, Retry

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

Mode = Literal["async", "thread", "process"]

# Types that JSON gives back as they were: values of these need no conversion.
_PLAIN: Final = frozenset(
    {Any, int, float, str, bool, None, type(None), list, dict, object, inspect.Parameter.empty}
)


class Options(Struct, frozen=True, kw_only=True):
    """How a task is to be treated. Given to the decorator, and changed for one call with `options`."""

    priority: int | str = 500
    retry: Retry | None = None
    timeout_s: float = 0.0
    queue_timeout_s: float = 0.0
    needs: Needs | None = None
    lock: str = ""
    """Name of a lock that is held, exclusively, while the task runs."""


class Function(Generic[P, R]):
    """A function that can be run as a task. Made by `agentflow.task`."""

    def __init__(self, call: Callable[P, Any], name: str, mode: Mode, options: Options) -> None:
        self.call: Final = call
        self.name: Final = name
        self.mode: Final[Mode] = mode
        self.defaults: Final = options
        self.__doc__ = call.__doc__
        self.__name__ = getattr(call, "__name__", name)
        self.__qualname__ = getattr(call, "__qualname__", name)
        self.__module__ = call.__module__
        self.__wrapped__ = call
        self._types: _Types | None = None
        # What differs from the contract's defaults: most calls give nothing, and cost nothing.
        self.wire_options: Final = _changed(options)

    def __repr__(self) -> str:
        return f"<task {self.name}>"

    def __reduce__(self) -> tuple[Callable[[str, str], Function[..., Any]], tuple[str, str]]:
        if "<locals>" in self.__qualname__:
            raise pickle.PicklingError(
                f"{self.__qualname__} cannot be imported: define it at the top of a module"
            )
        return _imported, (self.__module__, self.name)

    def options(self, **changes: Any) -> Function[P, R]:
        """The same task with other options, for example `add.options(priority="high")`.

        Raises InvalidRequest for an option that does not exist.
        """
        unknown = changes.keys() - set(Options.__struct_fields__)
        if unknown:
            expected = ", ".join(Options.__struct_fields__)
            raise InvalidRequest(f"unknown option {', '.join(sorted(unknown))}; expected one of {expected}")
        options = msgspec.structs.replace(self.defaults, **changes)
        return Function(self.call, self.name, self.mode, options)

    @property
    def types(self) -> _Types:
        """What its arguments and its result have to be converted to."""
        if self._types is None:
            self._types = _Types(self.call)
        return self._types


def _imported(module: str, name: str) -> Function[..., Any]:
    """The task of that name, in another process."""
    importlib.import_module(module)
    return _registry[name]


def _changed(options: Options) -> dict[str, Any]:
    plain = Options()
    chosen = {name: getattr(options, name) for name in Options.__struct_fields__}
    return _floats({name: value for name, value in chosen.items() if value != getattr(plain, name)})


class SyncFunction(Function[P, R]):
    """A plain function: runs in a thread or in a child process of the worker."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call it here and now, without AgentFlow."""
        result: R = self.call(*args, **kwargs)
        return result


class AsyncFunction(Function[P, R]):
    """A coroutine function: runs on the worker's event loop."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call it here and now, without AgentFlow."""
        coroutine: Coroutine[Any, Any, R] = self.call(*args, **kwargs)
        return coroutine


class _Types:
    """The annotated types of a function that JSON does not give back as they were."""

    def __init__(self, call: Callable[..., Any]) -> None:
        try:
            hints = typing.get_type_hints(call, include_extras=True)
        except (NameError, TypeError):
            hints = {}
        self.result: Any = _convertible(hints.get("return", Any))
        parameters = inspect.signature(call).parameters.values()
        self._by_name = {
            parameter.name: hints[parameter.name]
            for parameter in parameters
            if parameter.name in hints and _convertible(hints[parameter.name]) is not Any
        }
        self._variadic = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
        self._names = [parameter.name for parameter in parameters]

    def convert(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Arguments as the function's annotations want them. Raises msgspec.ValidationError."""
        if not self._by_name or self._variadic:
            return args, kwargs
        wanted = self._by_name
        named = zip(self._names, args, strict=False)
        converted = [_convert(wanted, name, value) for name, value in named]
        return converted + list(args[len(converted) :]), {
            name: _convert(wanted, name, value) for name, value in kwargs.items()
        }


def _convert(wanted: Mapping[str, Any], name: str, value: Any) -> Any:
    return msgspec.convert(value, wanted[name], strict=False) if name in wanted else value


def _convertible(hint: Any) -> Any:
    """The type if values must be converted to it and msgspec can; Any otherwise."""
    try:
        if hint in _PLAIN:
            return Any
        msgspec.json.Decoder(hint)
    except TypeError:
        return Any
    return hint


_registry: Final[dict[str, Function[..., Any]]] = {}


def registered() -> Mapping[str, Function[..., Any]]:
    """Every function made a task in this process, by name."""
    return _registry


def default_name(call: Callable[..., Any]) -> str:
    """`<module>.<function>`; a script that is run directly is called after its file."""
    module = call.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        module = Path(getattr(main, "__file__", None) or "__main__").stem
    return f"{module}.{call.__qualname__}"


@overload
def task(  # type: ignore[overload-overlap]  # a coroutine function matches the second as well; the first wins
    function: Callable[P, Coroutine[Any, Any, R]], /
) -> AsyncFunction[P, R]: ...
@overload
def task(function: Callable[P, R], /) -> SyncFunction[P, R]: ...
@overload
def task(
    *,
    name: str = ...,
    process: bool = ...,
    priority: int | str = ...,
    retry: Retry | None = ...,
    timeout_s: float = ...,
    queue_timeout_s: float = ...,
    needs: Needs | None = ...,
    lock: str = ...,
) -> _Decorator: ...
def task(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str = "",
    process: bool = False,
    **options: Any,
) -> Any:
    """Make a function a task that workers can run.

        @agentflow.task
        async def add(a: int, b: int) -> int: ...

        @agentflow.task(name="render.page", process=True, timeout_s=30, retry=agentflow.Retry(max_attempts=5))
        def render(page: int) -> str: ...

    The function itself can still be called as before. Coroutine functions run on the worker's
    event loop, plain ones in a thread or, with `process`, in a child process that can be
    killed when it takes too long. With `lock="stock"` a lock of that name is held while it runs:
    no other task that names it runs meanwhile, nor whoever holds it with `Client.lock`.

    Raises InvalidRequest for an unknown option, or a name already taken by another function.
    """
    if function is not None:
        return _make(function, name, Options(), process=process)
    chosen = msgspec.structs.replace(Options(), **_floats(options))
    return _Decorator(name, chosen, process=process)


def _floats(options: dict[str, Any]) -> dict[str, Any]:
    return {key: float(value) if key.endswith("_s") else value for key, value in options.items()}


class _Decorator:
    def __init__(self, name: str, options: Options, *, process: bool) -> None:
        self._name, self._options, self._process = name, options, process

    @overload
    def __call__(  # type: ignore[overload-overlap]  # as above
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncFunction[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> SyncFunction[P, R]: ...
    def __call__(self, function: Callable[..., Any], /) -> Any:
        return _make(function, self._name, self._options, process=self._process)


def _make(call: Callable[..., Any], name: str, options: Options, *, process: bool) -> Function[..., Any]:
    name = name or default_name(call)
    known = _registry.get(name)
    if known is not None and not _same_place(known.call, call):
        raise InvalidRequest(f"two functions want to be the task {name!r}: {known.call!r} and {call!r}")
    made: Function[..., Any]
    if inspect.iscoroutinefunction(call):
        if process:
            raise InvalidRequest(
                f"{name}: a coroutine function runs on the loop, it cannot have process=True"
            )
        made = AsyncFunction(call, name, "async", options)
    else:
        made = SyncFunction(call, name, "process" if process else "thread", options)
    _registry[name] = made
    return made


def _same_place(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether both are the same definition, perhaps imported twice."""
    first, second = getattr(one, "__code__", None), getattr(other, "__code__", None)
    if first is None or second is None:
        return one is other
    return bool(first.co_filename == second.co_filename and first.co_firstlineno == second.co_firstlineno)
