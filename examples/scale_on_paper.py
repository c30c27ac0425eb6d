"""What a deep transformer takes on many devices, on paper.

    python examples/scale_on_paper.py

prints what each of 1,024 devices holds of 96 layers, by meshes, and the collectives of
a training step. Nothing is computed on devices, and one is enough. The formulas are
those of `train_step` below, an ordinary training step of a stack: tests compile it for
eight devices, and find the same arrays in its loops and the same collectives, to the
byte.

Bytes of a collective are those of its result. On a CPU, XLA writes an all-reduce where
others may scatter what they reduce: gradients of FSDP then take less than is said here.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import common
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from common import flag
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hk_stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The model, and on how many devices it is."""

    layers: int = flag("Number of layers.", default=96)
    width: int = flag("Features in each layer.", default=12288)
    heads: int = flag("Attention heads, a divisor of the width.", default=96)
    length: int = flag("Steps of a sequence.", default=2048)
    batch: int = flag("Sequences in a batch, of all devices.", default=1024)
    devices: int = flag("Number of devices.", default=1024)
    host: int = flag("Devices that a tensor is spread over.", default=8)
    stages: int = flag("Stages of a pipeline, parts of the layers.", default=16)
    microbatches: int = flag("Microbatches of a pipeline.", default=64)

    def __post_init__(self) -> None:
        """Checks that the flags go together."""
        common.check_heads(self.width, self.heads)
        for part, whole in (
            ("devices", "batch"),
            ("devices", "width"),
            ("stages", "layers"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"--{part} must be a divisor of --{whole}")
        if self.devices % (self.host * self.stages):
            raise ValueError("--devices must be a multiple of --host times --stages")
        rows = self.batch * self.host * self.stages // self.devices
        if rows % self.microbatches:
            raise ValueError(
                f"--microbatches must divide the {rows} sequences of a stage"
            )


DEFAULT = Config()


class Mesh(NamedTuple):
    """How many devices there are along each axis of a mesh.

    Attributes:
      data: Each has its part of the batch.
      fsdp: And its part of each matrix, which is gathered for one layer at a time.
      tensor: Each has some heads and features of each matrix.
      layers: Each has its part of the batch, and the parameters of some layers: they
        are gathered before the loop.
      stages: Each has some layers, and runs them on one microbatch after the other.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    layers: int = 1
    stages: int = 1

    def __str__(self) -> str:
        sizes = self._asdict().items()
        return " x ".join(f"{size} {name}" for name, size in sizes if size > 1)


def meshes(config: Config) -> list[Mesh]:
    """What there is to choose from."""
    devices, host, stages = config.devices, config.host, config.stages
    return [
        Mesh(data=devices),
        Mesh(fsdp=devices),
        Mesh(data=devices // host, tensor=host),
        Mesh(fsdp=devices // host, tensor=host),
        Mesh(data=devices // stages, layers=stages),
        Mesh(data=devices // stages // host, tensor=host, stages=stages),
    ]


# The model


BATCH = ("data", "fsdp", "layers")  # The axes that share out a batch.
RULES = {
    "*/qkv": P(None, None, ("tensor", "fsdp")),  # [D, 3, D]
    "*/out": P(("tensor", "fsdp")),  # [D, D]
    "*/up": P(None, ("tensor", "fsdp")),  # [D, 4 D]
    "*/down": P(("tensor", "fsdp")),  # [4 D, D]
}


def matrix(name: str, *shape: int, spec: P, is_normed: bool = False) -> jax.Array:
    """A parameter, gathered over the axis "fsdp" where it is used: in the loop."""
    w = hk.get_parameter(name, shape, init=hk.initializers.VarianceScaling())
    if is_normed:  # Setup, of which each device makes its part, before the loop.
        w = hk_stack.hoist(w / jnp.linalg.norm(w, axis=0, keepdims=True))
    return jax.lax.with_sharding_constraint(w, spec)


def block(x: jax.Array, heads: int) -> jax.Array:
    """`[B, T, D] -> [B, T, D]`: a transformer's, with weight normalisation."""
    *_, length, width = x.shape
    h = hk.LayerNorm(-1, True, False, name="attention_norm")(x)
    w = matrix("qkv", width, 3, width, spec=P(None, None, "tensor"))
    qkv = jnp.einsum("btd,dke->kbte", h, w)
    q, k, v = qkv.reshape(*qkv.shape[:-1], heads, width // heads)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * (width / heads) ** -0.5
    scores = jnp.where(jnp.tri(length, dtype=bool)[None, None], scores, -1e9)
    h = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(x.shape)
    x = x + h @ matrix("out", width, width, spec=P("tensor"))
    x = jax.lax.with_sharding_constraint(x, P(BATCH))
    h = hk.LayerNorm(-1, True, False, name="norm")(x)
    up = matrix("up", width, 4 * width, spec=P(None, "tensor"), is_normed=True)
    down = matrix("down", 4 * width, width, spec=P("tensor"))
    x = x + jax.nn.gelu(h @ up) @ down
    return jax.lax.with_sharding_constraint(x, P(BATCH))


def make_model(config: Config, mesh: Mesh) -> hk.Transformed:
    """The stack of all layers. Gradients keep the carry of each, no more."""
    pipeline = None
    if mesh.stages > 1:
        pipeline = hk_stack.Pipeline("stages", config.microbatches)
    stack = hk_stack.layer_stack(
        config.layers, name="blocks", remat=True, pipeline=pipeline
    )
    return hk.without_apply_rng(
        hk.transform(lambda x: stack(block)(x, heads=config.heads))
    )


def make_mesh(sizes: Mesh) -> jax.sharding.Mesh:
    """That of JAX, of devices that are there."""
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes), Mesh._fields, kinds)


