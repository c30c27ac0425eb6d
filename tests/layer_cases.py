"""One table of layers that every test of the stack runs through, and a slow twin.

Shapes: `L` layers over `B` sequences of `T` steps of `D` features. A case makes its
layer function inside the transform, from the `layer_stack` under test: so it may close
over parameters of the model around it, and stack within the stack.

`layer_loop` is the executable reference: a stack written as a Python loop, with the
parameters, names and random keys of `hk.layer_stack`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import numpy as np

import hk_stack

L, B, T, D = 3, 2, 6, 8

POLICIES = ("auto", "marked", "inline")


class Case(NamedTuple):
    """A layer function, and what to give its stack.

    Attributes:
      name: Of the case.
      make: From a `layer_stack` to the layer function, inside the transform.
      inputs: Makes what the first layer is given.
      per_layer: Makes the per-layer inputs `[L, ...]`; none if not with_per_layer.
      kwargs: Keyword arguments of the layer function.
      num_layers: `L`.
      with_per_layer: Whether the layer function returns a pair.
      pass_reverse: Whether the layer function takes `reverse`.
      reverse: Whether the last layer runs first.
      unroll: Layers in one step of the loop.
      random: Whether a call draws random numbers.
      state: Whether the layer has state.
      nested: Whether there is a stack in the layer function.
      hoists: Whether "auto" moves anything out of the loop.
    """

    name: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    inputs: Callable[[], tuple[Any, ...]]
    per_layer: Callable[[], tuple[Any, ...]] = tuple
    kwargs: dict[str, Any] = {}  # noqa: RUF012, never changed
    num_layers: int = L
    with_per_layer: bool = False
    pass_reverse: bool = False
    reverse: bool = False
    unroll: int = 1
    random: bool = False
    state: bool = False
    nested: bool = False
    hoists: bool = False

    def model(self, layer_stack: Callable[..., Any], **options: Any) -> Any:
        """The stack of this case, `(carry, per_layer) -> results`, transformed."""

        def run(carry: tuple[Any, ...], per_layer: tuple[Any, ...]) -> Any:
            layer, kwargs = self.make(layer_stack), self.kwargs
            if layer_stack is hk.layer_stack and kwargs:
                layer, kwargs = functools.partial(layer, **kwargs), {}
            if self.reverse:
                kwargs = {**kwargs, "reverse": True}
            stack = layer_stack(
                self.num_layers,
                self.with_per_layer,
                self.unroll,
                self.pass_reverse,
                name="stack",
                **options,
            )
            return stack(layer)(*carry, *per_layer, **kwargs)

        return hk.transform_with_state(run)

    def given(self) -> tuple[Any, Any]:
        """Carry and per-layer inputs."""
        return self.inputs(), self.per_layer()


def layer_loop(
    num_layers: int,
    with_per_layer_inputs: bool = False,
    unroll: int = 1,
    pass_reverse_to_layer_fn: bool = False,
    name: str | None = None,
    microbatches: int | None = None,
) -> Callable[..., Any]:
    """What a stack means: a Python loop over layers that share nothing.

    With `microbatches`, what a pipeline means: that loop for each in turn.
    """
    del unroll
    kind = "with_per_layer" if with_per_layer_inputs else "no_per_layer"

    def stack(f: Callable[..., Any]) -> Callable[..., Any]:
        def stacked(*args: Any, reverse: bool = False, **kwargs: Any) -> Any:
            if pass_reverse_to_layer_fn:
                kwargs["reverse"] = reverse
            layer = hk.transform_with_state(lambda *args: f(*args, **kwargs))
            cut = 1 if with_per_layer_inputs else len(args)
            carry, per_layer = args[:cut], args[cut:]
            if microbatches is not None:
                carries = [
                    jax.tree.map(lambda leaf, m=m: leaf[m::microbatches], carry)
                    for m in range(microbatches)
                ]
                carry = carries[0]

            def own(i: int) -> Any:
                return jax.tree.map(lambda leaf: leaf[i], per_layer)

            def step(params: Any, state: Any, key: Any, carry: Any, i: int) -> Any:
                out, state = layer.apply(params, state, key, *carry, *own(i))
                out, y = out if with_per_layer_inputs else (out, None)
                return (out if cut > 1 else (out,)), y, state

            def init(key: Any) -> Any:
                trees, activations = [], carry
                for i in range(num_layers):
                    ours, key, apply_key = split(key, 3)
                    params, state = layer.init(ours, *activations, *own(i))
                    trees.append((params, state))
                    activations, _, _ = step(params, state, apply_key, activations, i)
                return pile(trees)

            def run(carry: Any, state: Any, keys: Any) -> Any:
                results: list[Any] = [None] * num_layers
                for i in reversed(range(num_layers)) if reverse else range(num_layers):
                    slices = jax.tree.map(lambda leaf, i=i: leaf[i], (params, state))
                    carry, *results[i] = step(*slices, keys[i], carry, i)
                return carry, *pile(results)

            key = hk.maybe_next_rng_key()
            # Not lift_with_state, which mixes up the states of unnamed stacks.
            with hk.name_scope(name or f"__layer_stack_{kind}"):
                lift = hk.transparent_lift_with_state
                lifted, updater = lift(init, allow_reuse=True)
            params, state = lifted(key)
            keys = split(hk.maybe_next_rng_key(), num_layers)
            if microbatches is None:
                carry, ys, state = run(carry, state, keys)
            else:
                found = []
                for m, carry in enumerate(carries):
                    ours = keys
                    if key is not None:
                        ours = [jax.random.fold_in(key, m) for key in keys]
                    *made, state = run(carry, state, ours)
                    found.append(made)
                carry = jax.tree.map(interleaved, *[carry for carry, _ in found])
                stacked = [ys for _, ys in found]
                ys = jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *stacked)
            updater.update(state)
            if with_per_layer_inputs:
                return carry[0], ys
            return carry if cut > 1 else carry[0]

        return stacked

    return stack


def interleaved(*parts: jax.Array) -> jax.Array:
    """Of which `parts[m]` has the rows `m::M`."""
    whole = jnp.stack(parts, 1)
    return whole.reshape(whole.shape[0] * len(parts), *whole.shape[2:])


def split(key: jax.Array | None, count: int) -> Any:
    return [None] * count if key is None else jax.random.split(key, count)


def pile(trees: list[Any]) -> Any:
    """One tree `[L, ...]` of L trees."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def sequences() -> tuple[jax.Array]:
    return (normal(0, B, T, D),)


