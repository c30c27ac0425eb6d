"""The cut: which equations of a traced function are setup and which are call.

A traced function is a list of equations over inputs. An equation is *known* when all
it reads comes from inputs that are known (parameters and constants) and it has no
effects. Setup is the part of the known equations that is worth running before the
loop; what it hands to the call are the *derived values*. The call is the rest.

The cut looks through `jit` and rematerialised (`jax.checkpoint`) equations: a known
part inside one leaves it, and the rest stays inside. It cuts the bodies of loops and
the branches of conditionals in the same way (`_control`). Every other equation is left
whole. Everything here works on jaxprs, so any composition of `jit`, `grad` and `vmap`
around or inside the traced function is fine.
"""

from collections.abc import Iterable, Mapping, Sequence

from jax.extend import core as jex

from hk_stack import _cost, _equations, _flat, _hoist
from hk_stack._control import Task
from hk_stack._equations import Atom, variables
from hk_stack._flat import Flat, Node, bits
from hk_stack._marks import HOIST, HOISTED
from hk_stack._parts import Input, Parts
from hk_stack._spread import Devices


def cut(
    closed: jex.ClosedJaxpr,
    inputs: Sequence[Input],
    policy: str,
    where: str,
    *,
    reuse: bool = False,
    devices: Devices | None = None,
) -> Parts:
    """Cuts a traced function into setup and call.

    Args:
      closed: The traced function.
      inputs: Its inputs, the constants of `closed` first.
      policy: "auto" hoists marked values and whatever else is known and worth it,
        "marked" only marked values, "inline" nothing.
      where: Names the traced function in errors.
      reuse: Whether the derived values will be kept for many runs. Then all known work
        is worth hoisting, as long as it makes nothing larger.
      devices: Over which devices the setup of a `scan` is spread, if it is.

    Returns:
      The two parts. With nothing to hoist, `call` is `closed`, equation by equation.

    Raises:
      ValueError: If a marked value depends on an input that is not fixed.
    """
    return _cut(closed, Task(inputs, policy, where, reuse, _cut, devices))


def _cut(closed: jex.ClosedJaxpr, task: Task) -> Parts:
    if task.policy == "inline":
        return _uncut(closed.jaxpr)
    known = task.known()

    def opens(body: jex.Jaxpr, reads: int) -> bool:
        return bool(reads & known) or _hoist.are_marked(body.eqns, (HOIST,))

    flattened = _flat.flatten(closed, opens, task.expose)
    flattened, marked = _settle_marks(flattened, task)
    derived = _choose(flattened, task, marked)
    effects = (effect for node in flattened.nodes for effect in node.eqn.effects)
    # A cut would change which input is the one that an effect names.
    if not derived or any(map(_equations.names_an_input, effects)):
        return _uncut(closed.jaxpr)
    return _split(flattened, task.inputs, derived)


def _uncut(jaxpr: jex.Jaxpr) -> Parts:
    """The parts of a function of which nothing leaves."""
    jaxpr = _flat.without_constants(jaxpr)
    empty = _equations.replace(jaxpr, invars=[], outvars=[], eqns=[], effects=set())
    nothing = jex.ClosedJaxpr(empty, [])
    # Marks that this cut leaves alone are none of the business of one around it.
    whole = _hoist.weakened(jaxpr)
    positions = tuple(range(len(whole.invars)))
    if not any(map(_equations.names_an_input, whole.effects)):
        read = variables([*whole.outvars, *(a for e in whole.eqns for a in e.invars)])
        positions = tuple(i for i in positions if whole.invars[i] in read)
    whole = _equations.replace(whole, invars=[whole.invars[i] for i in positions])
    return Parts(nothing, nothing, jex.ClosedJaxpr(whole, []), (), (), positions, 0)


