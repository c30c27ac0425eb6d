"""The cut: which equations of a traced function are setup and which are call.

A traced function is a list of equations over inputs. An equation is *known* when all
it reads comes from inputs that are known (parameters and constants) and it has no
effects. Setup is the part of the known equations that is worth running before the
loop; what it hands to the call are the *derived values*. The call is the rest.

The cut looks through `jit` and rematerialised (`jax.checkpoint`) equations: a known
part inside one leaves it, and the rest stays inside. It cuts the bodies of loops and
the branches of conditionals in the same way: what does not change over a `scan` or
`while` runs once before it, what depends on the known part of a `scan`'s inputs runs
for all turns before it, and what the branches of a known `cond` compute of known values
runs in a `cond` before it. Every other equation is left whole. Everything here works on
jaxprs, so any composition of `jit`, `grad` and `vmap` around or inside the traced
function is fine.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from hk_stack import _cost, _equations, _flat, _loop
from hk_stack._equations import Atom, carried, fresh, variables
from hk_stack._flat import Exposed, Flat, bits
from hk_stack._marks import HOIST, HOISTED

T = TypeVar("T")

POLICIES = ("auto", "marked", "inline")


def hoist(value: T) -> T:
    """Marks `value`, computed inside a layer function, as setup.

    `layer_stack` computes a marked value of all layers, in batches, before its loop,
    and `partition` in its setup. The result is `value` itself: outside of both, or with
    `setup="inline"`, this is the identity.

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
      TypeError: If a leaf is no array.
      ValueError: By the stack or partition around it, if `value` depends on the layer's
        input, a random key, state, a per-layer input or a side effect. The message says
        which.
    """
    for leaf in jax.tree.leaves(value):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, (int, float, complex))):
            raise TypeError(
                f"hk_stack.hoist: expected a pytree of arrays, found a "
                f"{type(leaf).__name__} ({leaf!r})."
            )
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, HOIST), value)


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
    before = cut.shared(*pick(cut.shared_inputs))
    own = cut.setup(*before, *pick(cut.setup_inputs))
    outputs = cut.call(*before[:num_shared], *own, *pick(cut.call_inputs))
    ```

    where `pick` takes the inputs at these positions.

    Attributes:
      shared: The derived values that depend on no layered input; then what only
        `setup` needs of this kind, and is too expensive to compute in each layer.
      setup: The derived values of one layer.
      call: The rest.
      shared_inputs: Positions of the inputs that `shared` reads.
      setup_inputs: Positions of the inputs that `setup` reads.
      call_inputs: Positions of the inputs that `call` reads.
      num_shared: How many derived values `shared` computes.
    """

    shared: jex.ClosedJaxpr
    setup: jex.ClosedJaxpr
    call: jex.ClosedJaxpr
    shared_inputs: tuple[int, ...]
    setup_inputs: tuple[int, ...]
    call_inputs: tuple[int, ...]
    num_shared: int


def cut(
    closed: jex.ClosedJaxpr,
    inputs: Sequence[Input],
    policy: str,
    where: str,
    *,
    reuse: bool = False,
) -> Cut:
    """Cuts a traced function into setup and call.

    Args:
      closed: The traced function.
      inputs: Its inputs, the constants of `closed` first.
      policy: "auto" hoists marked values and whatever else is known and worth it,
        "marked" only marked values, "inline" nothing.
      where: Names the traced function in errors.
      reuse: Whether the derived values will be kept for many calls. Then all known work
        is worth hoisting, as long as it makes nothing larger.

    Returns:
      The two parts. With nothing to hoist, `call` is `closed`, equation by equation.

    Raises:
      ValueError: If a marked value depends on an input that is not fixed.
    """
    if policy != "inline":
        task = _Task(inputs, policy, where, reuse)
        known = task.known()
        flattened = _flat.flatten(
            closed,
            lambda body, reads: (
                bool(reads & known) or any(_is_marked(e, (HOIST,)) for e in body.eqns)
            ),
            task.expose,
            _cost.OPAQUE,
        )
        flattened, marked = _settle_marks(flattened, inputs, where)
        derived = _choose(flattened, task, marked)
        if derived and not _has_references(flattened):
            return _split(flattened, inputs, derived)
    # Marks that this cut leaves alone are none of the business of one around it.
    jaxpr = _flat.without_constants(closed.jaxpr)
    jaxpr = jaxpr.replace(eqns=[_weaken(eqn) for eqn in jaxpr.eqns])
    empty = jaxpr.replace(invars=[], outvars=[], eqns=[], effects=set())
    nothing = jex.ClosedJaxpr(empty, [])
    whole, read = _without_unread(jaxpr)
    return Cut(nothing, nothing, jex.ClosedJaxpr(whole, []), (), (), read, 0)


