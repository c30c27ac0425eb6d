"""`port.verify` finds mistakes in a model that was written again, and where."""

import functools
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hk_stack
from hk_stack import port

nn = pytest.importorskip("flax.linen")

B, T, D, F, V, L = 2, 5, 8, 12, 11, 2


@pytest.fixture(autouse=True)
def promotion():
    """Models promote, in double precision above all; and compile fast."""
    promotion = jax.numpy_dtype_promotion("standard")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_rank_promotion("allow"), promotion:
        yield
    jax.config.update("jax_disable_most_optimizations", False)


# The model in Flax


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(D, name=name)(x) for name in ("query", "key", "value"))
        return nn.Dense(D, name="out")(attend(q, k, v))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        norm = functools.partial(nn.LayerNorm, use_fast_variance=False)
        x = x + Attention(name="attention")(norm(name="norm_1")(x))
        h = nn.gelu(nn.Dense(F, name="mlp_in")(norm(name="norm_2")(x)))
        return x + nn.Dense(D, name="mlp_out")(h), None


class Model(nn.Module):
    is_scanned: bool = False

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(V, D, name="embed")
        positions = self.param("positions", nn.initializers.normal(), (T, D))
        x = table(ids) * D**0.5 + positions
        x = nn.Conv(D, (3,), name="conv")(x)
        if self.is_scanned:
            scan = nn.scan(
                nn.remat(Block), {"params": 1}, split_rngs={"params": True}, length=L
            )
            x, _ = scan(name="block")(x, None)
        else:
            for i in range(L):
                x, _ = Block(name=f"block_{i}")(x)
        x = nn.LayerNorm(use_fast_variance=False, name="norm")(x)
        return table.attend(x)


# The same in Haiku, with mistakes


def attend(
    q, k, v, heads=2, scale=None, mask_value=-1e9, mask=True, axis=-1, turn=False
):
    def split(x):
        if turn:
            return x.reshape(B, T, -1, heads).swapaxes(-1, -2)
        return x.reshape(B, T, heads, -1)

    q, k, v = map(split, (q, k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask:
        scores = jnp.where(jnp.tri(T, dtype=bool), scores, mask_value)
    y = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis), v)
    return y.reshape(B, T, D)


def haiku_model(
    *,
    eps=1e-6,
    last_eps=1e-6,
    embed_scale=D**0.5,
    activation=jax.nn.gelu,
    residual=1.0,
    is_post_norm=False,
    dropout=0.0,
    padding="SAME",
    one_plus=0.0,
    out_scale=1.0,
    shift=0,
    swap=False,
    stop=False,
    reverse=False,
    head_bias=0.0,
    **attention,
):
    """The model as a function of ids; each argument is a mistake."""

    def norm(x, name, eps=1e-6):
        y = hk.LayerNorm(-1, True, True, eps=eps, name=name)(x)
        return y + one_plus * x

    def attended(h):
        names = ("query", "key", "value")
        q, k, v = (hk.Linear(D, name=name)(h) for name in names)
        y = attend(k, q, v, **attention) if swap else attend(q, k, v, **attention)
        return hk.Linear(D, name="out")(y)

    def layer(x):
        h = norm(x, "norm_1", eps)
        h = hk.to_module(attended)(name="attention")(h if not is_post_norm else x)
        x = residual * x + h
        h = activation(hk.Linear(F, name="mlp_in")(norm(x, "norm_2")))
        if dropout:
            h = hk.dropout(hk.next_rng_key(), dropout, h)
        if stop:
            h = jax.lax.stop_gradient(h)
        return x + hk.Linear(D, name="mlp_out")(h)

    def model(ids):
        table = hk.Embed(V, D, name="embed")
        init = hk.initializers.RandomNormal()
        positions = hk.get_parameter("positions", [T, D], init=init)
        x = table(ids) * embed_scale + jnp.roll(positions, shift, 0)
        x = hk.Conv1D(D, 3, padding=padding, name="conv")(x)
        x = hk_stack.layer_stack(L, name="block")(layer)(x, reverse=reverse)
        x = hk.LayerNorm(-1, True, True, eps=last_eps, name="norm")(x)
        return x @ table.embeddings.T * out_scale + head_bias

    return model


