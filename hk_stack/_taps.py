"""Values out of the middle of a traced program: what is at the marks of `inside`."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hk_stack import _checks, _eager, _equations, _flat, _frames


def collect(
    fn: Callable[..., Any],
    select: str | Sequence[str] = "*",
    *,
    add: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """`fn`, returning besides what it returns the values at the taps inside of it.

    For a stack `layer_stack(L, name="layers")` of

    ```
    def layer(x):
        x = hk_stack.tap(f(x), "hidden")
        return g(x)
    ```

    `out, taps = collect(apply)(params, rng, x)` is equal to

    ```
    for i in range(L):
        x = taps["layers/hidden"][i] = f(x)
        x = g(x)
    ```

    >>> import haiku as hk, jax, jax.numpy as jnp, hk_stack
    >>> def layer(x):
    ...     return hk_stack.tap(jnp.tanh(hk.Linear(4)(x)), "hidden")
    >>> model = hk.transform(hk_stack.layer_stack(3, name="layers")(layer))
    >>> params = model.init(jax.random.key(0), jnp.ones([2, 4]))
    >>> out, taps = hk_stack.collect(model.apply)(params, None, jnp.ones([2, 4]))
    >>> jax.tree.map(jnp.shape, taps)
    {'layers/hidden': (3, 2, 4)}

    The gradient of a result by a tapped value is that by what is added to it:

    >>> def score(shift):
    ...     return hk_stack.collect(model.apply, add=shift)(params, None, x)[0].sum()
    >>> x = jnp.ones([2, 4])
    >>> jax.tree.map(jnp.shape, jax.grad(score)({k: 0 * v for k, v in taps.items()}))
    {'layers/hidden': (3, 2, 4)}

    Args:
      fn: Any function, such as the `apply` of a transform, also one that takes
        gradients. It is traced on its arrays; numbers, booleans and other arguments
        stay as they are.
      select: Globs of the paths to collect, as in `fnmatch`: `*` also matches slashes.
        What is not selected is neither computed nor kept for it.
      add: Arrays `[L, ...]` to add to the tapped values, by path, wherever there is a
        tap of this path. The layer must use what `tap` returns. Outside of stacks
        without `L`; in nested stacks `[L_outer, L_inner, ...]`. They need not be
        selected.

    Returns:
      A function that takes what `fn` takes, and returns what it returns and a dict of
      the tapped values `[L, ...]`, by path; `[L_outer, L_inner, ...]` in nested stacks,
      `[T, ...]` in a `scan` of T turns. A path that is there more than once is
      numbered: `scores`, `scores_1`. It may be used under `jit`, `grad` and `vmap`.
      Under a `vmap` inside of `fn`, the batch axis is where `vmap` has put it.

    Raises:
      TypeError: If `fn` is no function, or `select` no text.
      ValueError: If nothing matches what is selected; if what is added fits no tap; if
        a tap is in a conditional, a `while` or a function with its own derivative,
        which no value can leave.
    """
    patterns = _checks.collected(fn, select)
    values = None if add is None else {k: jnp.asarray(v) for k, v in add.items()}

    @functools.wraps(fn)
    def collected(*args: Any, **kwargs: Any) -> Any:
        run, arrays = on_arrays(fn, args, kwargs)
        adding = None if values is None else _frames.Adding(values)
        with _frames.collecting(_frames.Collector(patterns, adding)):
            closed, shapes = jax.make_jaxpr(run, return_shape=True)(arrays)
        exposed, constants, marks = expose(closed)
        found = _unique(list(map(_name, marks)))
        used = adding.used if adding else set()
        lost = sorted({*(add or ())} - used)
        _checks.some_taps(patterns, select, found, lost, lambda: _all_taps(run, arrays))
        inputs = [*constants, *arrays.values()]
        results = _run(exposed, inputs)
        count = len(results) - len(marks)
        out = jax.tree.unflatten(jax.tree.structure(shapes), results[:count])
        return out, dict(zip(found, results[count:], strict=True))

    return collected


def _all_taps(run: Callable[..., Any], arrays: dict[int, Any]) -> list[str]:
    """The paths of all taps, for an error."""
    adding = _frames.Adding({})
    with _frames.collecting(_frames.Collector((), adding)):
        jax.eval_shape(run, arrays)
    return sorted(adding.seen)


def _name(mark: _frames.Mark) -> str:
    """The path of a tap; with the layer's index if it is not in all layers."""
    indices = ",".join(str(i) for i, _ in mark.indices)
    return f"{mark.label}[{indices}]" if indices else mark.label


