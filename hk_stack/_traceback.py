"""Tracebacks without the frames of this library, as JAX leaves its own out."""

import contextlib
import functools
import inspect
import os
import types
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import haiku as hk
import jax

P = ParamSpec("P")
R = TypeVar("R")


def _folder(file: str | None) -> str:
    return os.path.dirname(file or "") + os.sep


_OURS = _folder(__file__)
_CALLED_BY_US = _folder(hk.__file__), _folder(jax.__file__), contextlib.__file__


def hidden(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose errors show the user's frames: callers, and what it calls.

    The same goes for the errors that led to them. The configuration
    `jax_traceback_filtering="off"` (`JAX_TRACEBACK_FILTERING` in the environment) shows
    all. An error of Python about its arguments says which they are.
    """

    @functools.wraps(function)
    def without_frames(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            trace = error.__traceback__
            if isinstance(error, TypeError) and trace and trace.tb_next is None:
                error.add_note(_how_to_call(function, str(error)))
            if jax.config.jax_traceback_filtering != "off":  # type: ignore[attr-defined]
                for each in _with_reasons(error):
                    each.__traceback__ = _of_user(each.__traceback__)
            raise

    return without_frames


def hidden_in_making(cls: type[R]) -> type[R]:
    """`cls`, in whose making errors show the user's frames."""
    made: Any = cls
    made.__init__ = hidden(made.__init__)
    return cls


def _how_to_call(function: Callable[..., Any], error: str) -> str:
    """What to write where Python says that arguments are missing, or too many."""
    name = function.__qualname__.rpartition("<locals>.")[2].removesuffix(".__init__")
    signature = inspect.signature(function)
    takes = [p for p in signature.parameters.values() if p.name != "self"]
    bare = [p.replace(annotation=p.empty) for p in takes]
    shown = signature.replace(parameters=bare, return_annotation=signature.empty)
    text = f"Write {name}{shown}."
    kinds = {p.kind for p in takes}
    if not takes or takes[0].name != "fn" or inspect.Parameter.VAR_KEYWORD in kinds:
        return text
    if "'fn'" in error:
        return f"{text} As a decorator with options: @functools.partial({name}, ...)."
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        bound = "functools.partial(fn, is_training=True)"
        return f"{text} What fn takes by keyword is bound before: {bound}."
    return f"{text} What fn takes comes in a second call: {name}(fn)(params, x)."


def _with_reasons(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that Python prints before it."""
    seen: list[BaseException] = []
    more: list[BaseException | None] = [error]
    while more:
        one = more.pop()
        if one is not None and one not in seen:
            seen.append(one)
            more += [one.__cause__, one.__context__]
    yield from seen


def _of_user(trace: types.TracebackType | None) -> types.TracebackType | None:
    """Without our frames, and those of libraries between them and the user's."""
    kept, is_hidden = [], False
    while trace:
        code = trace.tb_frame.f_code
        is_made = (code.co_filename, code.co_name) == ("<string>", "__init__")
        is_hidden = code.co_filename.startswith(_OURS) or (
            # What dataclasses write is in no file.
            is_hidden and (is_made or code.co_filename.startswith(_CALLED_BY_US))
        )
        if not is_hidden:
            kept.append(trace)
        trace = trace.tb_next
    for entry in reversed(kept):
        trace = types.TracebackType(
            trace, entry.tb_frame, entry.tb_lasti, entry.tb_lineno
        )
    return trace
