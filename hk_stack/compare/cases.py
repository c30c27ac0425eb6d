"""From a case to programs: what each way runs, and what its results are compared by."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hk_stack
from hk_stack.compare import in_haiku, models, porting
from hk_stack.compare.results import Case

GENERATED, MICROBATCHES = 32, 8

# The largest difference between two ways, over the largest value: of outputs, losses
# and activations, and of gradients. Sums in another order; the S4 kernel adds most.
# Leaves of which the gradient is small (zero but for rounding, often) are held against
# a part of the largest of the others.
TOLERANCES = {
    "float64": {"output": 1e-9, "gradient": 1e-7, "smallest": 1e-3},
    "float32": {"output": 1e-4, "gradient": 2e-3, "smallest": 1e-3},
    "bfloat16": {"output": 5e-2, "gradient": 2e-1, "smallest": 1e-1},
}

# Values by the names in `TOLERANCES`.
Values = dict[str, Any]
# A program, compiled or not.
Compiled = Callable[..., Any]


class Task(NamedTuple):
    """A program, and what its results are compared by.

    Attributes:
      function: What is measured, called with `args`.
      args: Arrays in trees.
      values: From the compiled program to what other ways have to find as well.
      is_compiled: Whether it runs under `jit`.
      temp_bytes: The temporary memory, where it is not XLA that plans it.
    """

    function: Compiled
    args: tuple[Any, ...]
    values: Callable[[Compiled], Values]
    is_compiled: bool = True
    temp_bytes: Callable[[], int] | None = None


def reason(case: Case) -> str:
    """Why a case cannot be run at all; "" if it can."""
    model = models.MODELS[case.model]
    if case.mode == "port":
        return porting.reason(case)
    if case.dtype not in model.dtypes:
        return f"{case.model} runs in {' or '.join(model.dtypes)}, not {case.dtype}"
    if case.mode in ("decode", "generate") and not model.state_size:
        able = ", ".join(name for name, m in models.MODELS.items() if m.state_size)
        return f"{case.model} does not decode; {able} does"
    if case.mode.startswith("init") and case.dtype != "float32":
        return f"{case.mode} makes parameters in float32, not {case.dtype}"
    return ""


def all_ways(frameworks: Iterable[str], mode: str) -> list[tuple[str, str]]:
    """Pairs of a framework and a way, of frameworks that are installed."""
    if mode == "port":
        pairs = (way.split(" ", 1) for way in porting.PROGRAMS)
        return [(name, way) for name, way in pairs if name in frameworks]
    modules = {name: models.framework(name) for name in frameworks}
    return [
        (name, way)
        for name, module in modules.items()
        for way in module.WAYS_OF.get(mode, module.WAYS)
    ]


def task(case: Case, framework: str, way: str) -> Task | None:
    """What to measure of a case in a way; None if there is no such thing."""
    _, make = MODES[case.mode]
    if make is None:
        return _port(f"{framework} {way}")
    has_setup = models.MODELS[case.model].has_setup
    if not has_setup and any(name in way for name in _OF_SETUP):
        return None
    if way in ("prepared", "reused") and case.mode not in _OUTPUTS:
        return None
    if "remat" in way and case.mode in ("init", *_OUTPUTS):
        return None
    decodes = case.mode in ("decode", "generate")
    given = _given(case)._replace(decodes=decodes)
    made = _made(framework, way, given)
    return made and make(made, *given.args)


# Ways that only differ from another one where there is setup.
_OF_SETUP = (
    *("inline", "prepared", "split", "reused", "setup_first"),
    *("at a time", "layer by layer"),
)
# Modes without gradients or parameters: rematerialisation changes nothing in them, and
# only in them derived values may take the place of parameters.
_OUTPUTS = ("fwd", "decode", "generate", "eager")

# "loop + roll" is the function of "loop", as it is written, given to `hk_stack.roll`.
_OURS = {"roll": hk_stack.roll, "setup_first": hk_stack.setup_first}


def _made(framework: str, way: str, given: models.Given) -> models.Stack | None:
    """What a framework makes, or what one of ours makes of that."""
    of, _, name = way.rpartition(" + ")
    if name not in _OURS:
        stack: models.Stack | None = models.framework(framework).stack(way, given)
        return stack
    made = _made(framework, of, given)  # Its initialisation is measured already.
    return made and made._replace(apply=_OURS[name](made.apply), init=None)


@functools.lru_cache(maxsize=1)
def _given(case: Case) -> models.Given:
    """Parameters of Haiku's stack and activations, the same for all ways."""
    model = models.MODELS[case.model]._replace(width=case.width)
    shape = (case.batch, case.length, case.width)
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    given = models.Given(model, case.layers, None, x)
    init, _ = in_haiku.transformed(given, hk.layer_stack)
    params = _initialised(init, jax.random.key(1), x)
    params, x = jax.tree.map(lambda leaf: leaf.astype(case.dtype), (params, x))
    return given._replace(params=params, x=x)


