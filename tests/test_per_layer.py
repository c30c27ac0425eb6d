"""Optimisers to which each layer of a stack is its own parameter."""

import inspect
import operator
import re

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import optax
import pytest
from agreement import assert_close, assert_equal
from interpreter import computed
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from optax import contrib

import hk_stack


@pytest.fixture(autouse=True)
def promotion():
    """Optax relies on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


L = 2
NAMES = (
    hk_stack.NumberedLayers("outer_*/inner_{}", "outer_*/inner", 2),
    hk_stack.NumberedLayers("outer_{}", "outer", L),
    hk_stack.NumberedLayers("layers_{}", "layers", L),
)
AXES = {
    "embed": {"w": 0},
    "layers": {"b": 1, "w": 1},
    "outer/inner": {"w": 2},
}
RATE = 1e-2


def tree(*of_steps):
    """Parameters, or gradients: in no stack, in a stack, in a stack in a stack."""

    def draw(*shape):
        return RANDOM.normal(size=(*of_steps, *shape)).astype(np.float32)

    return {
        "embed": {"w": draw(8, 4)},
        "layers": {"b": draw(L, 6), "w": draw(L, 4, 6)},
        "outer/inner": {"w": draw(L, 2, 5, 4)},
    }


RANDOM = np.random.default_rng(0)
PARAMS, GRADIENTS = tree(), tree(4)


def stacked(of_layers):
    for names in NAMES:
        of_layers = hk_stack.stack_params(of_layers, names, per_layer=True)
    return of_layers


def unstacked(of_stacks):
    for names in reversed(NAMES):
        of_stacks = hk_stack.unstack_params(of_stacks, names, per_layer=True)
    return of_stacks


def of_each_step(of_stacks):
    """Gradients of a loop of layers, `[steps, ...]`."""
    count = len(jax.tree.leaves(of_stacks)[0])
    each = (jax.tree.map(operator.itemgetter(i), of_stacks) for i in range(count))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(unstacked, each))


def python_loop(step, carry, gradients, length):
    for i in range(length):
        carry, _ = step(carry, jax.tree.map(operator.itemgetter(i), gradients))
    return carry, None


def steps(optimizer, params, gradients, loop=jax.lax.scan):
    """Parameters and state after a step for each of the gradients."""

    def step(carry, gradients):
        params, state = carry
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(params, gradients):
        first, *_ = jax.tree.leaves(gradients)
        carry = params, optimizer.init(params)
        return loop(step, carry, gradients, length=len(first))[0]

    return jax.tree.map(np.asarray, computed(run, params, gradients))


OF_LAYERS = unstacked(PARAMS), of_each_step(GRADIENTS)


def is_matrix(params):
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


def of_kind(params):
    return jax.tree.map(lambda leaf: f"{leaf.ndim} axes", params)


def once(step, *_):
    return step % 2 == 0


KINDS = {"1 axes": optax.sgd(RATE), "2 axes": optax.lamb(RATE)}
SGD, ADAM = optax.sgd(RATE), optax.scale_by_adam()

# Those that are called with a learning rate, and nothing else.
WITH_A_RATE = {
    optax: "adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan "
    "amsgrad fromage lamb lars lion novograd optimistic_adam_v2 "
    "optimistic_gradient_descent radam rmsprop rprop sgd sign_sgd signum sm3 yogi "
    "scale_by_learning_rate",
    contrib: "acprop ademamix adopt galore madgrad muon schedule_free_adamw "
    "schedule_free_sgd simplified_ademamix",
}
# Those that are called with nothing.
WITH_NOTHING = {
    optax: "centralize ema identity keep_params_nonnegative scale_by_adadelta "
    "scale_by_adam scale_by_adamax scale_by_adan scale_by_amsgrad scale_by_belief "
    "scale_by_distance_over_gradients scale_by_lion scale_by_novograd "
    "scale_by_optimistic_gradient scale_by_param_block_norm scale_by_param_block_rms "
    "scale_by_radam scale_by_rms scale_by_rss scale_by_sign scale_by_sm3 "
    "scale_by_stddev scale_by_trust_ratio scale_by_yogi set_to_zero zero_nans",
    contrib: "cocob scale_by_acprop scale_by_ademamix scale_by_adopt scale_by_cocob "
    "scale_by_galore scale_by_simplified_ademamix",
}
OTHERS = {
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
    "add_decayed_weights": lambda: optax.add_decayed_weights(0.1, mask=is_matrix),
    "apply_every": lambda: optax.chain(optax.lamb(RATE), optax.apply_every(2)),
    "chain": lambda: optax.chain(ADAM, optax.scale_by_trust_ratio()),
    "clip": lambda: optax.clip(0.1),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(0.1),
    "conditionally_mask": lambda: optax.conditionally_mask(optax.lamb(RATE), once),
    "conditionally_transform": lambda: optax.conditionally_transform(
        optax.lamb(RATE), once
    ),
    "ema": lambda: optax.ema(0.9),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.lamb)(
        learning_rate=lambda step: 0.1 / (step + 1.0)
    ),
    "masked": lambda: optax.masked(optax.lamb(RATE), is_matrix),
    "multi_transform": lambda: optax.multi_transform(KINDS, of_kind),
    "named_chain": lambda: optax.named_chain(("adam", ADAM), ("rate", SGD)),
    "partition": lambda: optax.partition(KINDS, of_kind),
    "scale": lambda: optax.scale(0.1),
    "scale_by_rprop": lambda: optax.scale_by_rprop(RATE),
    "scale_by_schedule": lambda: optax.scale_by_schedule(lambda step: 0.1 / (step + 1)),
    "selective_transform": lambda: optax.selective_transform(
        optax.lamb(RATE), freeze_mask=is_matrix
    ),
    "freeze": lambda: optax.freeze(is_matrix),
    "stateless": lambda: optax.stateless(lambda updates, params: updates),
    "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(
        lambda update, parameter: update / (1 + jnp.linalg.norm(parameter))
    ),
    "trace": lambda: optax.trace(0.9),
    "with_extra_args_support": lambda: optax.with_extra_args_support(optax.lamb(RATE)),
    "contrib.schedule_free": lambda: contrib.schedule_free(
        optax.lamb(RATE), learning_rate=RATE
    ),
    "contrib.scale_by_madgrad": lambda: contrib.scale_by_madgrad(RATE),
    "MultiSteps": lambda: optax.MultiSteps(optax.lamb(RATE), 2),
}
MIXES, DRAWS = "mixes parameters, ", "draws random numbers"
NEEDS = "needs more than|pass the latest loss"  # The latter is optax's own.
REFUSED = {
    "add_noise": (DRAWS, lambda: optax.add_noise(0.1, 0.5, 0)),
    "noisy_sgd": (DRAWS, lambda: optax.noisy_sgd(RATE, key=0)),
    "apply_if_finite": (MIXES, lambda: optax.apply_if_finite(SGD, 3)),
    "clip_by_global_norm": (MIXES, lambda: optax.clip_by_global_norm(1.0)),
    "normalize_by_update_norm": (MIXES, optax.normalize_by_update_norm),
    "flatten": (MIXES, lambda: optax.flatten(ADAM)),
    "scale_by_lbfgs": (MIXES, optax.scale_by_lbfgs),
    "lbfgs": (NEEDS, lambda: optax.lbfgs(RATE)),
    "polyak_sgd": (NEEDS, lambda: optax.polyak_sgd(RATE)),
    "scale_by_polyak": (NEEDS, optax.scale_by_polyak),
    "scale_by_backtracking_linesearch": (
        NEEDS,
        lambda: optax.scale_by_backtracking_linesearch(3),
    ),
    "scale_by_zoom_linesearch": (NEEDS, lambda: optax.scale_by_zoom_linesearch(3)),
    "contrib.dadapt_adamw": (MIXES, contrib.dadapt_adamw),
    "contrib.mechanize": (MIXES, lambda: contrib.mechanize(SGD)),
    "contrib.normalize": (MIXES, contrib.normalize),
    "contrib.prodigy": (MIXES, contrib.prodigy),
    "contrib.momo": (NEEDS, contrib.momo),
    "contrib.momo_adam": (NEEDS, contrib.momo_adam),
    "contrib.reduce_on_plateau": (NEEDS, contrib.reduce_on_plateau),
    "contrib.sam": (MIXES, lambda: contrib.sam(SGD, contrib.normalize())),
}
# What is neither, and why.
ASIDE = {
    "optimistic_adam": "is deprecated",
    "snapshot": "keeps a measure of all parameters",
    "measure_with_ema": "makes of a measure of all parameters an average",
    "lookahead": "is of pairs of parameters, fast and slow, not of parameters",
    "inject_stateful_hyperparams": "another name of inject_hyperparams",
    "contrib.scale_by_muon": "takes a tree of what is no array; muon is as in a loop",
    "contrib.sophia": "asks for the loss function when it is updated",
    "contrib.dpsgd": "takes gradients of each example",
    "contrib.differentially_private_aggregate": "takes gradients of each example",
    "contrib.split_real_and_imaginary": "is of complex parameters: see below",
}


def prefix(module):
    return "contrib." if module is contrib else ""


def cases():
    """Those that must be as in a loop of layers, by name."""
    modules = {"contrib.": contrib, "": optax}
    found = {
        name: make
        for name, make in OTHERS.items()
        for before in [name[: name.find(".") + 1]]
        if hasattr(modules[before], name.removeprefix(before))
    }
    for table, args in ((WITH_A_RATE, [RATE]), (WITH_NOTHING, [])):
        for module, names in table.items():
            for name in names.split():
                make = getattr(module, name, None)  # Old versions lack some.
                if make is not None and prefix(module) + name not in found:
                    found[prefix(module) + name] = lambda make=make, a=args: make(*a)
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_four_steps_are_those_of_a_loop_of_layers(name):
    optimizer = CASES[name]()
    found = steps(hk_stack.per_layer(optimizer, AXES), PARAMS, GRADIENTS)
    params, state = steps(optimizer, *OF_LAYERS)
    assert_close(found[0], stacked(params), 1e-6)
    if jax.tree.leaves(state) and "embed" in str(jax.tree.structure(state)):
        assert_close(found[1], stacked(state), 1e-6)
        assert jax.tree.structure(unstacked(found[1])) == jax.tree.structure(state)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_of_several_parameters_is_refused(name):
    reason, make = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=reason) as found:
        steps(hk_stack.per_layer(make(), AXES), PARAMS, GRADIENTS)
    assert "optax.chain(" in str(found.value) or "latest loss" in str(found.value)


def test_each_transformation_of_optax_is_known():
    known = CASES.keys() | REFUSED.keys() | ASIDE.keys()
    for module in (optax, contrib):
        for name, make in inspect.getmembers(module, inspect.isfunction):
            made = str(inspect.signature(make).return_annotation)
            if "GradientTransformation" in made and not name.startswith("_"):
                assert prefix(module) + name in known


def test_complex_parameters():
    first, second = (tree()["layers"] for _ in range(2))
    params = jax.tree.map(lambda real, other: real + 1j * other, first, second)
    optimizer = contrib.split_real_and_imaginary(optax.lamb(RATE))
    ours = hk_stack.per_layer(optimizer, AXES["layers"])
    found, _ = steps(ours, params, jax.tree.map(lambda p: p[None], params))
    for i in range(L):
        one = jax.tree.map(operator.itemgetter(i), params)
        expected, _ = steps(optimizer, one, jax.tree.map(lambda p: p[None], one))
        assert_close(jax.tree.map(operator.itemgetter(i), found), expected, 1e-6)


def test_gradients_of_another_dtype():
    """A state that begins in half precision may go on in single."""
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    optimizer, gradients = optax.lamb(RATE), OF_LAYERS[1]
    found = steps(hk_stack.per_layer(optimizer, AXES), params, GRADIENTS, python_loop)
    expected = steps(optimizer, unstacked(params), gradients, python_loop)
    assert_close(found, stacked(expected), 1e-6)


HOLDERS = {
    "list": lambda a, b, c: [a, b, c],
    "tuple": lambda a, b, c: (a, (b, None), c),
    "names of an optimiser's": lambda a, b, c: {"mu": a, "count": b, "0": c},
    "one": lambda a, b, c: b,
}


@pytest.mark.parametrize("make", [optax.adafactor, optax.lamb])
@pytest.mark.parametrize("name", HOLDERS)
def test_trees_of_all_kinds(make, name):
    """Also those whose names are found in states that are of no parameter."""
    leaves = tree()["layers"]
    params = HOLDERS[name](leaves["b"][0], leaves["w"], leaves["b"])
    axes, optimizer = HOLDERS[name](0, 1, 1), make(RATE)

    def split(depth, leaf):
        return list(leaf) if depth else leaf

    def joined(depth, leaf):
        return np.stack(leaf) if depth else leaf

    of_layers = jax.tree.map(split, axes, params)
    one = [jax.tree.map(lambda p: p[None], p) for p in (params, of_layers)]
    found, state = steps(hk_stack.per_layer(optimizer, axes), params, one[0])
    expected, _ = steps(optimizer, of_layers, one[1])
    assert_close(found, jax.tree.map(joined, axes, expected), 1e-6)
    assert optax.tree_utils.tree_get(state, "count", filtering=is_number).shape == ()


def is_number(path, leaf):
    del path
    return leaf.dtype == jnp.int32


def test_names_two_parameters_that_mix():
    mixing = optax.clip_by_global_norm(1.0)
    with pytest.raises(ValueError, match=re.escape("embed/w with layers/b")):
        hk_stack.per_layer(mixing, AXES).init(PARAMS)
    params, gradients = (t["layers"] for t in (PARAMS, GRADIENTS))
    found = steps(hk_stack.per_layer(mixing, {"b": 0, "w": 0}), params, gradients)
    assert_equal(found[0], steps(mixing, params, gradients)[0])


def test_names_two_layers_that_mix():
    params, axes = {"layers": PARAMS["layers"]["w"]}, {"layers": 1}
    mixing = optax.clip_by_global_norm(1.0)
    with pytest.raises(ValueError, match=re.escape("layers/0 with layers/1")):
        hk_stack.per_layer(mixing, axes).init(params)
    masked = optax.masked(mixing, lambda p: jax.tree.map_with_path(is_of_layers, p))
    assert hk_stack.per_layer(masked, axes).init(params)  # Takes no list of layers.


def is_of_layers(path, _):
    return path[-1].key == "layers"


def test_in_chains_and_masks_of_a_model():
    """What is outside of it is as ever, and sees stacks."""

    def outside(inner):
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.masked(inner, lambda p: jax.tree.map_with_path(is_weight, p)),
        )

    def is_weight(path, _):
        return path[-1].key == "w"

    ours = outside(hk_stack.per_layer(optax.adafactor(RATE), AXES))
    found = steps(ours, PARAMS, GRADIENTS)
    expected = steps(outside(optax.adafactor(RATE)), *OF_LAYERS)
    assert_close(found, stacked(expected), 1e-6)


def test_what_is_known_of_a_tree_is_found_once():
    traced = []

    def update(updates, state, params=None):
        traced.append(1)
        return updates, state

    counted = optax.GradientTransformation(lambda params: (), update)
    ours = hk_stack.per_layer(counted, AXES)
    for _ in range(2):
        state = ours.init(PARAMS)
        jax.make_jaxpr(lambda *given: ours.update(*given))(PARAMS, state, PARAMS)
    assert len(traced) == 4  # Twice for what it mixes, and for each use.


@pytest.mark.parametrize("make", [optax.lamb, contrib.muon])
def test_programs_do_not_grow_with_depth(make):
    def program(layers):
        params = {"layers": jnp.ones([layers, 4, 6])}
        ours = hk_stack.per_layer(make(RATE), {"layers": 1})
        state = jax.eval_shape(ours.init, params)
        return jax.make_jaxpr(ours.update)(params, state, params)

    counts = [len(list(jaxprs.equations(program(n).jaxpr))) for n in (8, 64)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_state_and_updates_are_where_parameters_are(kind):
    mesh = jax.make_mesh((2, 2), ("data", "stage"), (kind,) * 2)
    rules = {"embed/w": P("data"), "layers/w": P("data", None)}
    where = hk_stack.shardings(PARAMS, rules, mesh, layer_axes=AXES, layers="stage")
    params = jax.device_put(PARAMS, where.tree)
    ours = hk_stack.per_layer(optax.adam(RATE), AXES)
    state = ours.init(params)
    updates, after = jax.jit(ours.update)(params, state, params)
    for found in (state[0].mu, updates, after[0].nu):
        for leaf, sharding in zip(
            jax.tree.leaves(found), jax.tree.leaves(where.tree), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    expected, _ = ours.update(PARAMS, ours.init(PARAMS), PARAMS)
    assert_close(updates, expected, 1e-6)


def test_many_models_at_once():
    ours = hk_stack.per_layer(optax.adafactor(RATE), AXES)
    several = GRADIENTS, jax.eval_shape(jax.vmap(ours.init), GRADIENTS), GRADIENTS
    updates, _ = jax.eval_shape(jax.vmap(ours.update), *several)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, GRADIENTS)


class TestScaleByLayer:
    def test_factors(self):
        decay = hk_stack.scale_by_layer(lambda i, n: 0.5 ** (n - 1 - i), AXES)
        found, _ = decay.update(PARAMS, decay.init(PARAMS))
        factors = np.array([0.5, 1.0], np.float32)
        expected = dict(PARAMS)
        expected["layers"] = {
            "b": factors[:, None] * PARAMS["layers"]["b"],
            "w": factors[:, None, None] * PARAMS["layers"]["w"],
        }
        w = PARAMS["outer/inner"]["w"]
        expected["outer/inner"] = {"w": factors[:, None, None, None] * w}
        assert_close(found, expected)


def mistake(run):
    with pytest.raises((ValueError, TypeError)) as found:
        run()
    return str(found.value)


def test_mistakes():
    adam = optax.adam(RATE)
    assert "not function" in mistake(lambda: hk_stack.per_layer(optax.adam, AXES))
    assert "found float at w" in mistake(lambda: hk_stack.per_layer(adam, {"w": 1.0}))
    ours = hk_stack.per_layer(adam, {"w": 1})
    assert "layer_axes of v, of shape (2,), is not there" in mistake(
        lambda: ours.init({"v": jnp.ones(2)})
    )
    assert "of shape (), is 1" in mistake(lambda: ours.init({"w": jnp.ones([])}))
    params = {"w": jnp.ones([2, 3])}
    state = ours.init(params)
    assert "found no 0/count, 0/mu/w, 0/nu/w" in mistake(
        lambda: ours.update(params, (), params)
    )
    assert "another structure" in mistake(
        lambda: ours.update(params, list(state), params)
    )
    assert "0/mu/w of the state has shape (1, 3)" in mistake(
        lambda: ours.update(params, ours.init({"w": params["w"][:1]}), params)
    )
    assert "w of updates has shape (2,); expected that" in mistake(
        lambda: ours.update({"w": jnp.ones(2)}, state, params)
    )
    assert "found only v" in mistake(
        lambda: ours.update({"w": params["w"], "v": 1.0}, state, params)
    )


@pytest.mark.parametrize(
    "error",
    [
        TypeError("add requires an argument"),
        ValueError("argument decay is required for group params"),
    ],
)
def test_an_error_of_the_optimiser_itself_stays(error):
    def update(updates, state, params=None):
        raise error

    own = optax.GradientTransformation(lambda params: (), update)
    with pytest.raises(type(error), match=f"^{error}"):
        hk_stack.per_layer(own, {"w": 1}).init({"w": jnp.ones(2)})


def test_mistakes_of_scale_by_layer():
    wrong = mistake(lambda: hk_stack.scale_by_layer(0.5, AXES))
    assert wrong.startswith("hk_stack.scale_by_layer: expected a function")
    scale = hk_stack.scale_by_layer
    at_a = mistake(lambda: scale(max, {"a": -1}))
    assert at_a.startswith("hk_stack.scale_by_layer: layer_axes must be a tree of ints")
    missing = scale(max, {"a": 1}).update
    assert mistake(lambda: missing({"b": jnp.ones(2)}, ())).startswith(
        "hk_stack.scale_by_layer: layer_axes of b"
    )
    text = scale(lambda i, n: "much", {"a": 1}).update
    assert "the factor of layer 0 must be a number, not 'much'" in mistake(
        lambda: text({"a": jnp.ones(2)}, ())
    )
