"""What a traced program computes, without compiling it: equation by equation, in NumPy.

XLA takes a second for what this does in a few milliseconds, so most tests that compare
results look at the traced program: `computed(f, *args)` is `jax.jit(f)(*args)`. What is
compiled nevertheless makes sure that this stands for that.
"""

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
from jax.extend import core as jex


def computed(function: Callable[..., Any], *args: Any) -> Any:
    """The results of `function`, once it is traced."""
    closed, result = jax.make_jaxpr(function, return_shape=True)(*args)
    pairs = zip(jax.tree.leaves(args), closed.in_avals, strict=True)
    values = [a if is_key(a) else np.asarray(a, type_.dtype) for a, type_ in pairs]
    with np.errstate(all="ignore"), jax.enable_x64(True):  # Layers may have doubles.
        found = evaluate(closed, values)
    return jax.tree.unflatten(jax.tree.structure(result), map(as_jax_has_it, found))


def as_jax_has_it(value: Any) -> Any:
    return value if value.dtype == jax.dtypes.float0 else jnp.asarray(value)


def is_key(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended)


def evaluate(closed: jex.ClosedJaxpr, args: list[Any]) -> list[Any]:
    """What a traced program computes, one equation after the other."""
    return run(closed.jaxpr, [*closed.consts, *args])