def vectors() -> tuple[jax.Array]:
    return (normal(0, B, D),)


def numbers() -> tuple[jax.Array]:
    """One for each layer."""
    return (normal(5, L),)


def weight(name: str = "w", scale: float = 0.3) -> jax.Array:
    return hk.get_parameter(name, [D, D], init=hk.initializers.RandomNormal(scale))


# Layers without worthwhile setup.


def linear(x):
    return hk.Linear(D)(x)


def mlp(x):
    return x + hk.nets.MLP([2 * D, D], activation=jax.nn.gelu)(x)


def attention(x):
    mask = jnp.tril(jnp.ones([1, 1, T, T], bool))
    attend = hk.MultiHeadAttention(
        2, D // 2, w_init=hk.initializers.VarianceScaling(1.0), model_size=D
    )
    y = hk.LayerNorm(-1, True, True)(x)
    return x + attend(y, y, y, mask=mask)


def conv(x):
    return jax.nn.relu(hk.Conv1D(D, 3)(x))


def batch_norm(x, is_training):
    # Haiku's BatchNorm and dropout promote dtypes, and cannot start out in testing.
    with jax.numpy_dtype_promotion("standard"):
        y = hk.BatchNorm(True, True, 0.9)(x, is_training or hk.running_init())
    return jax.nn.relu(hk.Linear(D)(y))