def _without_unread(jaxpr: jex.Jaxpr) -> tuple[jex.Jaxpr, tuple[int, ...]]:
    """`jaxpr` without the inputs that it does not read, and where the others were."""
    if any(map(_equations.names_an_input, jaxpr.effects)):
        return jaxpr, tuple(range(len(jaxpr.invars)))
    read = variables([*jaxpr.outvars, *(a for e in jaxpr.eqns for a in e.invars)])
    positions = tuple(i for i, v in enumerate(jaxpr.invars) if v in read)
    return jaxpr.replace(invars=[jaxpr.invars[i] for i in positions]), positions


def derive(
    parts: Cut,
    values: Sequence[Any],
    layered: Sequence[bool],
    num_layers: int,
    *,
    batch_size: int | None = None,
    remat: bool | None = None,
) -> tuple[list[Any], list[Any]]:
    """Runs setup for all layers.

    Args:
      parts: A layer, cut.
      values: All inputs of the layer, the layered ones with a leading axis `[L, ...]`.
      layered: Which inputs are layered.
      num_layers: `L`.
      batch_size: How many layers run at once; by default, as many as are small enough.
      remat: Whether the backward pass runs setup again instead of keeping what it
        computed on the way; by default, if there is more than one batch.

    Returns:
      The derived values that all layers share, and those of each, `[L, ...]`.
    """
    shared = jex.jaxpr_as_fun(parts.shared)(*(values[i] for i in parts.shared_inputs))
    setup = parts.setup
    if not setup.jaxpr.outvars:
        return shared, []
    before, shared = shared, shared[: parts.num_shared]
    inputs = {i: values[i] for i in parts.setup_inputs}
    own = [i for i in inputs if layered[i]]

    def one(own_values: list[Any]) -> list[Any]:
        read = inputs | dict(zip(own, own_values, strict=True))
        return jex.jaxpr_as_fun(setup)(*before, *read.values())

    if not _cost.can_batch(setup.jaxpr):
        batch_size = 1
    elif batch_size is None and _cost.gathers(setup.jaxpr):
        batch_size = 1  # A batch would hold all of its layers whole on each device.
    elif batch_size is None:
        batch_size = _loop.batch_size(num_layers, _cost.largest_value(setup.jaxpr))
    return shared, _loop.in_batches(
        one, [inputs[i] for i in own], size=batch_size, remat=remat
    )