def _unique(paths: Sequence[str]) -> list[str]:
    """Paths, of which those that are there more than once are numbered."""
    taken: dict[str, None] = {}
    for path in paths:
        numbers = (f"{path}_{i}" if i else path for i in itertools.count())
        taken[next(name for name in numbers if name not in taken)] = None
    return list(taken)


def _run(program: jex.ClosedJaxpr, inputs: list[Any]) -> list[Any]:
    """Runs a program, compiled if it has no side effects (checks are such)."""
    run = jex.jaxpr_as_fun(program)
    if program.effects:
        return run(*inputs)
    return _eager.call(
        lambda values: run(*values), inputs, lambda structure: structure(program)
    )


def on_arrays(
    fn: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Callable[[dict[int, Any]], Any], dict[int, Any]]:
    """`fn` as a function of its arrays alone, and these; all else stays as it is."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)}

    def run(arrays: dict[int, Any]) -> Any:
        now = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(tree, now)
        return fn(*args, **kwargs)

    return run, arrays


def expose(
    closed: jex.ClosedJaxpr,
) -> tuple[jex.ClosedJaxpr, list[Any], list[_frames.Mark]]:
    """Takes the values at marks out of a traced function.

    Args:
      closed: A traced function.

    Returns:
      The same without marks, whose constants are its first inputs, and whose last
      outputs are the values at the marks; these constants; and what the marks are.
    """
    jaxpr = _flat.without_constants(closed.jaxpr)
    if not _has_marks(jaxpr):
        return jex.ClosedJaxpr(jaxpr, []), closed.consts, []
    found: list[_frames.Mark] = []

    def run(*args: Any) -> list[Any]:
        outputs, marked = _evaluate(jaxpr, args)
        entries = _folded(marked)
        found[:] = [entry.mark for entry in entries]
        return [*outputs, *(entry.value for entry in entries)]

    exposed = jax.make_jaxpr(run)(*(v.aval for v in jaxpr.invars))
    # Functions under `jit` may have had constants of their own.
    constants = [*exposed.consts, *closed.consts]
    exposed = jex.ClosedJaxpr(_flat.without_constants(exposed.jaxpr), [])
    return exposed, constants, found


class _Marked(NamedTuple):
    """A value at a mark."""

    mark: _frames.Mark
    value: Any


def _evaluate(jaxpr: jex.Jaxpr, args: Sequence[Any]) -> tuple[list[Any], list[_Marked]]:
    """Runs `jaxpr`, which has no constants; returns its outputs and what is marked."""
    env = dict(zip(jaxpr.invars, args, strict=True))
    found: list[_Marked] = []

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        inputs = list(map(read, eqn.invars))
        mark = _mark(eqn)
        if mark is not None:
            results, more = inputs, [_Marked(mark, inputs[0])]
        elif any(map(_has_marks, _equations.bodies(eqn))):
            results, more = _open(eqn, inputs)
        else:
            results, more = _run_one(eqn, inputs), []
        env.update(zip(eqn.outvars, results, strict=True))
        found += more
    return list(map(read, jaxpr.outvars)), found


def _mark(eqn: jex.JaxprEqn) -> _frames.Mark | None:
    if eqn.primitive.name == "name":
        return _frames.read_mark(eqn.params["name"])
    if eqn.primitive.name == "custom_vmap_call":  # Around the mark of a check.
        marks = [_mark(inner) for body in _equations.bodies(eqn) for inner in body.eqns]
        if len(marks) == 1 and marks[0] and not marks[0].is_tap:
            return marks[0]
    return None


def _has_marks(jaxpr: jex.Jaxpr) -> bool:
    return any(
        _mark(eqn) is not None or any(map(_has_marks, _equations.bodies(eqn)))
        for eqn in jaxpr.eqns
    )


def _run_one(eqn: jex.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Runs an equation as it is."""
    return jex.jaxpr_as_fun(_equations.alone(eqn))(*inputs)


def _open(eqn: jex.JaxprEqn, inputs: Sequence[Any]) -> tuple[list[Any], list[_Marked]]:
    """Runs an equation with marks inside."""
    name, params = eqn.primitive.name, eqn.params
    if name in _equations.REMAT:
        if params["differentiated"]:  # A backward pass computes again what was there.
            return _run_one(eqn, inputs), []
        return _open_remat(eqn, params["jaxpr"], inputs)
    if name in _equations.JIT:
        closed = params["jaxpr"]
        body = _flat.without_constants(closed.jaxpr)
        return _evaluate(body, [*closed.consts, *inputs])
    if name == "scan":
        return _open_scan(eqn, inputs)
    for inner in _equations.bodies(eqn):
        for mark in _marks(inner):
            if mark.is_tap:
                raise ValueError(
                    f"hk_stack.collect: the tap {mark.label} is inside a "
                    f"{name}, which no value can leave. Return the value "
                    "from there and tap it outside, or do not select it."
                )
    return _run_one(eqn, inputs), []  # Checks are left out there.


