"""Mistakes over the whole library: what a user sees, and that it ends with the mend.

Each is made as a user would, and has to say what was found, where, and what to write
instead; in a traceback of the user's own lines, with all files as they were.
"""

import contextlib
import functools
import io
import pathlib
import re
import traceback

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from absl.testing import flagsaver
from jax.sharding import PartitionSpec as P

import hk_stack
from hk_stack import NumberedLayers, checkpoint, port
from hk_stack.compare import __main__ as compare_command
from hk_stack.port import __main__ as port_command

nn = pytest.importorskip("flax.linen")

KEY, X = jax.random.key(0), jnp.ones([2, 8])


def block(x):
    return jnp.tanh(hk.Linear(8)(x))


def stacked(f=block, num_layers=3, name="layers", **options):
    def model(x, **kwargs):
        return hk_stack.layer_stack(num_layers, name=name, **options)(f)(x, **kwargs)

    return hk.transform(model)


class Flax(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = jnp.tanh(nn.Dense(8, name=f"layers_{i}")(x))
        return x


def loop(params, x):
    for w in params:
        x = x + jnp.tanh(x @ w)
    return x


def branching(x):
    return x if x.sum() > 0 else -x


def of_layers(number):
    w, b = jnp.ones([number, 8, 8]), jnp.ones([number, 8])
    return {"layers/linear": {"w": w, "b": b}}


MODEL, PARAMS = stacked(), of_layers(3)
AXES = {"layers/linear": {"b": 1, "w": 1}}
DENSE = {"kernel": jnp.ones([8, 8]), "bias": jnp.ones([8])}
VARIABLES = {"params": {f"layers_{i}": DENSE for i in range(3)}}
LIKE, DEEPER = (({"layers": of_layers(n)["layers/linear"]}, {}) for n in (3, 5))
W = [jnp.eye(8)] * 4


@functools.cache
def split():
    return hk_stack.partition(MODEL.apply, PARAMS, None, X)


def decayed(fn):
    return hk_stack.scale_by_layer(fn, AXES).update(PARAMS, {})


def shardings(rule, params=PARAMS, **options):
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    return hk_stack.shardings(params, {"layers/*/w": rule}, mesh, **options)


def run(main, *arguments):
    """A command in this process, which ends as it would, with what it said."""
    said = io.StringIO()
    with flagsaver.flagsaver(), contextlib.redirect_stderr(said):
        try:
            code = main(flags.FLAGS(["command", *arguments]))
        except SystemExit as stop:
            code = stop.code
    if code:
        raise SystemExit(said.getvalue())


look = functools.partial(run, port_command.main, "a.npz")
compare = functools.partial(run, compare_command._main)
roll, collect, axes = hk_stack.roll, hk_stack.collect, {"layer_axes": AXES}

# The mistake, its type, what it says, and what it ends with: what to write instead.
# fmt: off
MISTAKES = {
    # A stack
    "option of another library": (
        lambda: hk_stack.layer_stack(3, checkpoint=True), TypeError,
        ["unexpected keyword argument 'checkpoint'"], "Write layer_stack(num_layers, "),
    "name that is none in Haiku": (
        lambda: stacked(name="3-layers").init(KEY, X), ValueError,
        ["layer_stack '3-layers' of layer function 'block'"], "name='_3_layers'"),
    "number for the index": (
        lambda: hk_stack.layer_index(0), TypeError,
        ["takes 0 positional arguments but 1 was given"], "Write layer_index()"),
    "transformation as a policy": (
        lambda: hk_stack.layer_stack(3, remat=jax.checkpoint), TypeError,
        ["remat", "jax.checkpoint and hk.remat are none"], "Write remat=True"),
    "pipeline the other way round": (
        lambda: hk_stack.Pipeline(8, "stage"), TypeError,
        ["axis must be the name", "not 8"], 'Pipeline(axis="stage", microbatches=8)'),
    "text as activations": (
        lambda: MODEL.init(KEY, "x"), TypeError,
        ["layer_stack 'layers' of layer function 'block'", "`x` is a str ('x')"],
        "stack(f)(x), of x=jnp.asarray(...)"),
    "layer of another type": (
        lambda: stacked(lambda x: block(x).astype(jnp.bfloat16)).init(KEY, X),
        TypeError, ["layer_stack 'layers'", "<lambda>", "`x`",
                    "float32[2, 8] to bfloat16[2, 8]", ".astype"],
        "carry_dtype=jnp.float32"),
    "comma after the result": (
        lambda: stacked(lambda x: (block(x),)).init(KEY, X), TypeError,
        ["layer_stack 'layers'", "must return what it takes (x)"],
        "Return x itself, not a tuple of one"),
    "values for layers by keyword": (
        lambda: stacked(lambda x, scale: x * scale).init(
            KEY, X, scale=jnp.ones([3, 1])),
        TypeError, ["layer_stack 'layers'", "`scale` is given by keyword"],
        "layer_stack(3, with_per_layer_inputs=True)(f)(x, scale)"),
    "condition on activations": (
        lambda: stacked(branching).init(KEY, X), jax.errors.TracerBoolConversionError,
        ["the function branching at", "test_mistakes.py", "initialising all 3 layers"],
        "write jnp.where(condition, a, b) or jax.lax.cond"),
    "input of another width": (
        lambda: MODEL.apply(PARAMS, None, X[:, :4]), ValueError,
        ["layer_stack 'layers' of layer function 'block'", "linear/w", "(8, 8)",
         "(4, 8)"], "params = model.init(rng, x)"),
    "no parameters": (
        lambda: MODEL.apply(None, None, X), ValueError,
        ["layer_stack 'layers'", "lack linear/b", "They hold: nothing"],
        "model.apply(model.init(rng, x), rng, x)"),
    "parameters of another depth": (
        lambda: MODEL.apply(of_layers(5), None, X), ValueError,
        ["layer_stack 'layers' of layer function 'block'", "linear/b", "(5, 8)",
         "num_layers=3", "of 5 layers, change num_layers"],
        "hk_stack.stack_params(params, naming_map)"),

    # Whole functions
    "flag for the function": (
        lambda: hk_stack.partition(MODEL.apply, PARAMS, None, X, is_training=True),
        TypeError, ["unexpected keyword argument 'is_training'"],
        "functools.partial(fn, is_training=True)"),
    "key left out of a call": (
        lambda: split().call(split().setup(PARAMS), X), TypeError,
        ["partition of 'apply_fn', call", "derived, rng, x", "1 arguments"],
        "split.call(derived, rng, x), with None for what was None in the example"),
    "text for an array": (
        lambda: split().call(split().setup(PARAMS), None, "x"), TypeError,
        ["partition of 'apply_fn', call: argument `x` is a str ('x')"],
        "functools.partial(fn, is_training=True)"),
    "check the other way round": (
        lambda: split().check(split().setup(PARAMS), PARAMS), TypeError,
        ["check: `derived`", "lacks kept/layers/linear/b"],
        "split.check(params, split.setup(params))"),
    "check inside of jit": (
        lambda: jax.jit(lambda p: split().check(p, split().setup(p)))(PARAMS),
        TypeError, ["partition of 'apply_fn', check", "no values"], "Call it outside"),
    "module of Flax for a function": (
        lambda: roll(Flax()), TypeError, ["not Flax"], "Give its apply"),
    "roll with options as a decorator": (
        lambda: roll(strict=True)(loop), TypeError,
        ["missing 1 required positional argument: 'fn'"],
        "@functools.partial(roll, ...)"),
    "roll where there is no loop": (
        lambda: roll(loop, strict=True)(W[:2], X), ValueError,
        ["roll of 'loop': no loop found", "fewer than min_layers=3"],
        "without strict=True, the function runs as it is written"),
    "types instead of arrays": (
        lambda: roll(loop)(jax.eval_shape(lambda: W), X), TypeError,
        ["roll of 'loop'", "`params` (at 0) is a jax.ShapeDtypeStruct"],
        "jax.eval_shape(fn, params, ...)"),
    "collect in one call": (
        lambda: collect(MODEL.apply, PARAMS, None, X), TypeError,
        ["but 4 were given"], "collect(fn)(params, x)"),
    "tap the other way round": (
        lambda: hk_stack.tap("hidden", X), TypeError,
        ["hk_stack.tap: the name must be a str, not an array"],
        'hk_stack.tap(value, "hidden")'),
    "other shape at a tap": (
        lambda: collect(
            stacked(lambda x: hk_stack.tap(x, "hidden")).apply,
            add={"layers/hidden": jnp.ones([3, 8])})({}, None, X),
        ValueError, ["layers/hidden has shape (8,) for each layer", "(2, 8)"],
        "the shape that collect(fn)(...) returns for this path"),
    "summary without arguments": (
        lambda: hk_stack.summary(MODEL.apply), TypeError, ["missing a required"],
        "hk_stack.summary(model.apply, params, rng, x)"),
    "layer_axes without arguments": (
        lambda: hk_stack.layer_axes(MODEL.apply, PARAMS), TypeError,
        ["missing a required"], "hk_stack.layer_axes(model.apply, params, rng, x)"),

    # Trees
    "number as in C": (
        lambda: NumberedLayers("block_%02d"), ValueError,
        ["'block_%02d' has a '%'"], "written '{}': 'block_{}'"),
    "names as Haiku counts": (
        lambda: hk_stack.stack_params(
            {name: {"w": X} for name in ("mlp", "mlp_1")}, NumberedLayers("mlp_{}")),
        ValueError, ["the name mlp is taken"], "write NumberedLayers('mlp')"),
    "tree after its map": (
        lambda: hk_stack.stack_params(NumberedLayers("linear"), PARAMS), TypeError,
        ["naming_map must be a naming map, not a dict"],
        "hk_stack.NumberedLayers(...)"),
    "tuple for a spec": (
        lambda: shardings((None, "data"), **axes), TypeError,
        ["rule 'layers/*/w'", "(None, 'data')"], "PartitionSpec(None, 'data')"),
    "spec with the layers' axis": (
        lambda: shardings(P(None, "data", None), **axes), ValueError,
        ["'layers/*/w' has 3 axes", "layers/linear/w has 3, of which 1 of layers"],
        "leave those of layers out: P('data', None)"),
    "layer_axes left out": (
        lambda: shardings(P("data")), ValueError,
        ["axis 0 of layers/linear/w, of shape (3, 8, 8)", "rule 'layers/*/w'"],
        "layer_axes=hk_stack.layer_axes(model.apply, params, *args)"),
    "layer_axes of others": (
        lambda: shardings(P("data"), layer_axes={"other": 1}), ValueError,
        ["it has other, the tree has layers/linear/b"], "axes['params'] or axes[0]"),
    "one axis for layers and rule": (
        lambda: shardings(P("data"), of_layers(4), layers="data", **axes), ValueError,
        ["layers/linear/w would be sharded twice", "P('data', 'data')"],
        "Leave `layers` out, or name another axis in the rule"),
    "decay by the layer alone": (
        lambda: decayed(lambda i: 0.9**i), TypeError, ["'<lambda>' takes (i)"],
        "scale_by_layer(lambda i, L: 0.9 ** (L - 1 - i), layer_axes)"),
    "decay that returns nothing": (
        lambda: decayed(lambda i, L: None), TypeError,
        ["factor of layer 0 must be a number, not None"],
        "scale_by_layer(lambda i, L: 0.9 ** (L - 1 - i), layer_axes)"),
    "update without parameters": (
        lambda: hk_stack.per_layer(optax.add_decayed_weights(0.1), AXES).update(
            PARAMS, optax.EmptyState()),
        ValueError, ["hk_stack.per_layer: the optimiser needs parameters"],
        "optimizer.update(gradients, state, params)"),

    # Files
    "tree before its path": (
        lambda: checkpoint.save(PARAMS, "new.safetensors"), TypeError,
        ["the path must be a str", "not a dict"], "checkpoint.save(path, tree)"),
    "format of others": (
        lambda: checkpoint.save("new.npz", PARAMS), ValueError,
        ["new.npz: this would be a folder of orbax"],
        "Write new.safetensors for a file, or new for a folder"),
    "folder that is there": (
        lambda: checkpoint.save("step_1", PARAMS), ValueError,
        ["step_1: there is such a folder"], "(step_100, step_200), or remove it"),
    "file for a folder": (
        lambda: checkpoint.save("whole.safetensors/new.safetensors", PARAMS), OSError,
        ["whole.safetensors", "nothing was written"],
        "a path in a folder that can be written to"),
    "nothing saved yet": (
        lambda: checkpoint.load(checkpoint.latest("none")), TypeError,
        ["the path is None", "checkpoint.latest(folder)"], "Start from new parameters"),
    "no such file": (
        lambda: checkpoint.load("step_2.safetensors"), FileNotFoundError,
        ["step_2.safetensors: there is no such file"],
        "there is a.npz, half.safetensors, results, step_1, whole.safetensors"),
    "half a file": (
        lambda: checkpoint.load("half.safetensors"), ValueError,
        ["half.safetensors is truncated"], "Load another copy of it"),

    # Porting
    "model for its parameters": (
        lambda: hk_stack.flax_to_haiku(VARIABLES, MODEL), TypeError,
        ["must be a pair (params, state), not Transformed"], "Write (params, {})"),
    "trees the other way round": (
        lambda: hk_stack.flax_to_haiku(LIKE, VARIABLES), TypeError,
        ["not dict", "Flax's side is a pair"], "swap the two"),
    "Haiku of another depth": (
        lambda: hk_stack.flax_to_haiku(VARIABLES, DEEPER), ValueError,
        ["layers_0/kernel", "layers/w", "3 layers there, 5 here"],
        "build both with as many"),
    "other dtypes": (
        lambda: hk_stack.haiku_to_flax(
            jax.tree.map(lambda x: x.astype("bfloat16"), LIKE), VARIABLES),
        ValueError, ["layers_0/kernel", "bfloat16"],
        "haiku_to_flax(params_and_state, like, cast=True)"),
    "rule for nothing": (
        lambda: hk_stack.flax_to_haiku(VARIABLES, LIKE, rename={"zz": "head"}),
        ValueError, ["rename: 'zz' is the beginning of no leaf's path", "Leave it out"],
        "say what paths begin with; plan(...) shows them"),
    "axis of no layers": (
        lambda: hk_stack.flax_to_haiku(VARIABLES, LIKE, layer_axis=1), ValueError,
        ["no layers are on axis 1"], "leave layer_axis out"),
    "transform without state": (
        lambda: port.verify(Flax().apply, MODEL.apply, VARIABLES, LIKE, X), ValueError,
        ["haiku_apply(params, state, key, *inputs)"],
        "give the apply of hk.transform_with_state(model)"),

    # Commands
    "rules without --like": (
        lambda: look("--rename=a=b"), SystemExit, ["--rename says what goes where"],
        "Give --like=..., too"),
    "--like and --skeleton": (
        lambda: look("--skeleton", "--like=a.npz"), SystemExit, ["--skeleton"],
        "Leave one out"),
    "--like of a function with arguments": (
        lambda: look("--like=os.path:join"), SystemExit,
        ["--like=os.path:join: missing a required argument"],
        "module:function, which takes nothing and returns (params, state)"),
    "folder of --out for a result": (
        lambda: compare("--against=results"), SystemExit, ["results is a folder"],
        "give results/results.json"),
}
# fmt: on


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory):
    """A folder of checkpoints, in which all mistakes are made; what its files hold."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with contextlib.chdir(folder):
        checkpoint.save("whole.safetensors", PARAMS)
        whole = pathlib.Path("whole.safetensors").read_bytes()
        pathlib.Path("half.safetensors").write_bytes(whole[: len(whole) // 2])
        np.savez("a.npz", **{"params/Dense_0/kernel": np.ones([2, 3], np.float32)})
        for name in ("step_1", "results"):
            pathlib.Path(name).mkdir()
        yield functools.partial(held, folder)


def held(folder):
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


OURS = str(pathlib.Path(hk_stack.__file__).parent)
# What frameworks add to what is said: that frames are left out; in which stack it was.
NOTES = "-{20}\nFor simplicity, .*\n|This was in .*\n"


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, files):
    mistake, kind, texts, instead = MISTAKES[name]
    before = files()
    with pytest.raises(kind) as found:
        mistake()
    error = found.value
    said = "".join(traceback.format_exception_only(error))
    for text in texts:
        assert text in said
    _, is_there, rest = re.sub(NOTES, "", said).rpartition(instead)
    assert is_there and not re.search(r"[.?!] [A-Z]|\n", rest.strip())
    assert f'File "{OURS}' not in "".join(traceback.format_exception(error))
    lines = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    of_user = [i for i, file in enumerate(lines) if file == __file__]
    between = {*lines[of_user[0] : of_user[-1]]} - {__file__}
    assert between <= {hk.transform.__code__.co_filename, jax.jit.__code__.co_filename}
    assert files() == before