class _Task(NamedTuple):
    """What a cut is to do."""

    inputs: Sequence[Input]
    policy: str
    where: str
    reuse: bool

    def known(self) -> int:
        """The bit set of the known inputs."""
        return bits(i.known for i in self.inputs)

    def expose(self, eqn: jex.JaxprEqn, reads: list[int]) -> Exposed | None:
        """Cuts the body of a loop or the branches of a conditional.

        Args:
          eqn: An equation.
          reads: What each of its inputs depends on, as bit sets.

        Returns:
          The known part, then the equation without it; None if the equation is known as
          a whole, is of another kind, or has nothing to hoist.
        """
        expose = _CONTROL.get(eqn.primitive.name)
        bodies = _equations.closed_bodies(eqn)
        if expose is None or any(map(_equations.constants, bodies)):
            return None
        outer = [self._describe(mask) for mask in reads]
        if all(i.known for i in outer) or (
            all(i.fixed for i in outer) and _is_marked(eqn, (HOIST, HOISTED))
        ):
            return None
        return expose(self, eqn, outer)

    def _describe(self, reads: int) -> Input:
        """An input of an inner jaxpr that depends on the inputs `reads`."""
        fixed = bits(i.fixed for i in self.inputs)
        label = _name_inputs(self.inputs, reads & ~fixed)
        return Input(label, not reads & ~self.known(), not reads & ~fixed, False)

    def inner(self, closed: jex.ClosedJaxpr, inputs: Sequence[Input], what: str) -> Cut:
        """Cuts an inner jaxpr."""
        where = f"{self.where}, inside a {what}"
        return cut(closed, inputs, self.policy, where, reuse=self.reuse)


def _expose_scan(task: _Task, eqn: jex.JaxprEqn, outer: list[Input]) -> Exposed | None:
    """Moves what is known of each turn of a `scan` before it."""
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    if not length:
        return None
    places = carried(eqn)
    carry = _describe_carry(body.jaxpr, outer, places, "scan")
    mapped = [i._replace(layered=True) for i in outer[places.stop :]]
    inputs = [*outer[: places.start], *carry, *mapped]
    parts = task.inner(body, inputs, "scan")
    if not _count(parts):
        return None

    def run(*values: Any) -> list[Any]:
        shared, own = derive(parts, values, [i.layered for i in inputs], length)
        return [*shared, *(checkpoint_name(v, HOISTED) for v in own)]

    return Exposed(_trace(run, eqn), functools.partial(_rest_of_scan, eqn, parts))


def _rest_of_scan(eqn: jex.JaxprEqn, parts: Cut, derived: list[Atom]) -> jex.JaxprEqn:
    """The `scan` of calls, given the values that all turns share, then the others."""
    places = carried(eqn)
    call = _Call(parts, eqn.params["jaxpr"].jaxpr)
    constants = [i for i in parts.call_inputs if i < places.start]
    mapped = [i for i in parts.call_inputs if i >= places.stop]
    order = [*constants, *places, *mapped]
    count = parts.num_shared
    operands = [
        *derived[:count],
        *(eqn.invars[i] for i in order),
        *derived[count:],
    ]
    rest = call.taking(
        [*call.given[:count], *map(call.variable, order), *call.given[count:]]
    )
    return _equations.with_scan_body(eqn, operands, rest, count + len(constants))


def _expose_while(task: _Task, eqn: jex.JaxprEqn, outer: list[Input]) -> Exposed | None:
    """Moves what does not change over a `while` before it."""
    body = eqn.params["body_jaxpr"]
    of_test, of_body, carried = _consts_of_while(eqn)
    in_body = range(len(of_body), len(body.in_avals))
    inputs = [outer[i] for i in (*of_body, *carried)]
    carry = _describe_carry(body.jaxpr, inputs, in_body, "while")
    test = task.inner(
        eqn.params["cond_jaxpr"], [*(outer[i] for i in of_test), *carry], "while"
    )
    inputs = [*(outer[i] for i in of_body), *carry]
    turn = task.inner(body, inputs, "while")
    if "while" in map(_name, _all_equations(turn.shared.jaxpr)):
        turn = cut(body, inputs, "inline", "")  # It may never run, so need not end.
    if not _count(test) and not _count(turn):
        return None

    def run(*values: Any) -> list[Any]:
        def shared(parts: Cut, consts: range) -> list[Any]:
            read = [values[i] for i in (*consts, *carried)]
            setup = jex.jaxpr_as_fun(parts.shared)
            return setup(*(read[i] for i in parts.shared_inputs))

        return [*shared(test, of_test), *shared(turn, of_body)]

    after = functools.partial(_rest_of_while, eqn, test, turn)
    return Exposed(_trace(run, eqn), after)


