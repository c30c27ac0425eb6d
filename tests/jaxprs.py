"""What a traced program holds, for assertions on it."""

from hk_stack._equations import bodies as bodies
from hk_stack._equations import carried as carried


def equations(jaxpr):
    """All equations, in order, those inside others too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in bodies(eqn):
            yield from equations(inner)


def names(jaxpr):
    """The names of all primitives, in order."""
    return [eqn.primitive.name for eqn in equations(jaxpr)]


def loop(jaxpr, length):
    """The last loop over `length` layers that is not inside another one."""
    found = [
        eqn
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "scan" and eqn.params["length"] == length
    ]
    assert found, f"no loop of length {length}"
    return found[-1]  # Setup may run layer after layer too, before it.


def body(jaxpr, length):
    """What runs in the loop over `length` layers."""
    return loop(jaxpr, length).params["jaxpr"].jaxpr


def outside(jaxpr, length):
    """The names of all primitives that are not in the loop over `length` layers."""
    the_loop = loop(jaxpr, length)
    return [
        name
        for eqn in jaxpr.eqns
        if eqn is not the_loop
        for name in [
            eqn.primitive.name,
            *(name for inner in bodies(eqn) for name in names(inner)),
        ]
    ]


def needed(jaxpr, count=None):
    """The equations that the first `count` outputs depend on (by default, all)."""
    live = {id(v) for v in jaxpr.outvars[:count]}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if any(id(v) in live for v in eqn.outvars):
            kept.append(eqn)
            live |= {id(v) for v in eqn.invars}
    return kept[::-1]