def _split(
    flattened: Flat, inputs: Sequence[Input], derived: Sequence[jex.Var]
) -> Parts:
    """The parts of a function, given which values are derived."""
    outputs = flattened.outputs
    layered = bits(i.layered for i in inputs)
    derived = _used(flattened, outputs, derived)
    shared = [v for v in derived if not flattened.reads[v] & layered]
    own = [v for v in derived if flattened.reads[v] & layered]
    # What only setup needs and no layer changes is computed once too, if that is work.
    once = [
        v
        for node in _flat.needed(flattened.nodes, own, shared)
        if not node.reads & layered and _is_expensive(flattened, node)
        for v in node.eqn.outvars
    ]
    before = [*shared, *_used(flattened, own, once)]
    shared_program, shared_inputs = _flat.program(flattened, before)
    setup, setup_inputs = _flat.program(flattened, own, before)
    call, call_inputs = _flat.program(
        flattened, outputs, [*shared, *own], with_effects=True
    )
    positions = shared_inputs, setup_inputs, call_inputs
    return Parts(shared_program, setup, call, *positions, len(shared))


def _used(
    flattened: Flat, outputs: Sequence[Atom], given: Sequence[jex.Var]
) -> list[jex.Var]:
    """Those of `given` that are read, if all are given, to compute `outputs`."""
    used = variables(outputs)
    for node in _flat.needed(flattened.nodes, outputs, given, with_effects=True):
        used |= variables(node.eqn.invars)
    return [v for v in given if v in used]


def _is_expensive(flattened: Flat, node: Node) -> bool:
    def elements() -> int:
        return sum(map(_cost.size, _inputs_of(flattened, node)))

    return _cost.is_expensive(node.eqn, elements)


def _inputs_of(flattened: Flat, node: Node) -> list[jex.Var]:
    inputs = flattened.jaxpr.invars
    return [inputs[i] for i in _flat.positions(node.reads) if i < len(inputs)]


def _settle_marks(flattened: Flat, task: Task) -> tuple[Flat, list[jex.Var]]:
    """Checks the marked values, and weakens their marks for the cut around this one."""
    fixed = task.fixed()
    nodes, marked = [], []
    for node in flattened.nodes:
        eqn, others = node.eqn, node.reads & ~fixed
        if not _hoist.are_marked([eqn], (HOIST, HOISTED)):
            nodes.append(node)
            continue
        if not others:
            marked.extend(eqn.outvars)
        elif (
            _hoist.are_marked([eqn], (HOIST,))
            and eqn.params.get("length") != 0  # No turn of the loop runs.
        ):
            raise ValueError(_explain_mark(eqn, task.names_of(others), task.where))
        nodes.append(node._replace(eqn=_hoist.weaken(eqn)))
    return flattened._replace(nodes=nodes), marked


def _explain_mark(eqn: jex.JaxprEqn, found: str, where: str) -> str:
    if (name := eqn.primitive.name) != "name":
        return (
            f"{where}: hk_stack.hoist was called inside a {name} that depends on "
            f"{found}; the cut cannot take it out of there. Compute the marked value "
            "before it."
        )
    return (
        f"{where}: hk_stack.hoist was given a value ({eqn.invars[0].aval.str_short()}) "
        f"that depends on {found}. Setup may depend on parameters, constants and "
        "arrays closed over from outside the stack only. Remove this hoist, or call it "
        "on the part that does not depend on it."
    )


Values = frozenset[jex.Var]
_NONE: Values = frozenset()


def _choose(flattened: Flat, task: Task, marked: Sequence[jex.Var]) -> list[jex.Var]:
    """The derived values: what the call is handed instead of computing it.

    The equations are visited in order. Those that are known extend the frontier: what
    to hand over, at this point, for each known value. The others are the call, and what
    they read of the known values has to be handed over: its frontier is chosen. At the
    end, values that come cheaply from the same few are replaced by these (`_share`).
    """
    if task.policy != "auto":
        return list(marked)
    known = task.known()
    frontier = _Frontier(flattened, task, marked)
    handed: set[jex.Var] = set()
    for node in flattened.nodes:
        if node.reads & ~known:
            handed |= frontier.behind(node.eqn.invars)
        frontier.extend(node, is_known=not node.reads & ~known)
    handed |= frontier.behind(flattened.outputs)
    # What is an input, the call has anyway.
    chosen = _share(frozenset(handed), frontier.sources) - set(flattened.jaxpr.invars)
    made = (v for node in flattened.nodes for v in node.eqn.outvars)
    return [v for v in made if v in chosen]