def _initialised(init: Callable[..., models.Params], *args: jax.Array) -> Any:
    return jax.jit(init)(*args)


def _forward(stack: models.Stack, x: jax.Array, is_compiled: bool = True) -> Task:
    args = stack.params, x
    return Task(stack.apply, args, lambda run: {"output": run(*args)}, is_compiled)


def _loss(stack: models.Stack) -> Callable[[Any, jax.Array], jax.Array]:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        y = stack.apply(params, x)
        return jnp.mean(jnp.square(y.astype(jnp.promote_types(y.dtype, jnp.float32))))

    return loss


def _gradient(
    stack: models.Stack, x: jax.Array, function: Compiled | None = None
) -> Task:
    """A function `(params, x) -> (loss, gradient)`, by default of the mean square."""
    args = stack.params, x

    def values(run: Compiled) -> Values:
        loss, gradient = run(*args)
        return {"output": loss, "gradient": stack.to_haiku(gradient)}

    return Task(function or jax.value_and_grad(_loss(stack)), args, values)


def _accumulate(stack: models.Stack, x: jax.Array) -> Task:
    scales = jnp.linspace(0.5, 1.5, MICROBATCHES, dtype=x.dtype)
    mean = functools.partial(stack.mean_gradient or _one_by_one, _loss(stack))
    return _gradient(stack, jnp.multiply.outer(scales, x), mean)


def _one_by_one(
    loss: Callable[[Any, jax.Array], jax.Array], params: Any, xs: jax.Array
) -> Any:
    """The mean over microbatches, with a setup for each."""

    def step(sums: Any, x: jax.Array) -> tuple[Any, None]:
        found = jax.value_and_grad(loss)(params, x)
        return jax.tree.map(jnp.add, sums, found), None

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(loss, params, xs[0]))
    sums, _ = jax.lax.scan(step, (zeros, jax.tree.map(jnp.zeros_like, params)), xs)
    return jax.tree.map(lambda leaf: leaf / len(xs), sums)


def _train(stack: models.Stack, x: jax.Array) -> Task:
    """A step of Adam; compared by the losses before and after it."""
    optimiser = optax.adam(1e-3)
    loss = _loss(stack)

    def step(params: Any, state: Any, x: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, x)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    def values(run: Compiled) -> Values:
        *known, before = run(*args)
        return {"output": [before, run(*known, x)[2]]}

    args = stack.params, optimiser.init(stack.params), x
    return Task(step, args, values)


def _init(stack: models.Stack, x: jax.Array) -> Task | None:
    if stack.init is None:
        return None
    args = jax.random.key(2), x

    def values(run: Compiled) -> Values:
        # Ways draw other values, but of the same names and shapes.
        return {"output": jax.tree.map(jnp.zeros_like, stack.to_haiku(run(*args)))}

    return Task(stack.init, args, values)


def _init_sharded(stack: models.Stack, x: jax.Array) -> Task | None:
    task = _init(stack, x)
    if task is None:
        return None
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("devices",), (jax.sharding.AxisType.Auto,))

    def sharded(leaf: jax.Array) -> jax.Array:
        spec: list[str | None] = [None] * leaf.ndim
        # Of one layer: the layers themselves are what a loop makes one after another.
        able = [i for i, size in enumerate(leaf.shape) if size % devices == 0]
        if able:
            spec[able[-1]] = "devices"
        where = jax.NamedSharding(mesh, jax.P(*spec))
        found: jax.Array = jax.lax.with_sharding_constraint(leaf, where)
        return found

    init = task.function
    return task._replace(function=lambda *args: jax.tree.map(sharded, init(*args)))


