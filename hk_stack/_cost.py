"""What equations cost: whether they are worth hoisting, their bytes and operations."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend import core as jex

from hk_stack import _equations
from hk_stack._equations import Atom, Aval


def is_expensive(eqn: jex.JaxprEqn, parameters: Callable[[], float]) -> bool:
    """Whether an equation is worth hoisting for its own sake.

    Args:
      eqn: An equation.
      parameters: Counts the elements of the inputs that it depends on, where that
        matters.
    """
    name = eqn.primitive.name
    if name in _EXPENSIVE:
        return True
    if name in _REDUCTIONS:
        return _most(eqn.outvars) < _most(eqn.invars)
    if name in _TRANSCENDENTAL:
        # The logarithm of a constant is no work.
        return _most(eqn.outvars) > max(1, parameters())
    return any(
        is_expensive(e, parameters)
        for body in _equations.bodies(eqn)
        for e in body.eqns
    )


def _most(atoms: Iterable[Atom]) -> int:
    """Elements of the largest of several values."""
    return max(map(size, atoms), default=0)


def is_reduction(eqn: jex.JaxprEqn) -> bool:
    """Whether an equation adds numbers up, or the like."""
    return eqn.primitive.name in _REDUCTIONS


def is_work(eqn: jex.JaxprEqn) -> bool:
    """Whether an equation is worth hoisting whatever its sizes are."""
    return eqn.primitive.name in _EXPENSIVE


def is_factorisation(eqn: jex.JaxprEqn) -> bool:
    """Whether an equation factorises matrices, or the like."""
    return eqn.primitive.name in _FACTORISATIONS


def is_product(eqn: jex.JaxprEqn) -> bool:
    """Whether an equation multiplies by matrices, or by their inverses."""
    return eqn.primitive.name in _PRODUCTS


def is_layout(eqn: jex.JaxprEqn) -> bool:
    """Whether an equation moves numbers without changing them."""
    return eqn.primitive.name in _LAYOUT


def can_batch(jaxpr: jex.Jaxpr) -> bool:
    """Whether a batch computes just what one layer after another would."""
    return not no_batch(jaxpr)


def no_batch(jaxpr: jex.Jaxpr, derivatives: int = 2) -> str:
    """Why a batch would not compute what one layer after another does, if so.

    Random bits of other keys than threefry's are other bits in a batch. Rules for
    batches run outside of the `jax.enable_x64` in which an equation was written, and
    would narrow its values.

    Args:
      jaxpr: What each layer runs.
      derivatives: Up to which derivative a batch is to be the same, as authors of
        functions may write what theirs run.
    """
    eqns = list(_equations.with_inner(jaxpr.eqns))
    names = {eqn.primitive.name for eqn in eqns}
    if is_narrowed(jaxpr):
        return "it has values of 64 bits where JAX has 32"
    if opaque := OPAQUE & names:
        return f"it runs foreign code ({min(opaque)})"
    dtypes = _dtypes(atom for eqn in eqns for atom in eqn.invars)
    if any(map(_is_other_key, dtypes)) or "rng_bit_generator" in names:
        return "it draws with keys other than threefry's"
    if derivatives and not all(_can_batch_rule(e, derivatives - 1) for e in eqns):
        return "JAX cannot batch a rule of its derivatives"
    return ""


def is_narrowed(jaxpr: jex.Jaxpr) -> bool:
    """Whether a batch would compute in 32 bits what `jaxpr` computes in 64."""
    return is_wide(jaxpr.eqns)


def is_wide(eqns: Iterable[jex.JaxprEqn]) -> bool:
    """Whether there are values of 64 bits where JAX has 32."""
    inner = _equations.with_inner(eqns)
    atoms = (a for eqn in inner for a in (*eqn.invars, *eqn.outvars))
    return any(map(_is_wide, _dtypes(atoms)))


def _dtypes(atoms: Iterable[Atom]) -> set[Any]:
    """The types of numbers, each once: there are few, and it takes long to ask."""
    return {getattr(atom.aval, "dtype", None) for atom in atoms} - {None}


def _is_wide(dtype: Any) -> bool:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return False
    return bool(jax.dtypes.canonicalize_dtype(dtype) != dtype)


def _can_batch_rule(eqn: jex.JaxprEqn, derivatives: int) -> bool:
    """Whether what a derivative of `eqn` runs, if its author has said so, can batch.

    Conditionals in a rule alone are out of reach: all of their branches would run.
    """
    if eqn.primitive.name not in _equations.CUSTOM_DERIVATIVES:
        return True
    try:
        rule = _equations.derivative(eqn)
    except Exception:  # Whatever its author wrote; one by one it is as it was.
        return False
    own, of_rule = (
        any(e.primitive.name == "cond" for e in _equations.with_inner(eqns))
        for eqns in ([eqn], rule.eqns)
    )
    return own >= of_rule and not no_batch(rule.jaxpr, derivatives)


def _is_other_key(dtype: Any) -> bool:
    """Whether `dtype` is of random keys of another kind than threefry's."""
    is_key = jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    return is_key and "fry" not in str(dtype)


