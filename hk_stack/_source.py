"""Where equations come from: lines of the user's source, and functions of JAX.

Both are found out only when somebody asks. What an equation says of its source survives
when it is traced again, in batches or inside another transformation.
"""

import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core as jex

from hk_stack import _equations

UNKNOWN = "unknown source"


def line(eqn: jex.JaxprEqn) -> str:
    """Where the user wrote what became `eqn`: `file.py:line in function`."""
    for frame in _frames(eqn):
        if not _is_library(frame.file_name):
            name = pathlib.Path(frame.file_name).name
            function = frame.function_name.rpartition("<locals>.")[-1]
            return f"{name}:{frame.line_num} in {function}"
    return UNKNOWN


def library_function(eqn: jex.JaxprEqn) -> str:
    """The function of JAX that the user called to run `eqn`; nothing if none."""
    if called := re.search(r"\bjit\((\w+)\)", str(eqn.source_info.name_stack)):
        return called[1]
    body = _function(eqn)
    return _name(body) if body and _is_of_jax(body) else ""


def function(eqn: jex.JaxprEqn) -> str:
    """That, or the user's function that `eqn` runs, or its primitive."""
    body, name = _function(eqn), eqn.primitive.name
    return library_function(eqn) or (body and _name(body)) or name


def _function(eqn: jex.JaxprEqn) -> jex.Jaxpr | None:
    """The function that `eqn` is a call of, if it is."""
    if eqn.primitive.name in (*_equations.JIT, *_equations.CUSTOM_DERIVATIVES):
        return next(_equations.bodies(eqn), None)
    return None


def of_body(eqn: jex.JaxprEqn, body: jex.Jaxpr, around: Any) -> Any:
    """What the equations of `body` are to say of their source; None: what they do.

    A function of JAX is traced once under `jit`, so its equations say who called it
    first, or nobody. They are given the line of the call, and the name of the function;
    of functions in one another, that of the outermost, which is the one that the user
    knows. Names are written as in the metadata of programs that JAX compiles.

    Args:
      eqn: A `jit` or rematerialised equation.
      body: What it runs.
      around: What the function around it says.
    """
    if not _is_of_jax(body):
        return None  # The user's, or what a library wraps around the user's.
    if around or eqn.primitive.name in _equations.REMAT:
        return around
    info: Any = eqn.source_info
    if name := _name(body):
        info = info.replace(name_stack=info.name_stack.extend(f"jit({name})"))
    return info


def is_ours(eqn: jex.JaxprEqn) -> bool:
    """Whether a cut made `eqn`, and not the user or a function that they called."""
    files = (frame.file_name for frame in _frames(eqn))
    return next((_is_in(_HERE, f) for f in files if not _is_below(f)), False)


def _frames(eqn: jex.JaxprEqn) -> Sequence[Any]:
    """Where Python was when `eqn` was traced, innermost first."""
    traceback: Any = eqn.source_info.traceback
    return traceback.frames if traceback else ()


def _name(body: jex.Jaxpr) -> str:
    """The name of a function, as users know it; nothing if it has none."""
    name = body.debug_info.func_name.strip("_")
    return name if name.isidentifier() else ""


def _is_of_jax(body: jex.Jaxpr) -> bool:
    file_name = body.debug_info.func_filename
    return file_name is None or _is_below(file_name)


@functools.cache
def _is_library(file_name: str) -> bool:
    parts = pathlib.Path(file_name).parts
    is_ours = _is_in(_HERE, file_name)
    return is_ours or _is_below(file_name) or not _LIBRARIES.isdisjoint(parts)


@functools.cache
def _is_below(file_name: str) -> bool:
    """Whether a file is JAX's or Python's, which run code that is neither's."""
    return _JAX in pathlib.Path(file_name).parents or _is_in(_PYTHON, file_name)


def _is_in(folder: pathlib.Path, file_name: str) -> bool:
    return pathlib.Path(file_name).parent == folder


_HERE, _JAX, _PYTHON = (
    pathlib.Path(str(file)).parent
    for file in (__file__, jax.__file__, functools.__file__)
)
_LIBRARIES = frozenset(("haiku", "flax", "equinox"))