def drop(rate, x):
    with jax.numpy_dtype_promotion("standard"):
        return hk.dropout(hk.next_rng_key(), rate, x)


def dropout(x, rate):
    return drop(rate, drop(rate, hk.Linear(D)(x)) + 1.0)


def counter(x):
    count = hk.get_state("count", [], jnp.int32, init=jnp.zeros)
    hk.set_state("count", count + 1)
    total = hk.get_state("total", [D], init=hk.initializers.Constant(0.5))
    hk.set_state("total", 0.9 * total + x.mean(0))
    return x + total[None] * count.astype(x.dtype)


def no_parameters(x):
    return jnp.sin(x) + x


def empty(x):
    return hk.Linear(0, w_init=jnp.zeros)(x)


def integers(tokens, is_even, x):
    embedded = hk.Embed(16, D)(tokens)
    return (tokens * 3 + 1) % 16, ~is_even, jnp.where(is_even, x + embedded, x)


def weak(x, scale):
    return x * scale * hk.get_parameter(
        "s", [], init=hk.initializers.Constant(0.9)
    ), 2.0


def mixed_precision(x):
    class Half(hk.Linear):
        pass

    half = jmp.get_policy("params=float32,compute=bfloat16,output=bfloat16")
    with hk.mixed_precision.push_policy(Half, half):
        return x + jnp.tanh(Half(D)(x))


class Pair:
    """A pytree node of our own."""

    def __init__(self, first, second):
        self.first = first
        self.second = second


jax.tree_util.register_pytree_with_keys(
    Pair,
    lambda pair: (
        (
            (jax.tree_util.GetAttrKey("first"), pair.first),
            (jax.tree_util.GetAttrKey("second"), pair.second),
        ),
        None,
    ),
    lambda _, children: Pair(*children),
)


def pytree_carry(carry):
    pair, rest = carry["pair"], carry["rest"]
    first = hk.Linear(D, name="first")(pair.first) + rest[0]
    return {"pair": Pair(jnp.tanh(first), pair.first), "rest": (pair.second, None)}


def several_arguments(x, y, z):
    return y, z["z"] + hk.Linear(D)(x), {"z": x}


def per_layer(x, scale, shifts):
    y = scale * hk.Linear(D)(x) + shifts["a"][None]
    return jnp.tanh(y), {"mean": y.mean(), "y": y, "b": shifts["b"]}


def per_layer_no_output(x, shift):
    return hk.Linear(D)(x) + shift, None


def knows_direction(x, reverse=False):
    y = hk.Linear(D)(x)
    return jnp.sin(y) if reverse else jnp.cos(y)


def per_layer_reversed(x, shift, reverse=False):
    y = hk.Linear(D)(x) + shift
    return (jnp.sin(y) if reverse else jnp.cos(y)), y


# Layers with setup.


def expm(x):
    return jnp.tanh(x @ jax.scipy.linalg.expm(weight()))


def slow(w):
    """Setup that compiles fast and is easy to find: nothing else has a `cumsum`."""
    return 0.3 * jnp.cumsum(jnp.tanh(w @ w), axis=0)


def short(x):
    return jnp.tanh(x @ slow(weight()))


def weight_norm(x):
    w = weight()
    scale = hk.get_parameter("scale", [D], init=jnp.ones)
    return x + x @ (w * (scale / jnp.linalg.norm(w, axis=0))[None])


def spectral_svd(x):
    w = weight()
    return x @ (w / jnp.linalg.svd(w, compute_uv=False)[0])


def spectral_power(x):
    w = weight()

    def improve(_, v):
        v = w.T @ (w @ v)
        return v / jnp.linalg.norm(v)

    v = jax.lax.fori_loop(0, 5, improve, jnp.ones([D]) / D**0.5)
    return x @ (w / jnp.linalg.norm(w @ v))