def _consts_of_while(eqn: jex.JaxprEqn) -> tuple[range, range, range]:
    """Which inputs of a `while` are constants of its test, of its body, its carry."""
    test = eqn.params["cond_nconsts"]
    body = test + eqn.params["body_nconsts"]
    return range(test), range(test, body), range(body, len(eqn.invars))


def _rest_of_while(
    eqn: jex.JaxprEqn, test: Cut, turn: Cut, derived: list[Atom]
) -> jex.JaxprEqn:
    """The `while` of calls, given the derived values of its test, then its body."""
    of_test, of_body, carried = _consts_of_while(eqn)
    rest, operands, params = list(derived), [], dict(eqn.params)
    for name, parts, consts in (("cond", test, of_test), ("body", turn, of_body)):
        call = _Call(parts, eqn.params[f"{name}_jaxpr"].jaxpr)
        read = [i for i in parts.call_inputs if i < len(consts)]
        order = [*read, *range(len(consts), len(consts) + len(carried))]
        taken = [*call.given, *map(call.variable, order)]
        params[f"{name}_jaxpr"] = call.taking(taken)
        params[f"{name}_nconsts"] = len(call.given) + len(read)
        operands += [*rest[: len(call.given)], *(eqn.invars[consts[i]] for i in read)]
        rest = rest[len(call.given) :]
    operands += [eqn.invars[i] for i in carried]
    return eqn.replace(invars=operands, params=params)


def _expose_cond(task: _Task, eqn: jex.JaxprEqn, outer: list[Input]) -> Exposed | None:
    """Moves what is known in each branch of a known `cond` into one before it."""
    if not outer[0].fixed:  # Which branch runs is not known: none may run before.
        return None
    if eqn.params.get("branches_platforms") is not None:
        return None  # The platform tells which branch runs, when it is known.
    if not outer[0].known:
        task = task._replace(policy="marked")
    cuts = [task.inner(branch, outer[1:], "cond") for branch in eqn.params["branches"]]
    slots = _Slots([parts.shared.out_avals for parts in cuts])
    if not slots.avals or any(map(_is_key, slots.avals)):
        return None
    # Only what is read, as a cond of unknown operands would be cut again.
    read = sorted({i for parts in cuts for i in parts.shared_inputs})

    def filling(parts: Cut, own: list[int]) -> Callable[..., Any]:
        def branch(values: Sequence[Any]) -> list[Any]:
            setup = jex.jaxpr_as_fun(parts.shared)
            found = setup(*(values[read.index(i)] for i in parts.shared_inputs))
            filled = list(map(_equations.zeros, slots.avals))
            for slot, value in zip(own, found, strict=True):
                filled[slot] = jax.lax.convert_element_type(value, value.dtype)
            return filled

        return branch

    def run(index: Any, *values: Any) -> list[Any]:
        branches = list(map(filling, cuts, slots.of))
        derived = jax.lax.switch(index, branches, [values[i] for i in read])
        if task.policy == "marked":
            return [checkpoint_name(v, HOISTED) for v in derived]
        return derived

    after = functools.partial(_rest_of_cond, eqn, cuts, slots)
    return Exposed(_trace(run, eqn), after)


def _rest_of_cond(
    eqn: jex.JaxprEqn, cuts: list[Cut], slots: "_Slots", derived: list[Atom]
) -> jex.JaxprEqn:
    """The `cond` of calls, given what the slots hold."""
    order = sorted({i for parts in cuts for i in parts.call_inputs})
    branches = []
    for parts, own, branch in zip(cuts, slots.of, eqn.params["branches"], strict=True):
        call = _Call(parts, branch.jaxpr)
        given = dict(zip(own, call.given, strict=True))
        filled = [given.get(i) or fresh(v) for i, v in enumerate(derived)]
        branches.append(call.taking([*filled, *map(call.variable, order)]))
    operands = [eqn.invars[0], *derived, *(eqn.invars[1 + i] for i in order)]
    params = {**eqn.params, "branches": tuple(branches)}
    return eqn.replace(invars=operands, params=params)


