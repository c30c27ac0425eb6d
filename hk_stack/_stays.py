"""What stays in a loop although it might leave, why, and what to write instead.

The call of a function that was cut is looked through for work that a reader may have
expected in its setup: what is computed of known values alone, and dear work that a
random key or the like keeps from being known. A product of activations and weights is
neither.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jax.extend import core as jex

from hk_stack import _cost, _equations, _flat, _source
from hk_stack._equations import Atom
from hk_stack._flat import Flat, Node, bits
from hk_stack._parts import Input


class Stayed(NamedTuple):
    """Work that the call does.

    Attributes:
      source: `file.py:line in function`.
      primitive: What does it: functions of JAX that were called there, or primitives.
      why: Why it was not hoisted.
      write: What to write, for it to be.
    """

    source: str
    primitive: str
    why: str
    write: str


class _Reason(NamedTuple):
    why: str
    write: str


def stayed(
    call: jex.Jaxpr, inputs: Sequence[Input], policy: str = "auto"
) -> tuple[Stayed, ...]:
    """What a call does that might have been setup.

    Args:
      call: A function that was cut, without its setup.
      inputs: What its inputs are; derived values are known.
      policy: What was asked to leave: see `_cut.cut`.
    """
    values = [
        _Value(i.label, i.known, i.known and not i.constant, i.carried) for i in inputs
    ]
    look = _Look(any(i.carried for i in inputs), _OF_POLICY.get(policy))
    found: dict[tuple[str, _Reason], dict[str, None]] = {}
    for line, function, reason in look.through(call, values):
        found.setdefault((line, reason), {})[function] = None
    return tuple(
        Stayed(line, ", ".join(functions), *reason)
        for (line, reason), functions in found.items()
    )


_HOIST = "hk_stack.hoist(value) moves it"
_CHEAP = _Reason("it is cheap", f"{_HOIST}, if that is worth the memory")
_LARGER = _Reason("it is larger than what it is made of", f"{_HOIST} nevertheless")
_GATHERED = _Reason(
    "it is made of gathered values, and would be whole on each device",
    f"{_HOIST} nevertheless",
)
_OPAQUE = _Reason(
    "it has side effects or runs foreign code", "compute it outside, and pass it in"
)
_OF_POLICY = {
    "inline": _Reason('setup="inline" was asked for', 'setup="auto" moves it'),
    "marked": _Reason(
        'setup="marked" was asked for', f'{_HOIST}, and so does setup="auto"'
    ),
}
_BEFORE = "compute it before, and use the result there"
_SPLIT = "split off what is made of parameters alone"


def _depends(on: str) -> _Reason:
    write = _SPLIT
    if on == "an array closed over":
        write = _HOIST
    elif "a random key" in on:
        write = "draw after it, or in training only"
    return _Reason(f"it depends on {on}", write)


_Found = tuple[str, str, _Reason]


class _Value(NamedTuple):
    """What an input of a call, or of what is in it, depends on.

    Attributes:
      label: What keeps it from being known.
      known: Whether that is nothing.
      learnt: Whether it depends on parameters.
      carried: Whether it depends on activations.
    """

    label: str
    known: bool = False
    learnt: bool = False
    carried: bool = False


class _Look(NamedTuple):
    """A look through a call.

    Attributes:
      is_stack: Whether it is that of a layer.
      because: Why dear work stays, whatever it is; None if that depends.
      line: The source line of the equation that is looked into.
      function: The function of JAX that it is a part of, if it is.
    """

    is_stack: bool
    because: _Reason | None
    line: str = _source.UNKNOWN
    function: str = ""

    def through(self, jaxpr: jex.Jaxpr, inputs: Sequence[_Value]) -> Iterator[_Found]:
        """Looks through a call, or what one of its equations runs."""
        constants = [_Value("", known=True)] * len(jaxpr.constvars)
        flat = _flat.flatten(jex.ClosedJaxpr(jaxpr, []), lambda body, reads: True)
        values = _Values(flat, [*constants, *inputs])
        for node in flat.nodes:
            name = node.eqn.primitive.name
            reason = self._reason(node, values)
            if reason or (name in _ENTERED and values.unknown(node.reads)):
                inside = self._at(node.eqn)
                if reason:
                    yield (
                        inside.line,
                        inside.function or _source.function(node.eqn),
                        reason,
                    )
                else:
                    yield from inside._into(node.eqn, values)

    def _at(self, eqn: jex.JaxprEqn) -> "_Look":
        """The look at where an equation is."""
        if self.function:  # What it runs says who called it first, or nobody.
            return self
        line = _source.line(eqn)
        line = self.line if line == _source.UNKNOWN else line
        return self._replace(line=line, function=_source.library_function(eqn))

    def _reason(self, node: Node, values: "_Values") -> _Reason | None:
        """Why an equation stays, if that is worth telling."""
        eqn = node.eqn
        if not eqn.outvars or not node.reads & values.learnt:
            return None
        if eqn.primitive.name in _cost.OPAQUE or eqn.effects:
            return None if values.unknown(node.reads) & ~values.effects else _OPAQUE
        if values.unknown(node.reads):
            is_odd = self._is_odd(node, values)
            return _depends(values.what_keeps(node.reads)) if is_odd else None
        if _cost.is_layout(eqn) or eqn.primitive.name in _UNCHANGED:
            return None
        because = self.because
        if because is None and values.is_gathered(eqn):
            because = _GATHERED
        if because:
            return because if values.is_expensive(node) else None
        if not values.is_large(node):
            return None
        return _LARGER if values.is_larger(node) else _CHEAP

    def _is_odd(self, node: Node, values: "_Values") -> bool:
        """Whether one would not think that such work depends on more than parameters.

        In a layer that is all dear work that does not depend on the activations, and
        what is hardly ever done to activations.
        """
        if not self.is_stack or values.is_product(node.eqn):
            return False
        is_active = node.reads & values.carried
        return (_cost.is_factorisation if is_active else _cost.is_work)(node.eqn)

    def _into(self, eqn: jex.JaxprEqn, values: "_Values") -> Iterator[_Found]:
        """Looks into an equation that depends on more than parameters."""
        name, inputs = eqn.primitive.name, list(map(values.describe, eqn.invars))
        look = self
        if name == "cond" and not inputs[0].known:
            why = f"it is in a conditional that depends on {inputs[0].label}"
            look = self._where(why)
        elif name == "while":
            look = self._where("it is in a while loop that depends on the rest")
        elif name in _equations.CUSTOM_DERIVATIVES:
            look = self._where(
                "it is in a function with its own derivative, which leaves as a whole"
            )
        for body, given in _bodies(eqn, inputs):
            yield from look.through(body, given)

    def _where(self, why: str) -> "_Look":
        return self._replace(because=self.because or _Reason(why, _BEFORE))


_ENTERED = frozenset(
    ("cond", "scan", "while", *_equations.JIT, *_equations.CUSTOM_DERIVATIVES)
)
# These make no work of a value that is known.
_UNCHANGED = frozenset(
    "convert_element_type name optimization_barrier pcast pvary reshard "
    "sharding_constraint".split()
)


class _Values:
    """The values in a call, and what is known of them.

    Attributes:
      learnt: The inputs that depend on parameters, as a bit set, as the rest.
      carried: The inputs that depend on activations.
      effects: What stands for side effects.
    """

    def __init__(self, flat: Flat, inputs: Sequence[_Value]) -> None:
        """Takes a flattened call.

        Args:
          flat: The call.
          inputs: What its inputs are.
        """
        self.learnt = bits(i.learnt for i in inputs)
        self.carried = bits(i.carried for i in inputs)
        self.effects = 1 << len(inputs)
        self._flat = flat
        self._known = bits(i.known for i in inputs)
        self._labels = [*(i.label for i in inputs), "a side effect or callback"]
        parameters = self._read(self.learnt & self._known)
        self._elements = sum(map(_cost.size, parameters))
        self._gathered: set[jex.Var] = set()
        for eqn in (node.eqn for node in flat.nodes):
            if _equations.gathers_from(eqn) > 1 or self.is_gathered(eqn):
                self._gathered.update(eqn.outvars)

    def unknown(self, reads: int) -> int:
        """What of `reads` is not known."""
        return reads & ~self._known

    def describe(self, atom: Atom) -> _Value:
        """A value, as an input of what is run on it."""
        reads = self._flat.dependencies(atom)
        return _Value(
            self.what_keeps(reads),
            known=not self.unknown(reads),
            learnt=bool(reads & self.learnt),
            carried=bool(reads & self.carried),
        )

    def what_keeps(self, reads: int) -> str:
        """What keeps a value from being known: activations first, in words."""
        unknown = self.unknown(reads)
        unknown = unknown & self.carried or unknown
        labels = (s for bit, s in enumerate(self._labels) if unknown >> bit & 1)
        return ", ".join(dict.fromkeys(labels))

    def is_product(self, eqn: jex.JaxprEqn) -> bool:
        """Whether something is multiplied with parameters, or divided by them."""
        reads = map(self._flat.dependencies, eqn.invars)
        has_known = any(r & self.learnt and not self.unknown(r) for r in reads)
        return _cost.is_product(eqn) and has_known

    def is_gathered(self, eqn: jex.JaxprEqn) -> bool:
        """Whether an equation reads what is made of gathered values."""
        return not self._gathered.isdisjoint(_equations.variables(eqn.invars))

    def is_expensive(self, node: Node) -> bool:
        """Whether a value is worth hoisting for its own sake."""
        read = self._read(node.reads)
        return _cost.is_expensive(node.eqn, lambda: sum(map(_cost.size, read)))

    def is_large(self, node: Node) -> bool:
        """Whether a value makes a difference among so many parameters."""
        elements = sum(map(_cost.size, node.eqn.outvars))
        return elements > 1 and 100 * elements >= self._elements

    def is_larger(self, node: Node) -> bool:
        """Whether a value is larger than what it is made of."""
        return _cost.nbytes(node.eqn.outvars) > _cost.nbytes(self._read(node.reads))

    def _read(self, reads: int) -> list[jex.Var]:
        inputs = enumerate(self._flat.jaxpr.invars)
        return [v for bit, v in inputs if reads >> bit & 1]


def _bodies(
    eqn: jex.JaxprEqn, inputs: list[_Value]
) -> Iterator[tuple[jex.Jaxpr, list[_Value]]]:
    """What an equation runs, with what is known of the inputs of that."""
    name, params = eqn.primitive.name, eqn.params
    carry = _Value(f"the carry of a {name}", learnt=True, carried=True)
    if name == "while":
        start = params["cond_nconsts"]
        stop = start + params["body_nconsts"]
        given = [*inputs[start:stop], *[carry] * (len(inputs) - stop)]
        yield params["body_jaxpr"].jaxpr, given
        return
    if name == "scan":
        places = _equations.carried(eqn)
        inputs = [carry if i in places else given for i, given in enumerate(inputs)]
    for body in _equations.bodies(eqn):
        yield body, inputs[len(inputs) - len(body.invars) :]