def _decode(stack: models.Stack, *first: jax.Array) -> Task:
    """One step of time; compared by the outputs of the first three."""

    def values(run: Compiled) -> Values:
        carry, outputs = first, []
        for _ in range(3):
            carry = run(stack.params, *carry)
            outputs.append(carry[0])
        return {"output": outputs}

    return Task(stack.apply, (stack.params, *first), values)


def _generate(stack: models.Stack, x: jax.Array, states: jax.Array) -> Task:
    """Steps of time, each of which is given what the one before it returned."""
    args = stack.params, x, states

    def run(params: Any, x: jax.Array, states: Any) -> Any:
        def turn(carry: Any, _: None) -> tuple[Any, jax.Array]:
            carry = stack.apply(params, *carry)
            return carry, carry[0]

        return jax.lax.scan(turn, (x, states), length=GENERATED)

    # What small differences grow to after many steps is no measure.
    return Task(run, args, lambda run: {"output": run(*args)[1][:3]})


# What each mode measures, and the program of a stack.
MODES: dict[str, tuple[str, Callable[..., Task | None] | None]] = {
    "init": ("the framework's own initialisation, under jit and eagerly", _init),
    "fwd": ("the forward pass", _forward),
    "grad": ("loss and gradient", _gradient),
    "train": ("loss, gradient and a step of Adam", _train),
    "decode": ("one step of time", _decode),
    "generate": ("32 steps of time in one program", _generate),
    "accumulate": ("the mean gradient over eight microbatches", _accumulate),
    "setup": (
        "as grad: layers whose setup runs at once, kept or computed again",
        _gradient,
    ),
    "remat": ("as grad: ways of rematerialisation", _gradient),
    "eager": (
        "the forward pass outside of jit, as a loop in Python",
        functools.partial(_forward, is_compiled=False),
    ),
    "init_sharded": (
        "as init, under jit, each parameter in shards on all devices",
        _init_sharded,
    ),
    "port": ("trees of parameters: copied, stacked, ported from and to Flax", None),
}


def _port(way: str) -> Task:
    """Compared by the number of values in the tree, and their sum."""
    program = functools.partial(porting.PROGRAMS[way], porting.trees())

    def values(run: Compiled) -> Values:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(run())]
        count = sum(leaf.size for leaf in leaves)
        return {"output": [count, sum(leaf.sum(dtype=float) for leaf in leaves)]}

    size = functools.partial(porting.extra_bytes, program)
    return Task(program, (), values, is_compiled=False, temp_bytes=size)


# Whether two ways agree


def finite(values: Values) -> Values:
    """The values of the first way, which all others are held against.

    Raises:
      ValueError: If one is not finite.
    """
    for name, tree in values.items():
        if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree)):
            raise ValueError(f"its {name} is not finite; not measured")
    return values


def parity(values: Values, expected: Values, dtype: str) -> dict[str, float]:
    """By how much values differ from those of the first way, over the largest.

    Raises:
      ValueError: If they differ by more than `TOLERANCES` admits.
    """
    found = {}
    tolerance = TOLERANCES[dtype]
    for name in [name for name in values if values[name] is not expected[name]]:
        trees = values[name], expected[name]
        found[name] = largest_difference(*trees, tolerance["smallest"])
        if not found[name] <= tolerance[name]:
            raise ValueError(
                f"its {name} differs from that of the first way by {found[name]:.2g} "
                f"of the largest value, more than {tolerance[name]}; not measured"
            )
    return found


def largest_difference(tree: Any, expected: Any, smallest: float) -> float:
    """The largest between leaves, over the largest value of the leaf.

    Or over a part of that of all leaves, `smallest`, if this is more.
    """
    found, other = (jax.tree.map(jnp.shape, one) for one in (tree, expected))
    if found != other:
        raise ValueError(f"not of the same names and shapes: {found}, {other}")
    tree, expected = (
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(one)]
        for one in (tree, expected)
    )
    largest = [np.max(np.abs(leaf), initial=0.0) for leaf in expected]
    scale = [max(x, smallest * max(largest), 1e-30) for x in largest]
    differences = [
        np.max(np.abs(a - b), initial=0.0) / s
        for a, b, s in zip(tree, expected, scale, strict=True)
    ]
    return float(np.max(differences))