_CONTROL = {"scan": _expose_scan, "while": _expose_while, "cond": _expose_cond}


class _Slots:
    """Room for the derived values of any one of several branches.

    Attributes:
      avals: The type of each slot.
      of: For each branch, the slots that hold its derived values.
    """

    def __init__(self, branches: Sequence[Sequence[Any]]):
        self.avals: list[Any] = []
        self.of: list[list[int]] = []
        for avals in branches:
            free = list(range(len(self.avals)))
            strong = [aval.update(weak_type=False) for aval in avals]
            self.of.append([self._take(aval, free) for aval in strong])

    def _take(self, aval: Any, free: list[int]) -> int:
        for slot in free:
            if self.avals[slot] == aval:
                free.remove(slot)
                return slot
        self.avals.append(aval)
        return len(self.avals) - 1


class _Call:
    """The call of a cut, whose inputs are to be put in another order.

    Attributes:
      given: The variables that take the derived values.
    """

    def __init__(self, parts: Cut, whole: jex.Jaxpr):
        variables = parts.call.jaxpr.invars
        self.given = variables[: _count(parts)]
        read = zip(parts.call_inputs, variables[_count(parts) :], strict=True)
        self._read = dict(read)
        self._jaxpr = parts.call.jaxpr
        self._whole = whole

    def variable(self, i: int) -> jex.Var:
        """What takes input `i`; a new variable if the call does not read it."""
        return self._read[i] if i in self._read else fresh(self._whole.invars[i])

    def taking(self, variables: Sequence[jex.Var]) -> jex.ClosedJaxpr:
        """The call as a function of `variables`."""
        return jex.ClosedJaxpr(self._jaxpr.replace(invars=list(variables)), [])


def _trace(run: Callable[..., Any], eqn: jex.JaxprEqn) -> jex.ClosedJaxpr:
    """`run` of the inputs of `eqn`."""
    return jax.make_jaxpr(run)(*(atom.aval for atom in eqn.invars))


def _describe_carry(
    body: jex.Jaxpr, outer: Sequence[Input], carried: range, what: str
) -> list[Input]:
    """The carry of a loop: what each turn hands on as it came does not change.

    Args:
      body: What each turn runs.
      outer: The inputs of the body.
      carried: Which of them are the carry.
      what: Kind of the loop.
    """
    return [
        outer[i]
        if body.outvars[k] is body.invars[i]
        else Input(f"the carry of a {what}", False, False, False)
        for k, i in enumerate(carried)
    ]


def _count(parts: Cut) -> int:
    """The number of derived values."""
    return parts.num_shared + len(parts.setup.jaxpr.outvars)


