"""Tracebacks without the frames of this library, as JAX leaves its own out."""

import contextlib
import functools
import os
import types
from collections.abc import Callable
from typing import ParamSpec, TypeVar

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

    The configuration `jax_traceback_filtering="off"` (`JAX_TRACEBACK_FILTERING` in the
    environment) shows all.
    """

    @functools.wraps(function)
    def without_frames(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if jax.config.jax_traceback_filtering != "off":  # type: ignore[attr-defined]
                error.__traceback__ = _of_user(error.__traceback__)
            raise

    return without_frames


def _of_user(trace: types.TracebackType | None) -> types.TracebackType | None:
    """Without our frames, and those of libraries between them and the user's."""
    kept, is_hidden = [], False
    while trace:
        file = trace.tb_frame.f_code.co_filename
        is_hidden = file.startswith(_OURS) or (
            is_hidden and file.startswith(_CALLED_BY_US)
        )
        if not is_hidden:
            kept.append(trace)
        trace = trace.tb_next
    for entry in reversed(kept):
        trace = types.TracebackType(
            trace, entry.tb_frame, entry.tb_lasti, entry.tb_lineno
        )
    return trace