def gathers(eqns: Iterable[jex.JaxprEqn]) -> bool:
    """Whether equations gather values that several devices hold a share of."""
    return any(_equations.gathers_from(e) > 1 for e in _equations.with_inner(eqns))


def gathered(jaxpr: jex.Jaxpr) -> list[bool]:
    """Which outputs are made of gathered values, so that each device may hold all."""
    found: set[Any] = set()
    for eqn in jaxpr.eqns:
        if gathers([eqn]) or not found.isdisjoint(_equations.variables(eqn.invars)):
            found.update(eqn.outvars)
    return [not found.isdisjoint(_equations.variables([v])) for v in jaxpr.outvars]


def largest_value(jaxpr: jex.Jaxpr) -> int:
    """Bytes of the largest array that `jaxpr` computes, inner bodies included."""
    eqns = _equations.with_inner(jaxpr.eqns)
    return max((bytes_of(v.aval) for eqn in eqns for v in eqn.outvars), default=0)


def size(atom: Atom) -> int:
    """Number of elements; a symbol where a shape is to stay unknown."""
    count: int = atom.aval.size
    return count


def nbytes(variables: Iterable[Atom]) -> int:
    """Bytes of the values of variables."""
    return sum(bytes_of(v.aval) for v in variables)


def bytes_of(array: Aval | jax.Array) -> int:
    """Bytes of an array, given it or its type; a symbol, as for `size`."""
    count: int = array.size * array.dtype.itemsize
    return count


def flops(eqn: jex.JaxprEqn) -> float:
    """Arithmetic operations of an equation, roughly; complex ones count once.

    One for each element of the result, but: `2 m n k` for a matrix product, `5 n log n`
    for a Fourier transform, `n` per column for a factorisation or triangular solve of
    matrices `[n, n]`, one for each element that a reduction reads. A `while` counts as
    one turn, a `cond` as its longest branch.
    """
    name, params = eqn.primitive.name, eqn.params
    most: float = max(map(size, eqn.outvars), default=0)
    inner = [sum(map(flops, body.eqns)) for body in _equations.bodies(eqn)]
    operands: list[Any] = [atom.aval for atom in eqn.invars]
    if name == "scan":
        return int(params["length"]) * sum(inner)
    if inner:
        return max(inner) if name == "cond" else sum(inner)
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        shape = operands[0].shape
        return 2 * most * math.prod(int(shape[axis]) for axis in contracted)
    if name == "conv_general_dilated":
        kernel = operands[1]
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * most * int(kernel.size) / max(1, int(features))
    if name == "fft":
        return 5 * most * math.log2(max(2, math.prod(params["fft_lengths"])))
    if name in _FACTORISATIONS:
        return most * int(operands[0].shape[-1])
    if name in _LAYOUT or name == "name":
        return 0
    return max(most, *map(size, eqn.invars)) if name in _REDUCTIONS else most


# Callbacks and foreign code: they may not know how to run batched.
OPAQUE = frozenset(
    "custom_partitioning custom_vmap_call ffi_call io_callback pallas_call "
    "pure_callback shard_map".split()
)
_FACTORISATIONS = frozenset(
    "cholesky eig eigh geqrf hessenberg householder_product lu qr schur svd "
    "triangular_solve tridiagonal".split()
)
_EXPENSIVE = _FACTORISATIONS | frozenset(
    "approx_top_k cholesky_update conv_general_dilated cumlogsumexp cummax cummin "
    "cumprod cumsum custom_linear_solve dot_general fft ragged_dot ragged_dot_general "
    "random_bits random_gamma reduce_window reduce_window_max reduce_window_min "
    "reduce_window_sum rng_bit_generator scan select_and_scatter_add sort sylvester "
    "threefry2x32 top_k tridiagonal_solve while".split()
)
_PRODUCTS = frozenset(
    "conv_general_dilated custom_linear_solve dot_general ragged_dot "
    "ragged_dot_general triangular_solve tridiagonal_solve".split()
)
_REDUCTIONS = frozenset(
    "argmax argmin reduce reduce_and reduce_max reduce_min reduce_or reduce_prod "
    "reduce_sum reduce_xor".split()
)
_TRANSCENDENTAL = frozenset(
    "acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh "
    "digamma erf erf_inv erfc exp exp2 expm1 igamma igammac lgamma log log1p logistic "
    "polygamma pow regularized_incomplete_beta rsqrt sin sinh sqrt tan tanh "
    "zeta".split()
)
_LAYOUT = frozenset(
    "broadcast_in_dim concatenate copy copy_p dynamic_slice expand_dims pad reshape "
    "rev slice split squeeze transpose".split()
)