def spectral_state(x):
    return x @ hk.SpectralNorm(n_steps=2)(weight())


class DiagonalSSM(hk.Module):
    """A diagonal state space model as a convolution, `[B, T, D] -> [B, T, D]`."""

    def __call__(self, u):
        length, features, states = u.shape[-2], u.shape[-1], 4
        size = [features, states]
        log_step = hk.get_parameter(
            "log_step", [features], init=hk.initializers.RandomUniform(-4.0, -1.0)
        )
        decay = hk.get_parameter("decay", size, init=jnp.zeros)
        frequency = hk.get_parameter(
            "frequency", size, init=hk.initializers.RandomUniform(0.0, 6.0)
        )
        c = hk.get_parameter("c", [*size, 2], init=hk.initializers.RandomNormal())
        a = jax.lax.complex(-jnp.exp(decay), frequency)
        step = jnp.broadcast_to(jnp.exp(log_step)[:, None], size)
        a_step = a * jax.lax.complex(step, jnp.zeros_like(step))
        c = jax.lax.complex(c[..., 0], c[..., 1]) * (jnp.exp(a_step) - 1) / a
        time = jnp.arange(length).astype(a_step.dtype)[None, None]
        kernel = 2 * jnp.sum(c[..., None] * jnp.exp(a_step[..., None] * time), 1).real
        kernel_f = jnp.fft.rfft(kernel.T, n=2 * length, axis=0)
        u_f = jnp.fft.rfft(u, n=2 * length, axis=-2)
        return jnp.fft.irfft(u_f * kernel_f[None], n=2 * length, axis=-2)[:, :length]


def ssm(x):
    y = jax.nn.gelu(DiagonalSSM()(hk.LayerNorm(-1, True, True)(x)))
    return x + hk.Linear(D)(y)


def hoisting(function):
    """A case's `make` for layers that mark their setup."""

    def make(layer_stack):
        del layer_stack
        return lambda x: function(x, hk_stack.hoist)

    return make


def marked(x, hoist):
    w = hoist(jnp.exp(weight()))  # Not worth it, so "auto" needs the mark as well.
    return jnp.tanh(x @ w) + hoist({"b": w.sum(0)})["b"][None]


def shared_setup(x):
    """Derived values with several consumers, big and small, before and after."""
    w = weight()
    exp = slow(w)
    norm = jnp.linalg.norm(exp)
    y = jnp.tanh(x @ (exp / norm))
    return jnp.tanh(y @ exp.T) * norm + (x @ w) / norm + jnp.diag(exp)[None]


def checkpointed(x):
    @jax.checkpoint
    def inner(w, x):
        exp = slow(w)
        return jnp.tanh(jnp.sin(x @ exp) @ (w / jnp.linalg.norm(exp)))

    return inner(weight(), x)


def haiku_remat(x):
    def inner(x):
        exp = slow(weight())
        return jnp.tanh(jnp.sin(hk.Linear(D)(x)) @ exp)

    return x + hk.remat(inner)(x)


def jitted(x):
    @jax.jit
    def inner(w, x):
        y = jax.jit(slow)(w)
        return jnp.tanh(x @ y), y[0]

    y, first = inner(weight(), x)
    return y * first[None]


@jax.custom_jvp
def clip_norm(w, x):
    return x * jnp.minimum(1.0, 1.0 / jnp.linalg.norm(w)), jnp.sum(w)


@clip_norm.defjvp
def _clip_norm_jvp(primals, tangents):
    # Not the derivative, on purpose: a cut that differentiates the body shows.
    return clip_norm(*primals), (3.0 * tangents[1], 2.0 * jnp.sum(tangents[0]))


@jax.custom_jvp
def custom_expm(w):
    return slow(w)


@custom_expm.defjvp
def _custom_expm_jvp(primals, tangents):
    return custom_expm(*primals), 2.0 * tangents[0]


