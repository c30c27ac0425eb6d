"""Random models with a stack of random layers in them, as plain data.

A `Program` is drawn by Hypothesis. `model` makes a Haiku model of it, around whatever
`layer_stack` it is given. A program is a list of steps; each adds a value to a pool and
reads the pool: so any list of steps is a model, and Hypothesis can drop any of them.

All values are bounded, and so are their gradients: two runs that disagree by more than
the order of additions explains differ in what they compute.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from layer_cases import drop

import hk_stack

N = 3  # Values are scalars, vectors [N] or matrices [N, N]: few shapes to compile.

SHAPES = {"scalar": [], "vector": [N], "matrix": [N, N]}
DTYPES = {
    "": jnp.float32,
    "half": jnp.float16,
    "brain": jnp.bfloat16,
    "complex": jnp.complex64,
    "int": jnp.int32,
}


class Step(NamedTuple):
    """One operation.

    Attributes:
      op: Its name in one of the tables below.
      reads: What it reads, counted from the end of the pool.
      variant: Which of its kinds.
      body: For an operation around others: these.
    """

    op: str
    reads: tuple[int, ...] = ()
    variant: int = 0
    body: tuple["Step", ...] = ()


class Program(NamedTuple):
    """A model: steps, a stack of layers, steps.

    Attributes:
      layer: What each layer does.
      before: What the model does before the stack; the layers can read the results.
      after: What it does after the stack.
      carry: The kinds of the carry's leaves, such as "matrix" or "vector brain".
      form: "arguments", "dict" or "tuple": how the carry is given.
      per_layer: The kinds of the per-layer inputs.
      outputs: Which values are per-layer outputs, counted from the end of the pool.
      num_layers: `L`.
      reverse: Whether the last layer runs first.
      unroll: Layers in one step of the loop.
      setup_batch_size: See `hk_stack.layer_stack`.
      setup_remat: See `hk_stack.layer_stack`.
      inline: Whether operations are equations, or calls of jitted functions.
      partitioned: With which `setup` of its stacks the model is partitioned.
    """

    layer: tuple[Step, ...]
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()
    carry: tuple[str, ...] = ("matrix",)
    form: str = "arguments"
    per_layer: tuple[str, ...] = ()
    outputs: tuple[int, ...] = ()
    num_layers: int = 2
    reverse: bool = False
    unroll: int = 1
    setup_batch_size: int | None = None
    setup_remat: bool | str = "auto"
    inline: bool = True
    partitioned: str = "inline"

    @property
    def with_per_layer(self) -> bool:
        return bool(self.per_layer or self.outputs)


Body = Callable[..., list[jax.Array]]


class Value(NamedTuple):
    """A value of the pool.

    Attributes:
      array: The value.
      fixed: Whether it depends on parameters and constants only, so that it may be
        marked. False if in doubt.
    """

    array: jax.Array
    fixed: bool


# From any value to one of a given kind.

inlined = functools.partial(jax.jit, inline=True)  # Traced once for all programs.


@inlined
def real(a: Any) -> jax.Array:
    """Any value in float32."""
    if jnp.iscomplexobj(a):
        a = a.real + 0.5 * a.imag
    if jnp.issubdtype(a.dtype, jnp.integer):
        return jnp.tanh(0.3 * a.astype(jnp.float32))
    return a.astype(jnp.float32)


@inlined
def matrix(a: Any) -> jax.Array:
    a = real(a)
    return jnp.broadcast_to(a[None] if a.ndim == 1 else a, [N, N])


@inlined
def vector(a: Any) -> jax.Array:
    a = real(a)
    return 0.5 * a.sum(0) if a.ndim == 2 else jnp.broadcast_to(a, [N])


@inlined
def scalar(a: Any) -> jax.Array:
    return real(a).mean()


@inlined
def integer(a: Any) -> jax.Array:
    """An integer from 0 to N - 1."""
    if jnp.issubdtype(a.dtype, jnp.integer):
        return jnp.abs(a).sum() % N
    return jnp.argmax(vector(a)).astype(jnp.int32)


def cast(a: jax.Array, dtype: str) -> jax.Array:
    if dtype == "int":
        return jnp.round(4.0 * real(a)).astype(jnp.int32)
    if dtype == "complex":
        return jax.lax.complex(real(a), 0.5 * real(a))
    return real(a).astype(DTYPES[dtype])


def of_kind(a: Any, kind: str) -> jax.Array:
    shape, _, dtype = kind.partition(" ")
    if dtype == "int":
        return jnp.broadcast_to(integer(a), SHAPES[shape])
    return cast({"scalar": scalar, "vector": vector, "matrix": matrix}[shape](a), dtype)


def well_conditioned(a: jax.Array) -> jax.Array:
    return 2.0 * jnp.eye(N) + 0.3 * jnp.tanh(matrix(a))


def positive(a: jax.Array) -> jax.Array:
    a = jnp.tanh(matrix(a))
    return a @ a.T + jnp.eye(N)


# Operations: on one value, with a variant; and on two.


def elementwise(a, variant):
    if jnp.issubdtype(a.dtype, jnp.integer):
        return (a * 3 + variant) % 5
    functions = [jnp.tanh, jnp.sin, lambda a: jnp.exp(jnp.tanh(a)), lambda a: 0.7 * -a]
    return functions[variant % 4](a)


def reshaped(a, variant):
    if variant < 3:
        return a.T if variant else 0.5 * matrix(a)[::-1]
    if variant < 6:
        return [scalar, vector, matrix][variant - 3](a)
    a = matrix(a)
    return [a[1], a[1, 2], jnp.concatenate([a[1:], 0.5 * a[:1]]), jnp.roll(a, 1, 1)][
        variant % 4
    ]


def reduced(a, variant):
    a = matrix(a)
    functions = [jnp.sum, jnp.max, jnp.linalg.norm, jax.scipy.special.logsumexp]
    return jnp.tanh(functions[variant % 4](a, axis=[0, 1, None][variant // 4]))


def cumulated(a, variant):
    functions = [jnp.cumsum, jnp.cumprod, jax.lax.cummax, jax.lax.cumlogsumexp]
    return 0.3 * functions[variant % 4](jnp.tanh(matrix(a)), axis=variant % 2)


def outer(a, variant):
    """Transcendental work on more than it comes from."""
    a = 0.3 * vector(a)
    return [jnp.cos, jnp.sin][variant % 2](a[:, None] * jnp.arange(1.0, N + 1)[None])


def normalised(a, variant):
    a = matrix(a)
    if variant % 2:
        return jax.nn.softmax(a, axis=-1)
    return a / (1.0 + jnp.linalg.norm(a))


def algebra(a, variant):
    functions = [
        lambda a: jnp.linalg.inv(well_conditioned(a)),
        lambda a: jnp.linalg.cholesky(positive(a)),
        lambda a: jax.scipy.linalg.expm(0.3 * jnp.tanh(matrix(a))),
        lambda a: jnp.linalg.solve(well_conditioned(a), jnp.tanh(vector(a))),
        lambda a: 0.3 * jnp.linalg.slogdet(well_conditioned(a))[1],
        lambda a: jnp.linalg.qr(well_conditioned(a))[1] * 0.3,
    ]
    return functions[variant % 6](a)


def fourier(a, variant):
    a = 0.3 * jnp.fft.fft(jnp.tanh(vector(a)))
    return [a, a.real, jnp.abs(a + 3.0), jnp.fft.ifft(a * a).real][variant % 4]


def ordered(a, variant):
    a = matrix(a)
    if variant % 4 == 0:
        return jnp.argsort(a[0])
    if variant % 4 == 1:
        return jnp.argmax(a, axis=0).astype(jnp.int32)
    return jnp.sort(a, axis=variant % 2)


def gathered(a, b, variant):
    a, i = matrix(a), integer(b)
    if variant % 3 == 0:
        return a[i]
    if variant % 3 == 1:
        return jax.lax.dynamic_update_slice(a, jnp.ones([1, N]), (i, jnp.zeros_like(i)))
    return a.at[i].add(0.5 * vector(b))


def random_constant(a, variant):
    """Random numbers that depend on no random key of the layer."""
    key = jax.random.fold_in(jax.random.key(variant), integer(a))
    return jnp.tanh(jax.random.normal(key, [N]))


def like(b, a):
    """`b` in the type of `a`, up to its rank."""
    dtype = next(name for name, dtype in DTYPES.items() if a.dtype == dtype)
    return cast(matrix(b) if a.ndim == 2 else vector(b) if a.ndim else scalar(b), dtype)


def combined(a, b, variant):
    if jnp.issubdtype(a.dtype, jnp.integer):
        return (a + like(b, a)) % 7
    b = like(b, a)
    pick = jnp.real(a) > 0
    results = [a + b, a * jnp.tanh(b), 0.5 * (a - b), jnp.where(pick, a, b)]
    return jnp.tanh(results[variant % 4])


def matmul(a, b, variant):
    dtype = jnp.bfloat16 if variant == 5 else jnp.float32
    a, b = matrix(a).astype(dtype), matrix(b).astype(dtype)
    if variant % 4 == 3:
        return jnp.tanh(0.5 * jnp.einsum("ij,jk->i", a, b))
    return jnp.tanh(0.5 * (a @ (b.T if variant % 2 else b)))


CASTS = ["half", "brain", *["", "complex", "int", "complex", "int"] * 2]
UNARY = {
    "elementwise": elementwise,
    "reshaped": reshaped,
    "reduced": reduced,
    "cumulated": cumulated,
    "outer": outer,
    "normalised": normalised,
    "algebra": algebra,
    "fourier": fourier,
    "ordered": ordered,
    "cast": lambda a, variant: cast(a, CASTS[variant]),
    "stopped": lambda a, variant: jax.lax.stop_gradient(a),
    "random_constant": random_constant,
}
BINARY = {"combined": combined, "matmul": matmul, "gathered": gathered}

# Traced once for all programs: as one equation each, or as those that it consists of.
OPERATIONS = {
    inline: {
        op: jax.jit(function, static_argnames="variant", inline=inline)
        for op, function in (UNARY | BINARY).items()
    }
    for inline in (False, True)
}


# What a layer is made of besides: constants, and what Haiku hands out.


def constant(name, variant):
    del name
    table = np.cos(np.arange(9, dtype=np.float32)).reshape([3, 3])
    values = [table, jnp.asarray(table[0]), np.float32(0.3), np.arange(3, dtype="i4")]
    return values[variant % 4]


def parameter(name, variant):
    kinds = ["matrix brain", "vector complex", "scalar", "vector", "vector"]
    shape, _, dtype = (*kinds, *["matrix"] * 7)[variant].partition(" ")
    return hk.get_parameter(name, SHAPES[shape], DTYPES[dtype], init=jnp.zeros)


def random_numbers(name, variant):
    del name
    key = hk.next_rng_key()
    if variant % 3 == 0:
        return jax.random.randint(key, [N], 0, 5)
    if variant % 3 == 1:
        return jax.random.uniform(jax.random.fold_in(key, variant), [N])
    return jnp.tanh(jax.random.normal(key, [N, N]))


def state(name, a, variant):
    """A moving average; of parameters alone, if `a` is known."""
    kind = ["vector", "matrix", "scalar", "scalar int"][variant % 4]
    shape, _, dtype = kind.partition(" ")
    before = hk.get_state(name, SHAPES[shape], DTYPES[dtype], init=jnp.zeros)
    new = of_kind(a, kind)
    if dtype == "int":
        new = (new + before) % 7
    elif variant < 8:
        new = 0.5 * (new + before)
    hk.set_state(name, new)
    return hk.get_state(name) if variant % 3 else before


def module(name, a, variant):
    if variant % 3 == 0:
        return jnp.tanh(hk.Linear(N, name=name, w_init=jnp.ones)(matrix(a)))
    if variant % 3 == 1:
        return jnp.tanh(hk.LayerNorm(-1, True, True, eps=0.1, name=name)(matrix(a)))
    return drop(0.4, matrix(a))


LEAVES = {"constant": constant, "parameter": parameter, "random": random_numbers}
MODULES = {"state": state, "module": module}


# Operations around a body of steps: `body(a, b)` is the list of the values that these
# compute, and `one(body)` makes a single array of them.

SAVE = [
    None,
    jax.checkpoint_policies.dots_saveable,
    jax.checkpoint_policies.everything_saveable,
    jax.checkpoint_policies.nothing_saveable,
]


def merged(values: list[jax.Array]) -> jax.Array:
    """One array that depends on all of `values`, which may be of many types."""
    if len(values) == 1:
        return jnp.asarray(values[0])
    return jnp.tanh(matrix(values[-1]) + 0.4 * sum(map(matrix, values[:-1])))


def one(body: Body) -> Callable[..., jax.Array]:
    return lambda *arrays: merged(body(*arrays))


def jit(body, a, b, variant):
    if variant % 3 == 0:
        return merged(jax.jit(jax.jit(body))(a, b))
    return merged(jax.jit(body)(a, b))


def checkpoint(body, a, b, variant):
    policy, prevent_cse = SAVE[variant % 4], variant < 6
    return merged(jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)(a, b))


def scan(body, a, b, variant):
    """A loop over the rows of `b`."""
    kind = "vector brain" if variant == 5 else ["vector", "matrix"][variant % 2]
    rows = matrix(b)[: 1 + variant % 3]

    def step(carry, row):
        new = of_kind(merged(body(carry, row)), kind)
        return new, (carry, row) if variant % 2 else None

    carry = of_kind(a, kind)
    carry, rest = jax.lax.scan(step, carry, rows, reverse=variant > 5)
    if rest is None:
        return carry
    return jnp.tanh(matrix(carry) + 0.3 * sum(matrix(r.mean(0)) for r in rest))


def scan_without_rows(body, a, b, variant):
    kind = ["vector", "matrix"][variant % 2]

    def step(carry, _):
        new = of_kind(merged(body(*carry)), kind)
        return (new, carry[variant % 3 // 2]), carry[1].mean()

    carry = (of_kind(a, kind), of_kind(b, kind))
    unroll = 2 if variant > 9 else 1
    carry, means = jax.lax.scan(step, carry, None, length=2, unroll=unroll)
    return 0.5 * (carry[0] + carry[1]) + means[0]


def fori_loop(body, a, b, variant):
    def step(i, carry):
        now = matrix(merged(body(carry, b)))
        return jnp.tanh(now + 0.1 * i.astype(jnp.float32))

    return jax.lax.fori_loop(0, 1 + variant % 2, step, matrix(a))


def while_loop(body, a, b, variant):
    """The number of steps depends on `b`. It has no reverse-mode derivative."""
    a, limit = jax.lax.stop_gradient((matrix(a), integer(b) + variant % 2))

    def step(carry):
        count, a = carry
        return count + 1, matrix(merged(body(a, jnp.cos(a))))

    carry = (jnp.zeros_like(limit), a)
    return jax.lax.while_loop(lambda carry: carry[0] < limit, step, carry)[1]


def map_rows(body, a, b, variant):
    del variant
    return jax.lax.map(lambda row: vector(merged(body(row, b))), matrix(a))


def cond(body, a, b, variant):
    def taken(a, b):
        return [matrix(value) for value in body(a, b)]

    def other(a, b):
        return [0.5 * jnp.cumsum(matrix(b), 0)] * len(jax.eval_shape(taken, a, b))

    if variant % 3 == 0:
        return merged(jax.lax.cond(scalar(a) > 0, taken, other, a, b))
    chosen = integer(b if variant % 2 else a)
    return merged(jax.lax.switch(chosen, [taken, other, taken], a, b))


def custom_jvp(body, a, b, variant):
    """Its derivative is not that of the body: a cut that differentiates it shows."""

    def function(a, b):
        return list(map(real, body(a, b)))

    rule = jax.custom_jvp(function)

    @rule.defjvp
    def _(primals, tangents):
        _, found = jax.jvp(function, primals, tangents)
        return rule(*primals), [t * (variant % 3) for t in found]

    return merged(rule(real(a), real(b)))


def custom_vjp(body, a, b, variant):
    """Its derivative is not that of the body, either."""

    def function(a, b):
        return list(map(real, body(a, b)))

    def backward(saved, ct):
        grad_a, grad_b = jax.vjp(function, *saved)[1](ct)
        return 2.0 * grad_a, (variant % 3) * grad_b

    rule = jax.custom_vjp(function)
    rule.defvjp(lambda a, b: (rule(a, b), (a, b)), backward)
    return merged(rule(real(a), real(b)))


def vmap(body, a, b, variant):
    axes = [(0, None), (0, 0), (None, 0)][variant % 3]
    a, b = (a if axes[0] is None else matrix(a)), (b if axes[1] is None else matrix(b))
    return jax.vmap(lambda a, b: vector(merged(body(a, b))), axes)(a, b)


def gradient(body, a, b, variant):
    del variant

    def energy(a):
        return jnp.sum(jnp.sin(real(merged(body(a, b)))))

    return jnp.tanh(jax.grad(energy)(matrix(a)))


def haiku_remat(body, a, b, variant):
    return merged(hk.remat(body, policy=SAVE[variant % 4])(a, b))


def haiku_cond(body, a, b, variant):
    def taken(a, b):
        return matrix(merged(body(a, b)))

    if hk.running_init():  # Of both branches: Haiku takes no note of a single one.
        return taken(a, b)
    choose = scalar(a if variant % 2 else b) > 0
    return hk.cond(choose, taken, lambda a, b: matrix(a), a, b)


def haiku_scan(body, a, b, variant):
    def step(carry, row):
        return matrix(merged(body(carry, row))), None

    if hk.running_init():  # Haiku would run it twice, and see its modules twice.
        return step(matrix(a), matrix(b)[0])[0]
    return hk.scan(step, matrix(a), matrix(b), reverse=bool(variant % 2))[0]


PURE = {  # Their bodies may read what is around them.
    "jit": jit,
    "checkpoint": checkpoint,
    "scan": scan,
    "scan_without_rows": scan_without_rows,
    "fori_loop": fori_loop,
    "map_rows": map_rows,
    "cond": cond,
    "vmap": vmap,
    "gradient": gradient,
}
CLOSED = {  # Theirs may not.
    "while_loop": while_loop,
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
}
HAIKU = {  # Theirs may even use Haiku's parameters, state and keys.
    "haiku_remat": haiku_remat,
    "haiku_cond": haiku_cond,
    "haiku_scan": haiku_scan,
}
AROUND = PURE | CLOSED | HAIKU
MARKABLE = ("jit", "checkpoint", "haiku_remat", "vmap")  # A mark may be in these.


class Runner:
    """Runs the steps of a program.

    Attributes:
      layer_stack: Makes the stacks inside its layers.
      operations: What runs the steps that consist of one operation.
    """

    def __init__(self, layer_stack: Callable[..., Any], inline: bool):
        self.layer_stack = layer_stack
        self.operations = OPERATIONS[inline]

    def run(
        self, steps: tuple[Step, ...], pool: list[Value], name: str, marks: bool
    ) -> list[Value]:
        """The values that the steps compute."""
        made: list[Value] = []
        for i, step in enumerate(steps):
            now = [*pool, *made]
            reads = [now[-1 - r % len(now)] for r in step.reads]
            made.append(self.step(step, reads, now, f"{name}_{i}", marks))
        return made

    def step(
        self, step: Step, reads: list[Value], pool: list[Value], name: str, marks: bool
    ) -> Value:
        arrays = [read.array for read in reads]
        fixed = all(read.fixed for read in reads)
        if step.op in LEAVES:
            return Value(LEAVES[step.op](name, step.variant), step.op != "random")
        if step.op in MODULES:
            return Value(MODULES[step.op](name, *arrays, step.variant), False)
        if step.op == "hoist":
            found = [v for v in reversed(pool) if v.fixed] if marks else []
            value = found[step.variant % len(found)] if found else reads[0]
            return Value(hk_stack.hoist(value.array), True) if found else value
        if step.op == "stack":
            return self.stack(step, arrays[0], pool, name)
        if step.op in AROUND:
            return self.around_body(step, reads, pool, name, marks)
        return Value(self.operations[step.op](*arrays, variant=step.variant), fixed)

    def around_body(
        self, step: Step, reads: list[Value], pool: list[Value], name: str, marks: bool
    ) -> Value:
        visible = [] if step.op in CLOSED else pool

        def body(*arrays: jax.Array) -> list[jax.Array]:
            own = [Value(a, r.fixed) for a, r in zip(arrays, reads, strict=True)]
            inside = marks and step.op in MARKABLE
            made = self.run(step.body, [*visible, *own], name, inside)
            return [jnp.asarray(value.array) for value in made]

        arrays = [jnp.asarray(read.array) for read in reads]
        fixed = all(v.fixed for v in (*visible, *reads))
        return Value(AROUND[step.op](body, *arrays, step.variant), fixed)

    def stack(self, step: Step, x: jax.Array, pool: list[Value], name: str) -> Value:
        """A stack inside the layer, which closes over the pool."""
        outside = [Value(v.array, True) for v in pool]

        def layer(x: jax.Array) -> jax.Array:
            made = self.run(step.body, [*outside, Value(x, False)], name, True)
            return jnp.tanh(0.5 * x + matrix(merged([v.array for v in made])))

        stack = self.layer_stack(1 + step.variant % 2, name=name)(layer)
        return Value(stack(matrix(x), reverse=step.variant > 7), False)


def model(program: Program, layer_stack: Callable[..., Any], **options: Any) -> Any:
    """The model, `(carry, per_layer, memory) -> results`, not yet transformed.

    Args:
      program: What it does.
      layer_stack: Makes its stacks.
      **options: Of all its stacks.

    Returns:
      A function to transform. It returns a dictionary of results.
    """
    make = functools.partial(layer_stack, **options)

    def run(carry: Any, per_layer: Any, memory: jax.Array) -> dict[str, Any]:
        runner = Runner(make, program.inline)
        given = [*carry, memory]
        pool = [Value(a, False) for a in given]
        pool += runner.run(program.before, pool, "before", True)
        carry = mixed_in(carry, [v.array for v in pool[len(given) :]], program.carry)
        stack = make(
            program.num_layers,
            program.with_per_layer,
            program.unroll,
            name="stack",
            **own_options(program, layer_stack),
        )
        layer = layer_function(program, runner, [Value(v.array, True) for v in pool])
        given = packed(carry, program)
        results = stack(layer)(*given, *per_layer, reverse=program.reverse)
        carry, ys = results if program.with_per_layer else (results, ())
        pool += [Value(a, False) for a in jax.tree.leaves(carry)]
        pool += [Value(real(y).mean(0), False) for y in ys]
        after = [v.array for v in runner.run(program.after, pool, "after", True)]
        return {"carry": carry, "ys": ys, "after": after}

    return run


def own_options(program: Program, layer_stack: Callable[..., Any]) -> dict[str, Any]:
    """The options that only `hk_stack.layer_stack` has."""
    if layer_stack is not hk_stack.layer_stack:
        return {}
    return {
        "setup_batch_size": program.setup_batch_size,
        "setup_remat": program.setup_remat,
    }


def packed(carry: list[jax.Array], program: Program) -> tuple[Any, ...]:
    """The carry as the arguments of the stack."""
    if program.form == "arguments" and not program.with_per_layer:
        return tuple(carry)
    if program.form == "dict":
        return ({"first": carry[0], "rest": carry[1:]},)
    return (tuple(carry),)


def mixed_in(carry: Any, values: list[Any], kinds: tuple[str, ...]) -> list[jax.Array]:
    """The carry with `values` mixed in, each into one leaf of it."""
    leaves = []
    for i, (x, kind) in enumerate(zip(carry, kinds, strict=True)):
        own = values[i :: len(kinds)]
        if kind.endswith("int"):
            leaves.append((x + sum(map(integer, own)) + 1) % N)
            continue
        # Not all of the leaves depend on those before them.
        kept = [] if i and own else [matrix(x)]
        total = sum([*kept, *(matrix(value) / len(own) for value in own)])
        leaves.append(of_kind(jnp.tanh(total), kind))
    return leaves


def layer_function(program: Program, runner: Runner, closed_over: list[Value]) -> Any:
    def run(carry: tuple[Any, ...], *per_layer: jax.Array) -> tuple[Any, Any]:
        leaves = jax.tree.leaves(carry)
        pool = [*closed_over, *(Value(a, False) for a in (*per_layer, *leaves))]
        made = [v.array for v in runner.run(program.layer, pool, "layer", True)]
        new = packed(mixed_in(leaves, made, program.carry), program)
        return new, [jnp.asarray(made[-1 - r % len(made)]) for r in program.outputs]

    def one(carry: Any) -> Any:
        return run(carry)[0][0]

    def two(first: jax.Array, second: jax.Array) -> Any:
        return run((first, second))[0]

    def three(first: jax.Array, second: jax.Array, third: jax.Array) -> Any:
        return run((first, second, third))[0]

    def with_per_layer(carry: Any, *per_layer: jax.Array) -> Any:
        (new, *_), ys = run(carry, *per_layer)
        return new, ys

    if program.with_per_layer:
        return with_per_layer
    count = len(program.carry) if program.form == "arguments" else 1
    return [one, two, three][count - 1]


# How they are drawn.

KINDS = ["matrix", "vector", "scalar", "vector complex"] * 5
KINDS += ["matrix brain", "vector half"]
READS = {
    **dict.fromkeys(LEAVES, 0),
    **dict.fromkeys((*UNARY, *MODULES, "hoist", "stack"), 1),
    **dict.fromkeys((*BINARY, *AROUND), 2),
}
SIMPLE = [*UNARY, *BINARY, "matmul", "matmul", "combined", "combined", "constant"]
HANDED_OUT = [*LEAVES, *MODULES, "hoist", "hoist", "hoist"]
CHOICES = {  # By where a step is: a choice of choices.
    "closed": [SIMPLE],
    "pure": [SIMPLE, [*PURE, *CLOSED, *CLOSED]],
    "haiku": [SIMPLE, [*PURE, *CLOSED, *CLOSED], HANDED_OUT],
    "layer": [SIMPLE, [*PURE, *CLOSED, *CLOSED], HANDED_OUT, [*HAIKU, "stack"]],
}


def inside(op: str, depth: int) -> str:
    """Where the body of a step is."""
    if op in CLOSED or depth == 2:
        return "closed"
    return "haiku" if op in (*HAIKU, "stack") else "pure"


@st.composite
def steps(draw: Any, where: str, least: int, most: int, depth: int = 0) -> Any:
    def step() -> Step:
        op = draw(st.sampled_from(draw(st.sampled_from(CHOICES[where]))))
        reads = tuple(draw(st.integers(0, 9)) for _ in range(READS[op]))
        body = ()
        if op in AROUND or op == "stack":
            body = draw(steps(inside(op, depth + 1), 1, 3, depth + 1))
        return Step(op, reads, draw(st.integers(0, 11)), body)

    return tuple(step() for _ in range(draw(st.integers(least, most))))


@st.composite
def programs(draw: Any) -> Program:
    """Random models. What shrinks stays a model."""
    some = functools.partial(st.lists, st.sampled_from(KINDS))
    integers = draw(st.lists(st.just("scalar int"), max_size=1))
    kinds = [*draw(some(min_size=1, max_size=2)), *integers]
    num_layers = draw(st.integers(1, 3))
    parameters = [Step("parameter", (), draw(st.integers(0, 11))) for _ in range(2)]
    return Program(
        layer=(*parameters, *draw(steps("layer", 2, 6))),
        before=draw(steps("haiku", 0, 2, 1)),
        after=draw(steps("haiku", 0, 2, 1)),
        carry=tuple(kinds),
        form=draw(st.sampled_from(["arguments", "tuple", "dict"])),
        per_layer=tuple(draw(some(max_size=2))),
        outputs=tuple(draw(st.lists(st.integers(0, 5), max_size=2))),
        num_layers=num_layers,
        reverse=draw(st.booleans()),
        unroll=draw(st.integers(1, 2)),
        setup_batch_size=draw(st.sampled_from([None, *range(1, num_layers + 1)])),
        setup_remat=draw(st.sampled_from(["auto", False, True])),
        inline=draw(st.booleans()),
        partitioned=draw(st.sampled_from(["inline", "auto"])),
    )