def train_step(config: Config, sizes: Mesh) -> jax.stages.Lowered:
    """A training step on so many devices, to be compiled."""
    mesh = make_mesh(sizes)
    model, optimiser = make_model(config, sizes), optax.adam(1e-3)
    shape = config.batch, config.length, config.width
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, P(BATCH))
        )
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        both = params, jax.eval_shape(optimiser.init, params)
        axes = hk_stack.layer_axes(model.apply, params, x)
        layers = "stages" if sizes.stages > 1 else "layers"
        where = hk_stack.shardings(both, RULES, mesh, layer_axes=axes, layers=layers)
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            *(both, where.tree),
        )

        def loss(params: hk.Params, x: jax.Array) -> jax.Array:
            return jnp.mean(model.apply(params, x) ** 2)

        step = common.update(loss, optimiser)
        return step.lower(placed, x)


# On paper


class Collective(NamedTuple):
    """What devices say to one another in a step.

    Attributes:
      kind: As XLA calls it.
      what: Is passed on.
      times: How often.
      nbytes: Of all times, on each device.
    """

    kind: str
    what: str
    times: int
    nbytes: int


class Held(NamedTuple):
    """Bytes on each device.

    Attributes:
      parameters: Its part of them.
      moments: Of Adam: two for each parameter.
      gradients: Of its parameters.
      activations: What the backward pass reads: the carry of each layer. Of a pipeline,
        those of each tick.
      derived: What setup hands to the loop.
      gathered: Whole parameters that are there at once.
    """

    parameters: int
    moments: int
    gradients: int
    activations: int
    derived: int
    gathered: int


NUMBER = 4  # Bytes of a float32.


def parameters(config: Config) -> tuple[list[int], list[int]]:
    """How many numbers the matrices of a layer have, and its scales."""
    square = config.width**2
    return [3 * square, square, 4 * square, 4 * square], [config.width] * 2


def carry(config: Config, mesh: Mesh) -> int:
    """Bytes of what a device passes from layer to layer, of its whole batch."""
    shares = mesh.data * mesh.fsdp * mesh.layers
    return NUMBER * config.batch * config.length * config.width // shares