def custom_jvp(x):
    w = weight()
    y, total = clip_norm(w, x)
    return jnp.tanh(y @ custom_expm(w)) + total


@jax.custom_vjp
def double_gradient(w, x):
    return x @ slow(w)


double_gradient.defvjp(
    lambda w, x: (double_gradient(w, x), (w, x)),
    lambda saved, ct: (2.0 * saved[1].T @ ct, 2.0 * ct @ saved[0]),
)


@jax.custom_vjp
def straight_through(w):
    return jnp.round(jnp.linalg.inv(w + 2.0 * jnp.eye(D)))


straight_through.defvjp(lambda w: (straight_through(w), None), lambda _, ct: (ct,))


def custom_vjp(x):
    w = weight()
    return jnp.tanh(double_gradient(w, x)) @ straight_through(w)


def control_flow(x):
    w = weight()
    keep = hk.get_parameter("keep", [], init=hk.initializers.RandomNormal())

    def body(h, step):
        return jnp.tanh(h @ slow(w)) + step, h.mean()

    h, means = jax.lax.scan(body, x, jnp.arange(3.0))
    h = jax.lax.fori_loop(0, 2, lambda _, h: h @ (w / jnp.linalg.norm(w)), h)
    inverse = jnp.linalg.inv(w + 2 * jnp.eye(D))
    h = jax.lax.cond(keep > 0, lambda h, w: h @ w, lambda h, w: h, h, inverse)
    # Its reverse-mode derivative is not defined.
    halved = jax.lax.while_loop(
        lambda h: jnp.max(jnp.abs(h)) > 1, lambda h: h / 2, jax.lax.stop_gradient(h)
    )
    return halved + jnp.tanh(h) * means.sum()


def scanned_setup(x):
    """Setup that is itself a loop, over parameters only."""
    w = weight()
    _, powers = jax.lax.scan(lambda p, _: (p @ w, p), jnp.eye(D), None, length=4)
    return jnp.tanh(jnp.einsum("bd,kde->be", x, powers))


def closed_over(layer_stack):
    del layer_stack
    table = np.random.default_rng(0).normal(size=[D, D]).astype(np.float32)
    mask = np.arange(D) % 2 == 0

    def layer(x):
        w = jnp.where(mask[None], weight(), 0.0)
        return jnp.tanh(x @ slow(w @ table))

    return layer


def closed_over_parameter(layer_stack):
    del layer_stack
    outer = hk.get_parameter("outer", [D, D], init=hk.initializers.RandomNormal(0.2))

    def layer(x):
        return jnp.tanh(x @ slow(outer) @ (outer @ weight()))

    return layer


def nested(layer_stack):
    def layer(x):
        def inner(y):
            return jnp.tanh(y @ slow(weight(scale=0.1)))

        return hk.Linear(D)(layer_stack(2, name="inner")(inner)(x))

    return layer


def nested_thrice(layer_stack):
    def innermost(x):
        w = weight(scale=0.1)
        return x + jnp.tanh(drop(0.3, x) @ (w / jnp.linalg.norm(w)))

    def middle(x, scale):
        x = layer_stack(2, name="innermost")(innermost)(x)
        return counter(x) * scale, x.mean()

    def layer(x):
        x, means = layer_stack(2, True, name="middle")(middle)(x, jnp.ones([2]) * 0.9)
        return hk.Linear(D)(x) * means.sum()

    return layer


def always(layer):
    """A case's `make` for layers that do not care in which stack they are."""
    return lambda layer_stack: layer


