"""The cut: which equations of a traced function are setup and which are call.

A traced function is a list of equations over inputs. An equation is *known* when all
it reads comes from inputs that are known (parameters and constants) and it has no
effects. Setup is the part of the known equations that is worth running before the
loop; what it hands to the call are the *derived values*. The call is the rest.

The cut looks through `jit` and rematerialised (`jax.checkpoint`) equations: a known
part inside one leaves it, and the rest stays inside. Every other equation is left
whole. Everything here works on jaxprs, so any composition of `jit`, `grad` and `vmap`
around or inside the traced function is fine.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

T = TypeVar("T")
Atom = Any  # a jex.Var or a jex.Literal; jax.extend.core has no public name for both

POLICIES = ("auto", "marked", "inline")

_MARK = "hk_stack.hoist"  # written by `hoist`: hoist this, or say why it cannot be
_HOISTED = "hk_stack.hoisted"  # left by a cut: an outer cut hoists it too if it can


def hoist(value: T) -> T:
    """Marks `value`, computed inside a layer function, as setup.

    `layer_stack` computes a marked value of all layers, in batches, before its loop.
    The result is `value` itself: outside a stack, or with `setup="inline"`, this is
    the identity.

    Automatic hoisting finds most setup without a mark. A mark is for what it leaves
    alone on purpose: cheap work that is still worth moving, and values that also
    depend on arrays closed over from outside the stack.

    >>> import haiku as hk, jax, jax.numpy as jnp, hk_stack
    >>> def layer(x):
    ...     w = hk.get_parameter("w", [2, 2], init=hk.initializers.Identity())
    ...     return x @ hk_stack.hoist(jax.scipy.linalg.expm(w))
    >>> model = hk.transform(lambda x: hk_stack.layer_stack(3)(layer)(x))
    >>> params = model.init(jax.random.key(0), jnp.ones([2]))
    >>> print(model.apply(params, None, jnp.ones([2])).round(2))
    [20.09 20.09]

    Args:
      value: Any pytree of arrays.

    Returns:
      The same pytree of arrays.

    Raises:
      ValueError: By the stack around it, if `value` depends on the layer's input, a
        random key, state, a per-layer input or a side effect. The message says which.
    """
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, _MARK), value)


class Input(NamedTuple):
    """What the cut must know of one input of the traced function.

    Attributes:
      label: How an error names it.
      known: May setup depend on it of its own accord?
      fixed: Does it stay the same through the loop, so that a *marked* value may
        depend on it? Every known input is fixed.
      layered: Has it a leading layer axis outside the loop?
    """

    label: str
    known: bool
    fixed: bool
    layered: bool


class Cut(NamedTuple):
    """A traced function in parts, equal to it when run one after the other.

    ```
    shared = cut.shared(*pick(cut.shared_inputs))
    own = cut.setup(*shared, *pick(cut.setup_inputs))
    outputs = cut.call(*shared, *own, *pick(cut.call_inputs))
    ```

    where `pick` takes the inputs at these positions.

    Attributes:
      shared: The derived values that depend on no layered input.
      setup: The derived values of one layer.
      call: The rest.
      shared_inputs: Positions of the inputs that `shared` reads.
      setup_inputs: Positions of the inputs that `setup` reads.
      call_inputs: Positions of the inputs that `call` reads.
    """

    shared: jex.ClosedJaxpr
    setup: jex.ClosedJaxpr
    call: jex.ClosedJaxpr
    shared_inputs: tuple[int, ...]
    setup_inputs: tuple[int, ...]
    call_inputs: tuple[int, ...]


class Node(NamedTuple):
    """One equation of a flattened jaxpr.

    Attributes:
      eqn: The equation.
      regions: The rematerialised regions around it, outermost first.
      reads: The inputs that it depends on, as a bit set. The bit past the last input
        stands for side effects.
    """

    eqn: jex.JaxprEqn
    regions: tuple["Region", ...]
    reads: int


class Region:
    """One rematerialised region. Two are equal only if they are the same object."""

    def __init__(self, eqn: jex.JaxprEqn):
        self.eqn = eqn


class Flat(NamedTuple):
    """A jaxpr without constants, whose chosen `jit` and remat equations are opened.

    Attributes:
      jaxpr: Where it came from; its constants are the first inputs.
      nodes: The equations, in order.
      outputs: The output atoms.
      reads: For each variable the inputs that it depends on, as a bit set.
    """

    jaxpr: jex.Jaxpr
    nodes: list[Node]
    outputs: list[Atom]
    reads: dict[jex.Var, int]

    def dependencies(self, atom: Atom) -> int:
        """The inputs that `atom` depends on, as a bit set."""
        return 0 if isinstance(atom, jex.Literal) else self.reads[atom]


def bits(flags: Iterable[bool]) -> int:
    """The bit set of the positions at which `flags` is true.

    >>> bits([True, False, True])
    5
    """
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def flatten(closed: jex.ClosedJaxpr, opens: Callable[[int], bool]) -> Flat:
    """Opens the `jit` and remat equations of `closed` that read what `opens` asks for.

    Args:
      closed: A traced function. Its constants count as its first inputs.
      opens: Given the bit set of what an equation reads, whether to look inside it.

    Returns:
      The equations in a flat list, with what each depends on.
    """
    jaxpr = _without_constants(closed.jaxpr)
    reads = {var: 1 << i for i, var in enumerate(jaxpr.invars)}
    effect = 1 << len(jaxpr.invars)
    nodes: list[Node] = []
    opened: set[int] = set()

    def visit(jaxpr: jex.Jaxpr, env: dict, regions: tuple[Region, ...]) -> list[Atom]:
        def read(atom: Atom) -> Atom:
            return atom if isinstance(atom, jex.Literal) else env.get(atom, atom)

        if id(jaxpr) in opened:  # JAX shares bodies; variables must be unique.
            jaxpr = _copy(jaxpr)
            env = dict(zip(jaxpr.invars, env.values(), strict=True))
        opened.add(id(jaxpr))
        for eqn in jaxpr.eqns:
            args = [read(a) for a in eqn.invars]
            mask = 0
            for v in _variables(args):
                mask |= reads[v]
            body = _body(eqn)
            if body is not None and (opens(mask) or _has_mark_inside(body)):
                is_remat = eqn.primitive.name in _REMAT
                inside = (*regions, Region(eqn)) if is_remat else regions
                outs = visit(body, dict(zip(body.invars, args, strict=True)), inside)
                env.update(zip(eqn.outvars, outs, strict=True))
                continue
            if eqn.effects or eqn.primitive.name in _OPAQUE:
                mask |= effect
            reads.update((v, mask) for v in eqn.outvars)
            nodes.append(Node(eqn.replace(invars=args), regions, mask))
        return [read(a) for a in jaxpr.outvars]

    outputs = visit(jaxpr, {}, ())
    return Flat(jaxpr, nodes, outputs, reads)


def _copy(jaxpr: jex.Jaxpr) -> jex.Jaxpr:
    """`jaxpr` with variables of its own."""
    run = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, []))
    return jax.make_jaxpr(run)(*(v.aval for v in jaxpr.invars)).jaxpr


def program(
    flat: Flat,
    outputs: Sequence[Atom],
    given: Sequence[jex.Var] = (),
    *,
    with_effects: bool = False,
) -> tuple[jex.ClosedJaxpr, tuple[int, ...]]:
    """The part of `flat` that computes `outputs`, and nothing else.

    Args:
      flat: A flattened jaxpr.
      outputs: What to compute.
      given: Variables that come in from outside, before the inputs.
      with_effects: Whether equations with side effects are kept.

    Returns:
      A closed jaxpr that takes `given` and the inputs that it reads, and the
      positions of these inputs.
    """
    nodes = _needed(flat.nodes, outputs, given, with_effects)
    eqns = _restore_regions(nodes, 0, outputs)
    reads = _variables(outputs) | {v: None for e in eqns for v in _variables(e.invars)}
    inputs = flat.jaxpr.invars
    positions = tuple(i for i, v in enumerate(inputs) if v in reads and v not in given)
    jaxpr = flat.jaxpr.replace(
        invars=[*given, *(inputs[i] for i in positions)],
        outvars=list(outputs),
        eqns=eqns,
        effects=_effects(eqns),
    )
    return jex.ClosedJaxpr(jaxpr, []), positions


def _needed(
    nodes: Iterable[Node],
    outputs: Sequence[Atom],
    given: Sequence[jex.Var],
    with_effects: bool,
) -> list[Node]:
    """The nodes that `outputs` depend on once `given` comes in from outside."""
    live = set(_variables(outputs)) - set(given)
    kept = []
    for node in reversed(list(nodes)):
        eqn = node.eqn
        if live.isdisjoint(eqn.outvars) and not (with_effects and eqn.effects):
            continue
        # One output of an equation may come in from outside while another is needed.
        outvars = [_fresh(v) if v in given else v for v in eqn.outvars]
        kept.append(node._replace(eqn=eqn.replace(outvars=outvars)))
        live |= set(_variables(eqn.invars)) - set(given)
    return kept[::-1]


def _fresh(v: jex.Var) -> jex.Var:
    """A new variable of the type of `v`."""
    return jax.make_jaxpr(lambda x: x)(v.aval).jaxpr.invars[0]


def _restore_regions(
    nodes: Sequence[Node], depth: int, outputs: Sequence[Atom]
) -> list[jex.JaxprEqn]:
    """The equations of `nodes`, with the rematerialised regions put around them."""

    def region(node: Node) -> Region | None:
        return node.regions[depth] if len(node.regions) > depth else None

    eqns: list[jex.JaxprEqn] = []
    live = _variables(outputs)
    groups = [(key, list(group)) for key, group in itertools.groupby(nodes, region)]
    for key, group in reversed(groups):
        if key is None:
            new = [node.eqn for node in group]
        else:
            made = {v for node in group for v in node.eqn.outvars}
            body = _restore_regions(group, depth + 1, [v for v in live if v in made])
            new = [_remat(key.eqn, body, [v for v in live if v in made])]
        eqns = new + eqns
        live |= {v: None for eqn in new for v in _variables(eqn.invars)}
    return eqns


def _remat(
    eqn: jex.JaxprEqn, body: list[jex.JaxprEqn], outvars: list[Atom]
) -> jex.JaxprEqn:
    """The rematerialised equation `eqn` with another body."""
    made = {v for e in body for v in e.outvars}
    reads = {v: None for e in body for v in _variables(e.invars) if v not in made}
    invars: list[Atom] = list(reads)
    effects = _effects(body)
    jaxpr = eqn.params["jaxpr"].replace(
        invars=invars, outvars=outvars, eqns=body, effects=effects
    )
    return eqn.replace(
        invars=invars,
        outvars=outvars,
        params={**eqn.params, "jaxpr": jaxpr},
        effects=effects,
    )


def _variables(atoms: Iterable[Atom]) -> dict[jex.Var, None]:
    """The variables among `atoms`, once each, in order (a dict as an ordered set)."""
    return {a: None for a in atoms if not isinstance(a, jex.Literal)}


def _effects(eqns: Iterable[jex.JaxprEqn]) -> set:
    return set().union(*(eqn.effects for eqn in eqns))


def cut(
    closed: jex.ClosedJaxpr, inputs: Sequence[Input], policy: str, where: str
) -> Cut:
    """Cuts a traced function into setup and call.

    Args:
      closed: The traced function.
      inputs: Its inputs, the constants of `closed` first.
      policy: "auto" hoists marked values and whatever else is known and worth it,
        "marked" only marked values, "inline" nothing.
      where: Names the traced function in errors.

    Returns:
      The two parts. With nothing to hoist, `call` is `closed`, equation by equation.

    Raises:
      ValueError: If a marked value depends on an input that is not fixed.
    """
    if policy != "inline":
        known = bits(i.known for i in inputs)
        flat = flatten(closed, lambda reads: bool(reads & known))
        flat, marked = _settle_marks(flat, inputs, where)
        derived = _choose(flat, inputs, marked, policy == "auto")
        if derived and not _has_references(flat):
            return _split(flat, inputs, derived)
    # Marks that this cut leaves alone are none of the business of one around it.
    jaxpr = _without_constants(closed.jaxpr)
    jaxpr = jaxpr.replace(eqns=[_weaken(eqn) for eqn in jaxpr.eqns])
    whole = jex.ClosedJaxpr(jaxpr, [])
    nothing = jex.ClosedJaxpr(
        closed.jaxpr.replace(
            constvars=[], invars=[], outvars=[], eqns=[], effects=set()
        ),
        [],
    )
    return Cut(nothing, nothing, whole, (), (), tuple(range(len(inputs))))


def _without_constants(jaxpr: jex.Jaxpr) -> jex.Jaxpr:
    """`jaxpr` with its constants as its first inputs."""
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])


def _has_references(flat: Flat) -> bool:
    """Whether mutable references are read or written: their order is their meaning."""
    return any(hasattr(e, "input_index") for n in flat.nodes for e in n.eqn.effects)


def _split(flat: Flat, inputs: Sequence[Input], derived: Sequence[jex.Var]) -> Cut:
    # A derived value that another one replaced in the call need not be computed.
    used = _variables(flat.outputs)
    for node in _needed(flat.nodes, flat.outputs, derived, with_effects=True):
        used |= _variables(node.eqn.invars)
    layered = bits(i.layered for i in inputs)
    shared = [v for v in derived if v in used and not flat.reads[v] & layered]
    own = [v for v in derived if v in used and flat.reads[v] & layered]
    shared_program, shared_inputs = program(flat, shared)
    setup, setup_inputs = program(flat, own, shared)
    call, call_inputs = program(flat, flat.outputs, [*shared, *own], with_effects=True)
    return Cut(shared_program, setup, call, shared_inputs, setup_inputs, call_inputs)


def _settle_marks(
    flat: Flat, inputs: Sequence[Input], where: str
) -> tuple[Flat, list[jex.Var]]:
    """Checks the marked values, and weakens their marks for the cut around this one."""
    fixed = bits(i.fixed for i in inputs)
    nodes, marked = [], []
    for node in flat.nodes:
        eqn = node.eqn
        name = eqn.params["name"] if eqn.primitive.name == "name" else None
        is_fixed = not node.reads & ~fixed
        if name == _MARK and not is_fixed:
            raise ValueError(_explain_mark(eqn, inputs, node.reads & ~fixed, where))
        inside = any(map(_has_mark_inside, _bodies(eqn)))
        if inside and not is_fixed:
            found = _name_inputs(inputs, node.reads & ~fixed)
            raise ValueError(
                f"{where}: hk_stack.hoist was called inside a {eqn.primitive.name} "
                f"that depends on {found}; the cut does not look into it. Compute the "
                "marked value before it."
            )
        if is_fixed and (inside or name in (_MARK, _HOISTED)):
            marked.extend(eqn.outvars)
        nodes.append(node._replace(eqn=_weaken(eqn)))
    return flat._replace(nodes=nodes), marked


def _weaken(eqn: jex.JaxprEqn) -> jex.JaxprEqn:
    """`eqn` with its mark, or the marks inside, weakened."""
    if eqn.primitive.name == "name" and eqn.params["name"] == _MARK:
        return eqn.replace(params={**eqn.params, "name": _HOISTED})
    if not any(map(_has_mark_inside, _bodies(eqn))):
        return eqn

    def weaken(param: Any) -> Any:
        if isinstance(param, jex.Jaxpr):
            return param.replace(eqns=[_weaken(e) for e in param.eqns])
        if isinstance(param, jex.ClosedJaxpr):
            return jex.ClosedJaxpr(weaken(param.jaxpr), param.consts)
        return tuple(map(weaken, param)) if isinstance(param, tuple) else param

    return eqn.replace(params={k: weaken(p) for k, p in eqn.params.items()})


def _has_mark_inside(jaxpr: jex.Jaxpr) -> bool:
    return any(
        (eqn.primitive.name == "name" and eqn.params["name"] == _MARK)
        or any(map(_has_mark_inside, _bodies(eqn)))
        for eqn in jaxpr.eqns
    )


def _explain_mark(
    eqn: jex.JaxprEqn, inputs: Sequence[Input], culprits: int, where: str
) -> str:
    return (
        f"{where}: hk_stack.hoist was given a value ({eqn.invars[0].aval.str_short()}) "
        f"that depends on {_name_inputs(inputs, culprits)}. Setup may depend on "
        "parameters, constants and arrays closed over from outside the stack only. "
        "Remove this hoist, or call it on the part that does not depend on it."
    )


def _name_inputs(inputs: Sequence[Input], reads: int) -> str:
    labels = [i.label for i in inputs] + ["a side effect or callback"]
    found = [label for bit, label in enumerate(labels) if reads >> bit & 1]
    return ", ".join(dict.fromkeys(found))


def _choose(
    flat: Flat, inputs: Sequence[Input], marked: Sequence[jex.Var], automatic: bool
) -> list[jex.Var]:
    """The derived values: what the call is handed instead of computing it.

    In automatic mode each value that the call reads and that took expensive work is
    handed over, or else the values that it is cheaply computed from, if these are
    smaller: `frontier[v]` is what to hand over for `v`.
    """
    if not automatic:
        return list(marked)
    known = bits(i.known for i in inputs)
    frontier: dict[jex.Var, frozenset[jex.Var]] = {}
    tails: dict[jex.Var, frozenset[jex.Var]] = {}  # of a cheap value: what it is from
    chosen: frozenset[jex.Var] = frozenset()

    def behind(atoms: Iterable[Atom]) -> frozenset[jex.Var]:
        return frozenset().union(*(frontier.get(v, ()) for v in _variables(atoms)))

    for node in flat.nodes:
        before = behind(node.eqn.invars)
        is_known = not node.reads & ~known
        if not is_known:
            chosen |= before
        expensive = is_known and _is_expensive(node.eqn, flat, node.reads)
        for v in node.eqn.outvars:
            if v in marked or expensive:
                frontier[v] = frozenset([v])
            elif is_known and before:
                tails[v] = before
                frontier[v] = min(frozenset([v]), before, key=_bytes)
    chosen = _share(chosen | behind(flat.outputs), tails)
    return [v for node in flat.nodes for v in node.eqn.outvars if v in chosen]


def _share(
    chosen: frozenset[jex.Var], tails: dict[jex.Var, frozenset[jex.Var]]
) -> frozenset[jex.Var]:
    """Replaces cheap values with what several of them come from, where smaller."""

    def coming_from(source: frozenset[jex.Var]) -> set[jex.Var]:
        found = set(source)
        for v, before in tails.items():  # In the order in which they are computed.
            if before <= found:
                found.add(v)
        return found

    for v in tails:
        source = frozenset([v])
        while v in chosen and (deeper := _one_step_back(source, tails)) != source:
            source = deeper
            rest = chosen - coming_from(source)
            if _bytes(rest | source) < _bytes(chosen):
                chosen = rest | source
    return chosen


def _one_step_back(
    variables: frozenset[jex.Var], tails: dict[jex.Var, frozenset[jex.Var]]
) -> frozenset[jex.Var]:
    return frozenset().union(*(tails.get(v, (v,)) for v in variables))


def _is_expensive(eqn: jex.JaxprEqn, flat: Flat, reads: int) -> bool:
    """Whether a known equation is worth hoisting for its own sake."""
    name = eqn.primitive.name
    if name in _EXPENSIVE:
        return True
    size = max(map(_size, eqn.outvars), default=0)
    if name in _REDUCTIONS:
        return size < max(map(_size, eqn.invars))
    if name in _TRANSCENDENTAL:
        inputs = flat.jaxpr.invars
        return size > sum(_size(v) for i, v in enumerate(inputs) if reads >> i & 1)
    return any(
        _is_expensive(e, flat, reads) for body in _bodies(eqn) for e in body.eqns
    )


def can_batch(jaxpr: jex.Jaxpr) -> bool:
    """Whether a batch computes just what one layer after another would.

    In a batch all branches of a `cond` run, also one that would not end, and random
    bits of other keys than threefry's are other bits.
    """

    def is_other_key(atom: Atom) -> bool:
        return str(atom.aval.dtype).startswith("key<") and "fry" not in str(
            atom.aval.dtype
        )

    return all(
        eqn.primitive.name not in _OPAQUE | {"cond", "rng_bit_generator"}
        and not any(map(is_other_key, eqn.invars))
        and all(map(can_batch, _bodies(eqn)))
        for eqn in jaxpr.eqns
    )


def largest_value(jaxpr: jex.Jaxpr) -> int:
    """Bytes of the largest array that `jaxpr` computes, inner bodies included."""
    inner = (largest_value(body) for eqn in jaxpr.eqns for body in _bodies(eqn))
    own = (_bytes([v]) for eqn in jaxpr.eqns for v in eqn.outvars)
    return max(itertools.chain(inner, own), default=0)


def _bodies(eqn: jex.JaxprEqn) -> Iterator[jex.Jaxpr]:
    """The jaxprs that `eqn` runs, of whatever kind it is."""
    for param in eqn.params.values():
        for value in param if isinstance(param, (tuple, list)) else (param,):
            if isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr)):
                yield value if isinstance(value, jex.Jaxpr) else value.jaxpr


def _size(atom: Atom) -> int:
    """Number of elements, without the layer axis."""
    return atom.aval.size


def _bytes(variables: Iterable[Atom]) -> int:
    return sum(_size(v) * v.aval.dtype.itemsize for v in variables)


def _body(eqn: jex.JaxprEqn) -> jex.Jaxpr | None:
    """What a `jit` or remat equation runs; None where opening it would lose meaning."""
    if eqn.primitive.name in _REMAT:
        return eqn.params["jaxpr"]
    if eqn.primitive.name not in _JIT:
        return None
    placed = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    closed = eqn.params["jaxpr"]
    if any(isinstance(s, jax.sharding.Sharding) for s in placed) or closed.consts:
        return None
    return closed.jaxpr


# Names that versions of JAX have given to these equations.
_JIT = ("jit", "pjit")
_REMAT = ("checkpoint", "remat", "remat2")

# Callbacks and foreign code: they may not know how to run batched.
_OPAQUE = frozenset(
    "custom_partitioning custom_vmap_call ffi_call io_callback pallas_call "
    "pure_callback shard_map".split()
)
_EXPENSIVE = frozenset(
    "approx_top_k cholesky cholesky_update conv_general_dilated cumlogsumexp cummax "
    "cummin cumprod cumsum custom_linear_solve dot_general eig eigh fft geqrf "
    "hessenberg householder_product lu qr ragged_dot ragged_dot_general random_bits "
    "random_gamma reduce_window reduce_window_max reduce_window_min reduce_window_sum "
    "rng_bit_generator scan schur select_and_scatter_add sort svd sylvester "
    "threefry2x32 top_k triangular_solve tridiagonal tridiagonal_solve while".split()
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