class _Frontier:
    """For each known value, what to hand over for it.

    An expensive value stands for itself: to compute it again in each layer is what the
    cut is to spare. A cheap one is computed in the call, from the expensive ones that
    are behind it, unless it is smaller than they are: then it too stands for itself.
    What is behind a value and cheap all the way to the inputs is nothing.

    Who writes a gather into a layer wants one layer at a time whole on each device. So
    what is made of a gathered value stands for itself only if, as a whole, it is no
    larger than a device's share of the inputs that it comes from.

    Where derived values are kept for many calls, what comes from constants alone is not
    one of them: the compiler computes it when it compiles the call.

    Attributes:
      sources: For each cheap value, the values behind it.
    """

    def __init__(self, flattened: Flat, task: Task, marked: Sequence[jex.Var]):
        self.sources: dict[jex.Var, Values] = {}
        self._flat = flattened
        self._marked = set(marked)
        self._of: dict[jex.Var, Values] = {}
        self._gathered: dict[jex.Var, int] = {}  # From how many devices.
        self._variable: int | None = None  # What is not constant, where it matters.
        if task.reuse:  # Then parameters are handed over too, for what is made of them.
            given = zip(flattened.jaxpr.invars, task.inputs, strict=True)
            self._of = {v: frozenset([v]) for v, i in given if i.known}
            self._variable = ~task.constant()

    def behind(self, atoms: Iterable[Atom]) -> Values:
        """What to hand over for several values."""
        return _NONE.union(*(self._of.get(v, _NONE) for v in variables(atoms)))

    def extend(self, node: Node, *, is_known: bool) -> None:
        """Goes on to what the next equation makes."""
        eqn = node.eqn
        is_constant = self._variable is not None and not node.reads & self._variable
        if is_constant or not is_known:
            for v in self._marked.intersection(eqn.outvars):
                self._of[v] = frozenset([v])
            return
        before = self.behind(eqn.invars)
        is_expensive = _is_expensive(self._flat, node)
        devices = self._devices(eqn)
        # Only then are sizes asked for: those of the activations may be symbolic.
        share = _cost.nbytes(_inputs_of(self._flat, node)) if devices > 1 else 0
        for v in eqn.outvars:
            if devices > 1:
                self._gathered[v] = devices
            is_whole = devices > 1 and _cost.nbytes([v]) * devices > share
            if v in self._marked or (is_expensive and not is_whole):
                self._of[v] = frozenset([v])
            elif before:
                self.sources[v] = before
                self._of[v] = before if is_whole else _smaller(eqn, v, before)

    def _devices(self, eqn: jex.JaxprEqn) -> int:
        """From how many devices the values behind an equation were gathered."""
        read = variables(eqn.invars).keys() & self._gathered.keys()
        return max([_equations.gathers_from(eqn), *(self._gathered[v] for v in read)])


def _smaller(eqn: jex.JaxprEqn, made: jex.Var, before: Values) -> Values:
    """What takes fewer bytes: a cheap value, or what it comes from."""
    both = [frozenset([made]), before]
    if _cost.is_layout(eqn):
        both.reverse()  # `min` takes the first of equals.
    return min(both, key=_cost.nbytes)


def _share(chosen: Values, sources: Mapping[jex.Var, Values]) -> Values:
    """Replaces cheap values with what several of them come from, where smaller.

    One small value may be behind many: the angle of which the call reads sine and
    cosine. Each of them alone is as small as the angle, so each was chosen; together
    they are larger. So for each chosen value the values behind it are tried, one step
    back after the other: with these at hand, all that comes from them need not be
    handed over.
    """
    for v in sources:
        source = frozenset([v])
        while v in chosen and (deeper := _one_step_back(source, sources)) != source:
            source = deeper
            replaced = chosen & _coming_from(source, sources)
            if _cost.nbytes(source) < _cost.nbytes(replaced):
                chosen = (chosen - replaced) | source
    return chosen


def _coming_from(source: Values, sources: Mapping[jex.Var, Values]) -> set[jex.Var]:
    """All that can be computed cheaply from `source`."""
    found = set(source)
    for v, before in sources.items():  # In the order in which they are computed.
        if before <= found:
            found.add(v)
    return found


def _one_step_back(source: Values, sources: Mapping[jex.Var, Values]) -> Values:
    return _NONE.union(*(sources.get(v, frozenset([v])) for v in source))
