"""The two programs of the Flax thread as they were written, and with one line more.

    python examples/seed_as_it_is.py
    python examples/seed_as_it_is.py --kernel="term by term" --depths=8,16

In the thread "Scan with split parameters" someone has layers of S4, of which `setup` is
slow and the call cheap, and would like the setup batched while the calls are scanned.
The program was a list of layers first, then `nn.scan` with split parameters. Here are
both, in Flax Linen, and what can be done about them:

- *as they are*;
- *with one line*: `hk_stack.roll(model.apply)` for the list, which finds the layers in
  the traced program and runs them as one loop, and `hk_stack.setup_first(model.apply)`
  for the scan. Modules, parameters and checkpoints stay as they are;
- *in Haiku*, on `hk_stack.layer_stack`, with parameters that `hk_stack.flax_to_haiku`
  moves over.

All of them compute the same function: outputs and gradients are compared. Of the
gradient, three things are measured: seconds of the processor to trace and compile it,
its time to run (the ways take turns), and its memory beside arguments and results.

What is gained: a list of 32 layers builds in half the time, and 16 layers run in 0.6 of
the memory, in a quarter with `remat=True`, at the speed of the list.
What is not: four layers build faster as a list. A stack builds faster still, as
parameters need not be stacked. And memory is paid for in time where setup is dear, for
gradients compute it again: with the kernel as "The Annotated S4" computes it, term by
term, the list stays the fastest. `setup_remat=False` makes the other choice.

One to three minutes on two cores. Writes to `out/seed_as_it_is` (`--out`):

    table.txt    all ways of `--layers` layers
    build.png    the time to build by the number of layers

Needs pip install 'hk_stack[examples,flax]'.
"""

# The classes of the thread say themselves what their methods do.
# ruff: noqa: D102
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import common
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from common import Built, flag
from matplotlib.figure import Figure

import hk_stack
from hk_stack.compare import s4
from hk_stack.compare.s4 import KERNELS

# In single precision some gradients of S4 are small differences of large numbers.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Output):
    """Sizes, and what to measure."""

    layers: int = flag("Number of layers, in the table.", default=16)
    depths: str = flag("Numbers of layers, in the picture.", default="4,8,16,32")
    width: int = flag("Features in each layer.", default=64)
    state_size: int = flag("States of each feature.", default=16)
    length: int = flag("Steps of a sequence.", default=256)
    kernel: str = flag("How setup makes one.", default="convolution", choices=KERNELS)
    batch_size: int = flag("Sequences in a training step.", default=4)
    rounds: int = flag("How often each way is run to measure its time.", default=15)

    def __post_init__(self) -> None:
        """Checks the list of depths."""
        if not all(x.isdecimal() and int(x) for x in self.depths.split(",")):
            raise ValueError("--depths must be integers, at least 1, as in 4,8,16")

    @property
    def all_depths(self) -> list[int]:
        """Those of the picture and that of the table, in order."""
        return sorted({self.layers, *map(int, self.depths.split(","))})


DEFAULT = Config(out="out/seed_as_it_is")


# The two programs of the thread


class SeqInternal(nn.Module):
    """A layer of the thread, `[B, T, D] -> [B, T, D]`; see "The Annotated S4"."""

    config: Config

    def setup(self) -> None:
        width, states = self.config.width, self.config.state_size
        params = {
            name: self.param(name, init, shape, jnp.float32)
            for name, (shape, init) in s4.parameters(width, states).items()
        }
        # The slow part: it depends on the parameters alone.
        self.K = KERNELS[self.config.kernel](s4.dplr(params), self.config.length)
        self.D = params["d"]
        self.norm = nn.LayerNorm(use_fast_variance=False)
        self.out, self.gate = nn.Dense(width), nn.Dense(width)

    def __call__(self, c: jax.Array, ignore: None) -> tuple[jax.Array, None]:
        u = self.norm(c)
        y = nn.gelu(s4.convolve(u, self.K) + self.D[None, None] * u)
        return c + self.out(y) * nn.sigmoid(self.gate(y)), None


class AsList(nn.Module):
    """The first program: a list of layers."""

    config: Config
    n_layers: int

    def setup(self) -> None:
        self.layers = [SeqInternal(self.config) for _ in range(self.n_layers)]

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x, _ = layer(x, None)
        return x


class AsScan(nn.Module):
    """The second program: `nn.scan` with split parameters."""

    config: Config
    n_layers: int

    def setup(self) -> None:
        SeqInternalStack: Any = nn.scan(
            SeqInternal,
            split_rngs={"params": True, "dropout": True},
            in_axes=0,
            out_axes=0,
            variable_axes={"params": 0},
            length=self.n_layers,
        )
        self.layers = SeqInternalStack(self.config)

    def __call__(self, x: jax.Array) -> jax.Array:
        y: jax.Array = self.layers(x, None)[0]
        return y


# The same in Haiku


def in_haiku(config: Config, num_layers: int) -> hk.Transformed:
    """The same function on `layer_stack`, with parameters `[L, ...]`."""

    def parameter(name: str, shape: Sequence[int], init: s4.Initializer) -> jax.Array:
        of_key = lambda shape, dtype: init(hk.next_rng_key(), shape, dtype)  # noqa: E731
        return hk.get_parameter(name, shape, init=of_key)

    def layer(c: jax.Array) -> jax.Array:
        table = s4.parameters(config.width, config.state_size)
        params = {name: parameter(name, *row) for name, row in table.items()}
        kernel = KERNELS[config.kernel](s4.dplr(params), config.length)
        u = hk.LayerNorm(-1, True, True, eps=1e-6, name="norm")(c)
        y = jax.nn.gelu(s4.convolve(u, kernel) + params["d"][None, None] * u)
        out, gate = (hk.Linear(config.width, name=name)(y) for name in ("out", "gate"))
        return c + out * jax.nn.sigmoid(gate)

    stack = hk_stack.layer_stack(num_layers, name="layers")
    return hk.without_apply_rng(hk.transform(lambda x: stack(layer)(x)))


