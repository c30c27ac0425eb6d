"""Reading the programs that stacks trace to."""

from collections.abc import Iterator
from typing import Any

import haiku as hk
import jax
from jax.extend import core as jex

import hk_stack


def equations(jaxpr: jex.Jaxpr) -> Iterator[jex.JaxprEqn]:
    """All equations of `jaxpr`, those of inner bodies included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for param in eqn.params.values():
            for value in param if isinstance(param, (tuple, list)) else (param,):
                if isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr)):
                    yield from equations(getattr(value, "jaxpr", value))


def names(jaxpr: jex.Jaxpr) -> list[str]:
    """Names of all equations of `jaxpr`, those of inner bodies included."""
    return [eqn.primitive.name for eqn in equations(jaxpr)]


def layer_loop(function: Any, *args: Any) -> jex.Jaxpr:
    """The body of the loop over layers that `function` runs: its last scan."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    return scans[-1].params["jaxpr"].jaxpr


def layer_body(layer: Any, *args: Any, **options: Any) -> jex.Jaxpr:
    """The body of the loop of a stack of three `layer`, with a random key."""
    model = hk.transform_with_state(
        lambda *args: hk_stack.layer_stack(3, **options)(layer)(*args)
    )
    key = jax.random.key(0)
    params, state = jax.eval_shape(model.init, key, *args)
    return layer_loop(model.apply, params, state, key, *args)