def held(config: Config, mesh: Mesh) -> Held:
    """The bytes on each device."""
    matrices, scales = parameters(config)
    spread = mesh.fsdp * mesh.tensor
    layer = NUMBER * (sum(matrices) // spread + sum(scales))
    layers = config.layers // (mesh.layers * mesh.stages)
    kept = config.layers
    if mesh.stages > 1:
        # Of ticks, their gradients, and layers that run again in one.
        kept = 2 * ticks(config, mesh) + layers
    gathered = 0
    if mesh.layers > 1:
        gathered = config.layers * layer
    elif mesh.fsdp > 1:
        gathered = NUMBER * sum(matrices) // mesh.tensor
    return Held(
        parameters=layers * layer,
        moments=2 * layers * layer,
        gradients=layers * layer,
        activations=kept * carry(config, mesh) // passes(config, mesh),
        derived=layers * NUMBER * matrices[2] // spread,
        gathered=gathered,
    )


def collectives(config: Config, mesh: Mesh) -> list[Collective]:
    """Those of a step of training, but for its loss, a number."""
    matrices, scales = parameters(config)
    of_layer = [*(n // mesh.tensor for n in matrices), *scales]
    moved = carry(config, mesh) // passes(config, mesh)
    runs = config.layers // mesh.stages * ticks(config, mesh)
    is_piped = mesh.stages > 1
    found = []

    def add(kind: str, what: str, times: int, sizes: Iterable[int]) -> None:
        sizes = list(sizes)
        found.append(Collective(kind, what, times * len(sizes), times * sum(sizes)))

    # Forward, and backward; in a pipeline the backward pass first runs a stage again,
    # then each of its layers once more.
    if mesh.fsdp > 1:
        sizes = [NUMBER * n for n in of_layer[: len(matrices)]]
        add("all-gather", "matrices of a layer", (2 + is_piped) * runs, sizes)
    if mesh.layers > 1:
        sizes = [NUMBER * config.layers * n // mesh.fsdp for n in of_layer]
        add("all-gather", "parameters of all layers", 2, sizes)
    if mesh.tensor > 1:  # Two forward; of a layer that runs again one; two backward.
        add("all-reduce", "activations of a layer", (5 + 2 * is_piped) * runs, [moved])
    if is_piped:
        times = 2 * ticks(config, mesh)
        add("collective-permute", "activations of a stage", times, [moved])
        add("all-reduce", "activations of the last stage", 1, [carry(config, mesh)])
    if mesh.data * mesh.fsdp * mesh.layers > 1:
        add("all-reduce", "gradients of a layer", runs, [NUMBER * n for n in of_layer])
    return found


def passes(config: Config, mesh: Mesh) -> int:
    """How often layers run for a batch: in a pipeline, for each microbatch."""
    return config.microbatches if mesh.stages > 1 else 1


def ticks(config: Config, mesh: Mesh) -> int:
    """How often a stage runs, until the last microbatch has come through all."""
    return passes(config, mesh) + mesh.stages - 1


# The tables


def si(number: int) -> str:
    """With three digits; "-" for nothing."""
    if not number:
        return "-"
    power = int(math.log10(number) / 3)
    return f"{number / 1000**power:#.3g}".rstrip(".") + " kMGTPE"[power].strip()


def table(rows: list[list[str]], texts: int) -> str:
    """Aligned: the first row are titles, the first columns are text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if i < texts else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def main(config: Config) -> None:
    """Prints what each mesh takes."""
    count = config.layers * sum(map(sum, parameters(config)))
    print(
        f"{config.layers} layers of width {config.width} on {config.devices} devices: "
        f"{si(count)} parameters\n\nbytes on each device\n"
    )
    of_meshes = {str(mesh): mesh for mesh in meshes(config)}
    sizes = {name: held(config, mesh) for name, mesh in of_meshes.items()}
    rows = [[name, *map(si, found), si(sum(found))] for name, found in sizes.items()]
    print(table([["", *Held._fields, "all"], *rows], texts=1))
    print("\ncollectives of a training step, on each device\n")
    rows = [["", "collective", "of", "times", "bytes"]]
    for name, mesh in of_meshes.items():
        for kind, what, times, nbytes in collectives(config, mesh):
            rows.append([name, kind, what, str(times), si(nbytes)])
    print(table(rows, texts=3))


if __name__ == "__main__":
    common.run(main, DEFAULT)