# What can be done


class Way(NamedTuple):
    """The function in one of the ways.

    Attributes:
      apply: `(params, x) -> y`.
      params: Its parameters, in a tree of its own.
      to_haiku: From a gradient by them to one as Haiku has it, for comparisons.
    """

    apply: Callable[..., Any]
    params: Any
    to_haiku: Callable[[Any], Any]


def all_ways(config: Config, num_layers: int) -> dict[str, Way]:
    """All the ways, with the same values of parameters."""
    x, key = inputs(config), jax.random.key(0)
    in_list, in_scan = AsList(config, num_layers), AsScan(config, num_layers)
    stack = in_haiku(config, num_layers)
    like: Any = jax.eval_shape(stack.init, key, x), {}

    def to_haiku(variables: Any, **rules: Any) -> Any:
        return hk_stack.flax_to_haiku(variables, like, **rules)[0]

    of_scan = functools.partial(to_haiku, layer_axis={"layers": 0})
    of_list = functools.partial(to_haiku, rename={"layers_*": "layers/*"})
    scanned = jax.jit(in_scan.init)(key, x)
    stacked = of_scan(scanned)
    listed = jax.eval_shape(in_list.init, key, x)
    listed = hk_stack.haiku_to_flax((stacked, {}), listed, **of_list.keywords)
    rolled = functools.partial(hk_stack.roll, in_list.apply)
    first = hk_stack.setup_first(in_scan.apply)
    return {
        "list": Way(in_list.apply, listed, of_list),
        "list + roll": Way(rolled(), listed, of_list),
        "list + roll(remat=True)": Way(rolled(remat=True), listed, of_list),
        "nn.scan": Way(in_scan.apply, scanned, of_scan),
        "nn.scan + setup_first": Way(first, scanned, of_scan),
        "Haiku, hk_stack.layer_stack": Way(stack.apply, stacked, lambda tree: tree),
    }


def inputs(config: Config) -> jax.Array:
    """Sequences `[B, T, D]`."""
    shape = config.batch_size, config.length, config.width
    return jax.random.normal(jax.random.key(1), shape)


# Measurement


def build(way: Way, x: jax.Array) -> Built:
    """The gradient of the mean square of the outputs, and these, as a program."""

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = way.apply(params, x)
        return jnp.mean(y**2), y

    return common.build(jax.value_and_grad(loss, has_aux=True), way.params, x)


def compared(ways: Mapping[str, Way], built: Mapping[str, Built]) -> dict[str, float]:
    """How far outputs or gradients, whichever more, are from those of the list.

    Raises:
      SystemExit: If that is more than rounding.
    """
    results = {}
    for name, way in ways.items():
        (_, outputs), gradient = built[name].run()
        results[name] = outputs, way.to_haiku(gradient)
    off = {
        name: max(map(common.difference, result, results["list"]))
        for name, result in results.items()
    }
    if wrong := [name for name, value in off.items() if not value < TOLERANCE]:
        raise SystemExit(f"Results differ from those of the list: {', '.join(wrong)}")
    return off


def table(config: Config, built: Mapping[str, Built], off: Mapping[str, float]) -> str:
    """What was measured, a line for each way."""
    seconds = common.run_times([x.run for x in built.values()], config.rounds)
    runs = 1e3 * np.median(seconds, axis=1)
    header = f"gradient of {config.layers} layers"
    lines = [f"{header:28}{'build, s':>10}{'run, ms':>10}{'temp, MB':>10}{'off':>9}"]
    for (name, x), run in zip(built.items(), runs, strict=True):
        numbers = f"{x.seconds:10.1f}{run:10.1f}{x.memory / 1e6:10.1f}{off[name]:9.0e}"
        lines.append(f"{name:28}{numbers}")
    return "\n".join(lines)


def draw(built: Mapping[int, Mapping[str, Built]]) -> Figure:
    """Draws the time to build by the number of layers."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    depths = sorted(built)
    for name in built[depths[0]]:
        axes.plot(depths, [built[d][name].seconds for d in depths], "o-", label=name)
    axes.set(xlabel="layers", ylabel="seconds of the processor", xticks=depths)
    axes.set(title="To trace and compile the gradient", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(config: Config) -> None:
    """Compares and measures all ways; prints, writes and draws what was found."""
    x = inputs(config)
    build(all_ways(config, 1)["list"], x)  # What Python and JAX do once is not counted.
    built: dict[int, dict[str, Built]] = {}
    for depth in config.all_depths:
        ways = all_ways(config, depth)
        bar = common.progress(ways.items(), f"{depth} layers", unit="way")
        built[depth] = {name: build(way, x) for name, way in bar}
        common.note(bar, f"{depth} layers: {len(ways)} ways are built")
    draw(built).savefig(config.folder / "build.png", dpi=120)

    ways = all_ways(config, config.layers)
    off = compared(ways, built[config.layers])
    text = table(config, built[config.layers], off)
    print(hk_stack.roll(ways["list"].apply).report(ways["list"].params, x))
    (config.folder / "table.txt").write_text(text + "\n")
    print(f"\n{text}\n\nWrote table.txt and build.png to {config.out}")
    largest = max(off.values())
    print(f"Outputs and gradients of all ways are equal, up to rounding: {largest:.0e}")


if __name__ == "__main__":
    common.run(main, DEFAULT)