class Mistake(NamedTuple):
    """What is wrong, where the report must point to, and what it must say."""

    options: dict[str, Any]
    module: str
    text: str
    rules: dict[str, Any] = {}  # noqa: RUF012, never changed
    is_scanned: bool = False


SWAPPED = {"block_*/attention/key": "block_*/attention/value"}
SWAPPED |= {"block_*/attention/value": "block_*/attention/key"}
COUNTED = {"block_0": "block_1", "block_1": "block_0"}
TURNED = {"": port.SAME, "block_*/attention/query/kernel": port.TRANSPOSED}
ATTENTION = "block/attention"
relu = jax.nn.relu

MISTAKES = {
    "epsilon": Mistake({"eps": 1e-5}, "block/norm_1", "epsilon"),
    "epsilon, scanned": Mistake({"eps": 1e-5}, "block/norm_1", "epsilon", {}, True),
    "epsilon of the last norm": Mistake({"last_eps": 1e-3}, "norm", "epsilon"),
    "swapped q and k": Mistake({"swap": True}, ATTENTION, "query, key"),
    "swapped q and k, scanned": Mistake({"swap": True}, ATTENTION, "query", {}, True),
    "swapped leaves": Mistake({}, ATTENTION, "query, key", {"rename": SWAPPED}),
    "transposed": Mistake({}, f"{ATTENTION}/query", "transposed", {"leaf": TURNED}),
    "no scale of embeddings": Mistake({"embed_scale": 1.0}, "", "a factor"),
    "exact GELU": Mistake(
        {"activation": functools.partial(jax.nn.gelu, approximate=False)},
        "block",
        "GELU",
    ),
    "another activation": Mistake(
        {"activation": relu}, "block", "activation", {}, True
    ),
    "no mask": Mistake({"mask": False}, ATTENTION, "mask"),
    "value of the mask": Mistake({"mask_value": -1.0}, ATTENTION, "mask"),
    "no scale of scores": Mistake({"scale": 1.0}, ATTENTION, "scale of scores"),
    "softmax over queries": Mistake({"axis": -2}, ATTENTION, "scores"),
    "number of heads": Mistake({"heads": 4}, ATTENTION, "heads"),
    "heads laid out otherwise": Mistake({"turn": True}, ATTENTION, "heads"),
    "no residual": Mistake({"residual": 0.0}, "block", "residual"),
    "no norm before attention": Mistake({"is_post_norm": True}, "block", "norms"),
    "one plus the scale": Mistake({"one_plus": 1.0}, "block", "residual", {}, True),
    "padding": Mistake({"padding": hk.pad.causal}, "conv", "padding"),
    "shifted positions": Mistake({"shift": 1}, "", "counted from another"),
    "dropout": Mistake({"dropout": 0.5}, "block", "dropout is on"),
    "layers counted otherwise": Mistake({}, "block", "layers", {"rename": COUNTED}),
    "reversed layers": Mistake({"reverse": True}, "block", "layers in another"),
    "scale of logits": Mistake({"out_scale": 0.5}, "", "the model returns"),
    "bias of logits": Mistake({"head_bias": 1.0}, "", "the model returns"),
}
SHORT = ("swapped leaves", "transposed", "layers counted otherwise")  # Compiled once.


@functools.cache
def of_flax(is_scanned):
    model = Model(is_scanned)
    ids = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
    types = jax.eval_shape(model.init, jax.random.key(0), ids)
    rng = np.random.default_rng(1)
    draw = functools.partial(rng.normal, scale=0.5)
    variables = jax.tree.map(lambda x: draw(size=x.shape).astype("f"), types)
    return model, variables, ids


def report_of(options, rules, is_scanned=False):
    model, variables, ids = of_flax(is_scanned)
    haiku = hk.transform_with_state(haiku_model(**options))
    like = jax.eval_shape(haiku.init, jax.random.key(0), ids)
    if is_scanned:
        rules = {"layer_axis": {"block": 1}, **rules}
    return port.verify(model.apply, haiku.apply, variables, like, ids, **rules)