def run(jaxpr: jex.Jaxpr, args: list[Any]) -> list[Any]:
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), args, strict=True))

    def read(atom: Any) -> Any:
        if isinstance(atom, jex.Literal):
            return np.asarray(atom.val, atom.aval.dtype)
        return env[atom]

    for eqn in jaxpr.eqns:
        found = equation(eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def equation(eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name in RULES:
        return RULES[name](values, **params)
    if name in NUMPY and not any(map(is_key, values)):
        result = NUMPY[name](*map(np.asarray, values), **params)
        found = result if eqn.primitive.multiple_results else [result]
        types = (v.aval.dtype for v in eqn.outvars)
        return list(map(np.asarray, found, types))
    result = eqn.primitive.bind(*values, **params)
    found = result if eqn.primitive.multiple_results else [result]
    return [r if is_key(r) else np.asarray(r) for r in found]


def call(name: str) -> Callable[..., list[Any]]:
    """The rule of an equation that runs the program `name` once."""

    def rule(values: list[Any], **params: Any) -> list[Any]:
        closed = params[name]  # Or open; new versions of JAX have one type for both.
        constants = getattr(closed, "consts", ())
        return run(getattr(closed, "jaxpr", closed), [*constants, *values])

    return rule


def scan_rule(values: list[Any], **params: Any) -> list[Any]:
    carried = jaxprs.carried(types.SimpleNamespace(params=params))
    num_carry = len(carried)
    consts, rows = values[: carried.start], values[carried.stop :]
    carry = values[carried.start : carried.stop]
    length = params["length"]
    outs: list[Any] = [None] * length
    order = range(length)
    for i in reversed(order) if params["reverse"] else order:
        now = evaluate(params["jaxpr"], [*consts, *carry, *(row[i] for row in rows)])
        carry, outs[i] = now[:num_carry], now[num_carry:]
    if length:
        return [*carry, *map(stacked, zip(*outs, strict=True))]
    rest = params["jaxpr"].out_avals[num_carry:]
    return [*carry, *(np.zeros([0, *a.shape], a.dtype) for a in rest)]


def stacked(values: tuple[Any, ...]) -> Any:
    return (jnp if is_key(values[0]) else np).stack(values)


def while_rule(values: list[Any], **params: Any) -> list[Any]:
    first, second = params["cond_nconsts"], params["body_nconsts"]
    asked, done = values[:first], values[first:][:second]
    carry = values[first + second :]
    while np.any(goes_on := evaluate(params["cond_jaxpr"], [*asked, *carry])[0]):
        new = evaluate(params["body_jaxpr"], [*done, *carry])
        if np.ndim(goes_on):  # In a batch, some may be done before others.
            pairs = zip(new, carry, strict=True)
            new = [np.where(lifted(goes_on, n.ndim), n, old) for n, old in pairs]
        carry = new
    return carry


def lifted(a: Any, ndim: int) -> Any:
    return np.reshape(a, a.shape + (1,) * (ndim - a.ndim))


def cond_rule(values: list[Any], **params: Any) -> list[Any]:
    branches = params["branches"]
    index = min(max(int(values[0]), 0), len(branches) - 1)
    return evaluate(branches[index], values[1:])


RULES = {
    "scan": scan_rule,
    "while": while_rule,
    "cond": cond_rule,
    "custom_jvp_call": call("call_jaxpr"),
    "custom_vjp_call": call("call_jaxpr"),
    "closed_call": call("call_jaxpr"),
    "optimization_barrier": lambda values: values,
    **dict.fromkeys(("jit", "pjit", "checkpoint", "remat", "remat2"), call("jaxpr")),
}


def dot_general(a: Any, b: Any, *, dimension_numbers: Any, **_: Any) -> Any:
    (left, right), (left_batch, right_batch) = dimension_numbers
    names = list(range(a.ndim))
    others = [a.ndim + i for i in range(b.ndim)]
    for i, j in (*zip(left, right), *zip(left_batch, right_batch)):  # noqa: B905
        others[j] = names[i]
    free = [n for i, n in enumerate(names) if i not in (*left, *left_batch)]
    free += [n for j, n in enumerate(others) if j not in (*right, *right_batch)]
    if a.dtype.itemsize < 4:
        a, b = a.astype(np.float32), b.astype(np.float32)
    return np.einsum(a, names, b, others, [names[i] for i in left_batch] + free)


def broadcast_in_dim(a: Any, *, shape: Any, broadcast_dimensions: Any, **_: Any) -> Any:
    lifted = [1] * len(shape)
    for i, dim in enumerate(broadcast_dimensions):
        lifted[dim] = a.shape[i]
    return np.broadcast_to(a.reshape(lifted), shape)


def convert(a: Any, *, new_dtype: Any, **_: Any) -> Any:
    is_complex = np.issubdtype(new_dtype, np.complexfloating)
    return (a if is_complex else a.real).astype(new_dtype)


def slice_(a: Any, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
    strides = strides or (1,) * a.ndim
    return a[tuple(map(slice, start_indices, limit_indices, strides))]


def select_n(which: Any, *cases: Any) -> Any:
    return np.choose(which, cases) if len(cases) > 2 else np.where(which, *cases[::-1])


def pad(a: Any, value: Any, *, padding_config: Any) -> Any:
    low, high, inner = zip(*padding_config, strict=True)
    shape = [
        lo + hi + size + max(size - 1, 0) * step
        for size, lo, hi, step in zip(a.shape, low, high, inner, strict=True)
    ]
    if min(*low, *high, 0) < 0:
        return jax.lax.pad(a, value, padding_config)
    result = np.full(shape, value)
    ends = [size - hi for size, hi in zip(shape, high, strict=True)]
    steps = [step + 1 for step in inner]
    result[tuple(map(slice, low, ends, steps))] = a
    return result


def dynamic_slice(a: Any, *starts: Any, slice_sizes: Any, **_: Any) -> Any:
    window = zip(starts, slice_sizes, a.shape, strict=True)
    firsts = [(min(max(int(i), 0), n - size), size) for i, size, n in window]
    return a[tuple(slice(i, i + size) for i, size in firsts)]


def sort(*values: Any, dimension: int, num_keys: int, **_: Any) -> Any:
    order = np.argsort(values[0], dimension, kind="stable")
    return [np.take_along_axis(value, order, dimension) for value in values]


def cumsum(a: Any, *, axis: int, reverse: bool) -> Any:
    if reverse:
        return np.flip(np.cumsum(np.flip(a, axis), axis), axis)
    return np.cumsum(a, axis)


def iota(*, dtype: Any, shape: Any, dimension: int, **_: Any) -> Any:
    row = np.arange(shape[dimension]).astype(dtype)
    return broadcast_in_dim(row, shape=shape, broadcast_dimensions=[dimension])


def split(a: Any, *, sizes: Any, axis: int) -> Any:
    return np.split(a, np.cumsum(sizes)[:-1], axis)


def argument(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, *, axes, **_: function(a, axis=axes[0])


def reduction(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, *, axes, **_: function(a, axis=axes)


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values, **_: function(*values)


ELEMENTWISE = {
    **{n: n for n in "sin cos tanh exp log log1p expm1 sqrt abs sign conj".split()},
    **{n: n for n in "real imag floor square copy".split()},
    **dict(mul="multiply", sub="subtract", add="add", add_any="add", div="divide"),
    **dict(neg="negative", max="maximum", min="minimum", eq="equal", ne="not_equal"),
    **dict(lt="less", le="less_equal", gt="greater", ge="greater_equal"),
    **dict(is_finite="isfinite", rem="fmod", exp2="exp2", pow="power"),
    **{"and": "bitwise_and", "or": "bitwise_or", "not": "invert", "xor": "bitwise_xor"},
}
NUMPY = {
    **{name: plain(getattr(np, function)) for name, function in ELEMENTWISE.items()},
    "integer_pow": lambda a, *, y: a**y,
    "complex": lambda a, b: a + 1j * b,
    "clamp": lambda low, a, high: np.clip(a, low, high),
    "logistic": lambda a, **_: 1 / (1 + np.exp(-a)),
    "rsqrt": lambda a, **_: 1 / np.sqrt(a),
    "pad": pad,
    "iota": iota,
    "dynamic_slice": dynamic_slice,
    "sort": sort,
    "cumsum": cumsum,
    "split": split,
    "stack": lambda *values, axis: np.stack(values, axis),
    "unstack": lambda a, *, axis: list(np.moveaxis(a, axis, 0)),
    "name": plain(np.asarray),
    "stop_gradient": plain(np.asarray),
    "reduce_precision": plain(np.asarray),
    "convert_element_type": convert,
    "select_n": select_n,
    "dot_general": dot_general,
    "broadcast_in_dim": broadcast_in_dim,
    "reshape": lambda a, *, new_sizes, **_: a.reshape(new_sizes),
    "squeeze": lambda a, *, dimensions: np.squeeze(a, dimensions),
    "expand_dims": lambda a, *, dimensions: np.expand_dims(a, dimensions),
    "transpose": lambda a, *, permutation: a.transpose(permutation),
    "rev": lambda a, *, dimensions: np.flip(a, dimensions),
    "slice": slice_,
    "concatenate": lambda *values, dimension: np.concatenate(values, dimension),
    "reduce_sum": reduction(np.sum),
    "reduce_max": reduction(np.max),
    "reduce_min": reduction(np.min),
    "argmax": argument(np.argmax),
    "argmin": argument(np.argmin),
}