CASES = [
    Case("linear", always(linear), vectors),
    Case("mlp", always(mlp), vectors, unroll=2),
    Case("attention", always(attention), sequences),
    Case("conv", always(conv), sequences),
    Case(
        "batch_norm_train",
        always(batch_norm),
        vectors,
        kwargs={"is_training": True},
        state=True,
    ),
    Case(
        "batch_norm_test",
        always(batch_norm),
        vectors,
        kwargs={"is_training": False},
        state=True,
    ),
    Case("dropout", always(dropout), vectors, kwargs={"rate": 0.4}, random=True),
    Case("counter", always(counter), vectors, state=True),
    Case("no_parameters", always(no_parameters), vectors),
    Case("one_layer", always(mlp), vectors, num_layers=1),
    Case("one_layer_setup", always(short), vectors, num_layers=1, hoists=True),
    Case("empty_batch", always(short), lambda: (jnp.zeros([0, D]),), hoists=True),
    Case("empty_features", always(empty), lambda: (jnp.zeros([B, 0]),)),
    Case(
        "integers",
        always(integers),
        lambda: (jnp.array([1, 2]), jnp.array([[True], [False]]), *vectors()),
    ),
    Case("weak", always(weak), lambda: (*vectors(), 1.5)),
    Case("weak_integer", always(weak), lambda: (normal(0), 1)),
    Case(
        "mixed_precision",
        always(mixed_precision),
        lambda: (vectors()[0].astype(jnp.bfloat16),),
    ),
    Case(
        "pytree_carry",
        always(pytree_carry),
        lambda: (
            {
                "pair": Pair(normal(0, B, D), normal(1, B, D)),
                "rest": (normal(2, B, D), None),
            },
        ),
    ),
    Case(
        "several_arguments",
        always(several_arguments),
        lambda: (normal(0, B, D), normal(1, B, D), {"z": normal(2, B, D)}),
    ),
    Case(
        "per_layer",
        always(per_layer),
        vectors,
        lambda: (normal(5, L), {"a": normal(6, L, D), "b": jnp.arange(L)}),
        with_per_layer=True,
    ),
    Case(
        *("per_layer_no_output", always(per_layer_no_output), vectors, numbers),
        with_per_layer=True,
        reverse=True,
    ),
    Case("per_layer_none", always(lambda x: (linear(x), x.sum())), vectors)._replace(
        with_per_layer=True
    ),
    Case("reverse", always(short), vectors, reverse=True, hoists=True),
    Case("knows_forward", always(knows_direction), vectors, pass_reverse=True),
    Case(
        *("per_layer_reverse", always(per_layer_reversed), vectors, numbers),
        with_per_layer=True,
        pass_reverse=True,
        reverse=True,
    ),
    Case("expm", always(expm), vectors, hoists=True),
    Case("short", always(short), vectors, unroll=2, hoists=True),
    Case("weight_norm", always(weight_norm), vectors, hoists=True),
    Case("spectral_svd", always(spectral_svd), vectors, hoists=True),
    Case("spectral_power", always(spectral_power), vectors, hoists=True),
    Case("spectral_state", always(spectral_state), vectors, state=True),
    Case("ssm", always(ssm), sequences, hoists=True),
    Case("marked", hoisting(marked), vectors, hoists=True),
    Case("shared_setup", always(shared_setup), vectors, hoists=True),
    Case("checkpointed", always(checkpointed), vectors, hoists=True),
    Case("haiku_remat", always(haiku_remat), vectors, hoists=True),
    Case("jitted", always(jitted), vectors, hoists=True),
    Case("custom_jvp", always(custom_jvp), vectors, hoists=True),
    Case("custom_vjp", always(custom_vjp), vectors, hoists=True),
    Case("control_flow", always(control_flow), vectors, hoists=True),
    Case("scanned_setup", always(scanned_setup), vectors, hoists=True),
    Case("closed_over", closed_over, vectors, hoists=True),
    Case("closed_over_parameter", closed_over_parameter, vectors, hoists=True),
    Case("nested", nested, vectors, nested=True, hoists=True),
    Case(
        "nested_thrice",
        nested_thrice,
        vectors,
        nested=True,
        random=True,
        state=True,
        hoists=True,
    ),
]

by_name = {case.name: case for case in CASES}