@pytest.mark.long
@pytest.mark.parametrize("is_scanned", [False, True])
def test_models_that_agree(is_scanned):
    report = report_of({}, {}, is_scanned)
    assert report.ok, str(report)
    assert report.precision == "double" and report.module is None
    assert {row.name for row in report.gradients} > {"gradient of block/norm_1"}
    assert "agree" in str(report) and "gradient of embed" in str(report)


@pytest.mark.parametrize(
    "name",
    [x if x in SHORT else pytest.param(x, marks=pytest.mark.long) for x in MISTAKES],
)
def test_a_mistake(name):
    options, module, text, rules, is_scanned = MISTAKES[name]
    report = report_of(options, rules, is_scanned)
    assert not report.ok
    assert unnumbered(report.module) == module, str(report)
    assert text in str(report), str(report)


def unnumbered(module):
    return None if module is None else module.replace("block_1", "block")


@pytest.mark.long
def test_gradients_may_differ_where_outputs_agree():
    report = report_of({"stop": True}, {})
    assert not report.ok and report.module is None
    assert "Outputs agree, but not the gradient of block/" in str(report)
    assert "stop_gradient" in str(report)


# What is no Linen


def plain(change=lambda y: y, wrapped=lambda apply: apply, **options):
    """A report of a matrix, and of a function of what it makes."""
    kernel = np.arange(12, dtype=np.float32).reshape(3, 4)
    variables = {"params": {"linear": {"kernel": kernel}}}
    model = hk.transform_with_state(lambda x: hk.Linear(4, with_bias=False)(x))
    like = jax.eval_shape(model.init, jax.random.key(0), np.ones([2, 3], "f"))
    x = np.ones([2, 3], np.float32)
    return port.verify(
        lambda variables, x: change(x @ variables["params"]["linear"]["kernel"]),
        wrapped(model.apply),
        variables,
        like,
        x,
        **options,
    )


def test_plain_functions():
    report = plain(lambda y: y + 1)
    assert not report.ok and report.module is None
    assert "Nothing is known of modules" in str(report)
    assert [row.shapes for row in report.outputs] == [((2, 4), (2, 4))]
    report = plain(lambda y: y[:, :2])
    assert not report.ok and report.outputs[0].error == np.inf


def test_tied_leaves_have_gradients_that_add_up():
    """In Flax; in Haiku each has its own, and nothing is compared but the others."""
    table, other = np.ones([3, 4], np.float32), np.ones([4, 4], np.float32)
    variables = {"params": {"wte": {"embedding": table}, "a": {"kernel": other}}}
    rules = {"leaf": {"wte/embedding": port.tie("head/kernel", transposed=True)}}

    def in_flax(variables, ids):
        params = variables["params"]
        table = params["wte"]["embedding"]
        return table[ids] @ params["a"]["kernel"] @ table.T

    def in_haiku(ids):
        x = hk.Linear(4, with_bias=False, name="a")(hk.Embed(3, 4, name="wte")(ids))
        return hk.Linear(3, with_bias=False, name="head")(x)

    model, ids = hk.transform_with_state(in_haiku), np.array([0, 2, 1])
    like = jax.eval_shape(model.init, jax.random.key(0), ids)
    report = port.verify(in_flax, model.apply, variables, like, ids, **rules)
    assert report.ok and report.precision == "double", str(report)
    assert [row.name for row in report.gradients] == ["gradient of a"]
    assert "The two models agree" in str(report)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plain(lambda y: (y, y)), "flax_apply returns 2 arrays"),
        (lambda: plain(rename={"linea": "a"}), "beginning of no leaf's path"),
        (lambda: port.verify(None, None, {}, ({}, {}), ()), "expected a function"),
        (
            lambda: plain(wrapped=lambda f: lambda *args: f(*args)[0]),
            "no pair of outputs and state; give the apply of hk.transform_with_state",
        ),
        (
            lambda: plain(wrapped=lambda f: lambda *args: f(*args)[0].reshape(5)),
            r"this was in haiku_apply\(params, state, key, \*inputs\)\.",
        ),
        (
            lambda: plain(wrapped=lambda f: lambda params, rng, x: f(params, {}, x)),
            r"\*inputs\); give the apply of hk.transform_with_state\(model\)",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