def _marks(jaxpr: jex.Jaxpr) -> list[_frames.Mark]:
    """All marks, those inside equations too."""
    own = [mark for eqn in jaxpr.eqns if (mark := _mark(eqn))]
    inner = (_marks(body) for eqn in jaxpr.eqns for body in _equations.bodies(eqn))
    return [*own, *itertools.chain(*inner)]


def _open_remat(
    eqn: jex.JaxprEqn, body: jex.Jaxpr, inputs: Sequence[Any]
) -> tuple[list[Any], list[_Marked]]:
    marks: list[_frames.Mark] = []

    def run(*args: Any) -> tuple[list[Any], list[Any]]:
        outputs, found = _evaluate(body, args)
        marks[:] = [entry.mark for entry in found]
        return outputs, [entry.value for entry in found]

    options = {k: eqn.params[k] for k in ("prevent_cse", "policy")}
    outputs, values = jax.checkpoint(run, **options)(*inputs)
    return outputs, list(map(_Marked, marks, values))


def _open_scan(
    eqn: jex.JaxprEqn, inputs: Sequence[Any]
) -> tuple[list[Any], list[_Marked]]:
    params, closed = eqn.params, eqn.params["jaxpr"]
    carried = _equations.carried(eqn)
    first, count = carried.start, len(carried)
    body = _flat.without_constants(closed.jaxpr)
    shared = [*closed.consts, *inputs[:first]]
    marks: list[_frames.Mark] = []

    def turn(carry: Any, own: Any) -> tuple[Any, Any]:
        outputs, found = _evaluate(body, [*shared, *carry, *own])
        entries = _folded(found, in_scan=True)
        marks[:] = [entry.mark for entry in entries]
        return outputs[:count], (outputs[count:], [entry.value for entry in entries])

    options = {k: params[k] for k in ("length", "reverse", "unroll")}
    carry, mapped = inputs[first : first + count], inputs[first + count :]
    carry, (outputs, values) = jax.lax.scan(turn, carry, mapped, **options)
    found = [
        _Marked(mark, value if mark.is_tap else _frames.first_code(value))
        for mark, value in zip(marks, values, strict=True)
    ]
    return [*carry, *outputs], found


def _folded(found: Sequence[_Marked], *, in_scan: bool = False) -> list[_Marked]:
    """Puts together the taps of the layers that a Python loop runs.

    Args:
      found: What is marked.
      in_scan: Whether this is in a turn of a scan. Then loops may be around the scan,
        of which there is one layer only.
    """
    groups: dict[Any, dict[Any, Any]] = {}
    for mark, value in found:
        number = 0  # Of taps with one path in one layer.
        while mark.indices in groups.get(_key(mark, number), ()):
            number += 1
        groups.setdefault(_key(mark, number), {})[mark.indices] = value
    return [
        _Marked(_frames.Mark(is_tap, label, indices), value)
        for (is_tap, label, _, _), grid in groups.items()
        for indices, value in _fold(grid, 2 if in_scan else 1).items()
    ]


def _key(mark: _frames.Mark, number: int) -> tuple[bool, str, int, int]:
    return mark.is_tap, mark.label, len(mark.indices), number


def _fold(grid: dict[Any, Any], fewest: int) -> dict[Any, Any]:
    """Stacks the values of all layers of the innermost loops, as far as they are there.

    Args:
      grid: Values, by the indices of their layers.
      fewest: Loops over fewer layers are left as they are.
    """
    rows: dict[Any, dict[int, Any]] = {}
    for indices, value in grid.items():
        if not indices or indices[-1][1] < fewest:
            return grid
        rows.setdefault((indices[:-1], indices[-1][1]), {})[indices[-1][0]] = value
    kinds = {(jnp.shape(v), jnp.asarray(v).dtype) for v in grid.values()}
    if len(kinds) > 1 or any(len(row) != n for (_, n), row in rows.items()):
        return grid
    stacked = {
        before: jnp.stack([row[i] for i in range(n)])
        for (before, n), row in rows.items()
    }
    return _fold(stacked, fewest)