def _all_equations(jaxpr: jex.Jaxpr) -> Iterator[jex.JaxprEqn]:
    """All equations, those inside others too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in _equations.bodies(eqn):
            yield from _all_equations(body)


def _name(eqn: jex.JaxprEqn) -> str:
    return eqn.primitive.name


def _is_key(aval: Any) -> bool:
    return jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)


def _has_references(flattened: Flat) -> bool:
    """Whether an effect names an input, which a cut would change."""
    effects = (effect for node in flattened.nodes for effect in node.eqn.effects)
    return any(map(_equations.names_an_input, effects))


def _split(flattened: Flat, inputs: Sequence[Input], derived: Sequence[jex.Var]) -> Cut:
    """The parts of a function, given which values are derived."""
    outputs = flattened.outputs
    layered = bits(i.layered for i in inputs)
    derived = _used(flattened, outputs, derived)
    shared = [v for v in derived if not flattened.reads[v] & layered]
    own = [v for v in derived if flattened.reads[v] & layered]
    once = [
        v
        for node in _flat.needed(flattened.nodes, own, shared)
        if not node.reads & layered
        and _cost.is_expensive(node.eqn, _elements(flattened, node.reads))
        for v in node.eqn.outvars
    ]
    before = [*shared, *_used(flattened, own, [v for v in once if v not in shared])]
    shared_program, shared_inputs = _flat.program(flattened, before)
    setup, setup_inputs = _flat.program(flattened, own, before)
    call, call_inputs = _flat.program(
        flattened, outputs, [*shared, *own], with_effects=True
    )
    positions = shared_inputs, setup_inputs, call_inputs
    return Cut(shared_program, setup, call, *positions, len(shared))


def _used(
    flattened: Flat, outputs: Sequence[Atom], given: Sequence[jex.Var]
) -> list[jex.Var]:
    """Those of `given` that are read, if all are given, to compute `outputs`."""
    used = variables(outputs)
    for node in _flat.needed(flattened.nodes, outputs, given, with_effects=True):
        used |= variables(node.eqn.invars)
    return [v for v in given if v in used]


def _elements(flattened: Flat, reads: int) -> int:
    """The number of elements of the inputs `reads`."""
    return sum(map(_cost.size, _inputs_of(flattened, reads)))


def _inputs_of(flattened: Flat, reads: int) -> list[jex.Var]:
    return [v for i, v in enumerate(flattened.jaxpr.invars) if reads >> i & 1]


def _settle_marks(
    flattened: Flat, inputs: Sequence[Input], where: str
) -> tuple[Flat, list[jex.Var]]:
    """Checks the marked values, and weakens their marks for the cut around this one."""
    fixed = bits(i.fixed for i in inputs)
    nodes, marked = [], []
    for node in flattened.nodes:
        eqn, others = node.eqn, node.reads & ~fixed
        if not others and _is_marked(eqn, (HOIST, HOISTED)):
            marked.extend(eqn.outvars)
        elif others and _is_marked(eqn, (HOIST,)) and eqn.params.get("length") != 0:
            raise ValueError(_explain_mark(eqn, inputs, others, where))
        nodes.append(node._replace(eqn=_weaken(eqn)))
    return flattened._replace(nodes=nodes), marked


def _is_marked(eqn: jex.JaxprEqn, marks: Sequence[str]) -> bool:
    """Whether `eqn` is one of `marks`, or holds one."""
    is_mark = _name(eqn) == "name" and eqn.params["name"] in marks
    return is_mark or any(
        _is_marked(e, marks) for body in _equations.bodies(eqn) for e in body.eqns
    )


def _weaken(eqn: jex.JaxprEqn) -> jex.JaxprEqn:
    """`eqn` with its mark, or the marks inside, weakened."""
    if not _is_marked(eqn, (HOIST,)):
        return eqn
    if _name(eqn) == "name":
        return eqn.replace(params={**eqn.params, "name": HOISTED})

    return _equations.with_bodies(eqn, _weaken_all)


def _weaken_all(body: Any) -> Any:
    if isinstance(body, jex.ClosedJaxpr):
        eqns = list(map(_weaken, body.jaxpr.eqns))
        return jex.ClosedJaxpr(body.jaxpr.replace(eqns=eqns), body.consts)
    return body.replace(eqns=list(map(_weaken, body.eqns)))


def _explain_mark(
    eqn: jex.JaxprEqn, inputs: Sequence[Input], culprits: int, where: str
) -> str:
    found = _name_inputs(inputs, culprits)
    if _name(eqn) != "name":
        return (
            f"{where}: hk_stack.hoist was called inside a {_name(eqn)} that depends on "
            f"{found}; the cut cannot take it out of there. Compute the marked value "
            "before it."
        )
    return (
        f"{where}: hk_stack.hoist was given a value ({eqn.invars[0].aval.str_short()}) "
        f"that depends on {found}. Setup may depend on parameters, constants and "
        "arrays closed over from outside the stack only. Remove this hoist, or call it "
        "on the part that does not depend on it."
    )


def _name_inputs(inputs: Sequence[Input], reads: int) -> str:
    labels = [i.label for i in inputs] + ["a side effect or callback"]
    found = [label for bit, label in enumerate(labels) if reads >> bit & 1]
    return ", ".join(dict.fromkeys(found))


def _choose(flattened: Flat, task: _Task, marked: Sequence[jex.Var]) -> list[jex.Var]:
    """The derived values: what the call is handed instead of computing it.

    In automatic mode each value that the call reads and that took expensive work is
    handed over, or else the values that it is cheaply computed from, if these are
    smaller: `frontier[v]` is what to hand over for `v`.

    Who writes a gather into a layer wants one layer at a time whole on each device. So
    what is made of a gathered value is handed over only if, as a whole, it is no larger
    than a device's share of the inputs that it comes from.
    """
    if task.policy != "auto":
        return list(marked)
    known, inputs = task.known(), flattened.jaxpr.invars
    frontier: dict[jex.Var, frozenset[jex.Var]] = {}
    tails: dict[jex.Var, frozenset[jex.Var]] = {}  # of a cheap value: what it is from
    chosen: frozenset[jex.Var] = frozenset()
    if task.reuse:  # Then parameters are handed over too, for what is made of them.
        given = zip(inputs, task.inputs, strict=True)
        frontier = {v: frozenset([v]) for v, i in given if i.known}

    gathered: dict[jex.Var, int] = {}  # From how many devices.

    def behind(atoms: Iterable[Atom]) -> frozenset[jex.Var]:
        read = variables(atoms)
        return frozenset().union(*(frontier.get(v, ()) for v in read))

    for node in flattened.nodes:
        before = behind(node.eqn.invars)
        is_known = not node.reads & ~known
        if not is_known:
            chosen |= before
        expensive = is_known and _cost.is_expensive(
            node.eqn, _elements(flattened, node.reads)
        )
        counts = [gathered.get(v, 1) for v in variables(node.eqn.invars)]
        count = max([_equations.gathers_from(node.eqn), *counts])
        share = _cost.nbytes(_inputs_of(flattened, node.reads)) / count
        for v in node.eqn.outvars:
            gathered[v] = count
            is_whole = count > 1 and _cost.nbytes([v]) > share
            if v in marked or (expensive and not is_whole):
                frontier[v] = frozenset([v])
            elif is_known and before:
                tails[v] = before
                both = [frozenset([v]), before]
                if _cost.is_layout(node.eqn):
                    both.reverse()  # `min` takes the first of equals.
                frontier[v] = before if is_whole else min(both, key=_cost.nbytes)
    chosen = _share(chosen | behind(flattened.outputs), tails) - set(inputs)
    made = (v for node in flattened.nodes for v in node.eqn.outvars)
    return [v for v in made if v in chosen]


def _share(
    chosen: frozenset[jex.Var], tails: dict[jex.Var, frozenset[jex.Var]]
) -> frozenset[jex.Var]:
    """Replaces cheap values with what several of them come from, where smaller."""
    readers: dict[jex.Var, list[jex.Var]] = {}  # The values that come from one.
    for v, before in tails.items():
        for behind in before:
            readers.setdefault(behind, []).append(v)

    def coming_from(source: frozenset[jex.Var]) -> set[jex.Var]:
        found, waiting = set(source), list(source)
        while waiting:
            for v in readers.get(waiting.pop(), ()):
                if v not in found and tails[v] <= found:
                    found.add(v)
                    waiting.append(v)
        return found

    for v in tails:
        source = frozenset([v])
        while v in chosen and (deeper := _one_step_back(source, tails)) != source:
            source = deeper
            replaced = chosen & coming_from(source)
            if _cost.nbytes(source) < _cost.nbytes(replaced):
                chosen = (chosen - replaced) | source
    return chosen


def _one_step_back(
    variables: frozenset[jex.Var], tails: dict[jex.Var, frozenset[jex.Var]]
) -> frozenset[jex.Var]:
    return frozenset().union(*(tails.get(v, (v,)) for v in variables))
