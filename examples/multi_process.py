"""Trains a stack in several processes, which may be killed at any time.

    python examples/multi_process.py

launches two processes on this machine, with two devices each, that train one model
together: the batch is spread over processes, each layer's parameters over the devices
of a process (FSDP), and so is the optimiser's state, to which each layer is a parameter
of its own. Every few steps they save a checkpoint. If one of them dies, the others are
stopped and all begin again at the last checkpoint; with `--kill_at=25` one kills itself
the first time it gets there. Losses (`losses.jsonl`) are those of a run that nothing
happened to. What processes print goes to `process_0.log`, `process_1.log`.

On a cluster, `--coordinator=auto` lets JAX find the other processes (SLURM, Open MPI,
TPU pods), and `--coordinator=HOST:PORT --rank=K` is for all others; there the scheduler
starts what has died. The number of processes may be another after a restart.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import common
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from common import flag
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hk_stack
from hk_stack import checkpoint

BATCH = 32  # Of all processes together.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Output):
    """What to train, where."""

    processes: int = flag("Number of processes.", default=2)
    devices: int = flag("Devices of each process, on a CPU.", default=2)
    layers: int = flag("Number of layers.", default=8)
    width: int = flag("Features in each layer.", default=32)
    steps: int = flag("Training steps.", default=40)
    every: int = flag("Steps from one checkpoint to the next.", default=10)
    kill_at: int = flag(
        "The last process kills itself here; 0: no.", default=0, least=0
    )
    coordinator: str = flag('"local", "auto" or HOST:PORT; see above.', default="local")
    rank: int = flag("The number of this process, from 0.", default=0, least=0)

    def __post_init__(self) -> None:
        """Checks that the flags go together."""
        if self.width % self.devices:
            raise ValueError("--devices must be a divisor of --width")
        if BATCH % self.processes:
            raise ValueError(f"--processes must be a divisor of {BATCH}, the batch")


DEFAULT = Config(out="out/multi_process")
RESTARTS = 5


# One process


def block(x: jax.Array) -> jax.Array:
    """`[B, D] -> [B, D]`."""
    h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
    h = jax.nn.gelu(hk.Linear(4 * x.shape[-1], name="up")(h))
    return x + hk.Linear(x.shape[-1], name="down")(h)


def make_model(config: Config) -> hk.Transformed:
    """The stack of all layers."""
    stack = hk_stack.layer_stack(config.layers, name="blocks", remat=True)
    return hk.without_apply_rng(hk.transform(lambda x: stack(block)(x)))


RULES = {"blocks/up/w": P(None, "fsdp"), "blocks/down/w": P("fsdp")}


def batch_of(step: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Inputs and targets of a step, on which all processes agree."""
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), [BATCH, width])
    mix = jax.random.normal(jax.random.key(2), [width, width]) / width**0.5
    return x, jnp.tanh(x @ mix)


def work(config: Config) -> None:
    """Trains, as one of several processes, from the last checkpoint on."""
    if config.coordinator == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(config.coordinator, config.processes, config.rank)
    shape = jax.process_count(), jax.local_device_count()
    mesh = jax.make_mesh(shape, ("data", "fsdp"), (AxisType.Auto,) * 2)
    model, x = make_model(config), jnp.zeros([1, config.width])
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    axes = hk_stack.layer_axes(model.apply, shapes, x)
    inner = hk_stack.per_layer(optax.lamb(1e-2), axes)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), inner)

    def begin() -> dict[str, Any]:
        params = model.init(jax.random.key(0), x)
        return {"params": params, "state": optimiser.init(params), "done": jnp.int32(0)}

    def loss(params: hk.Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((model.apply(params, x) - y) ** 2)

    run, over_processes = common.update(loss, optimiser), NamedSharding(mesh, P("data"))
    batch = jax.jit(batch_of, static_argnums=1, out_shardings=over_processes)
    where = hk_stack.shardings(jax.eval_shape(begin), RULES, mesh, layer_axes=axes)
    now = last_saved(config, begin, where.tree)
    for step in range(int(now["done"]), config.steps):
        if step == config.kill_at > 0 and config.rank == config.processes - 1:
            kill_once(config)
        pair, value = run((now["params"], now["state"]), *batch(step, config.width))
        tell(config, step, float(value))
        now = {"params": pair[0], "state": pair[1], "done": jnp.int32(step + 1)}
        if (step + 1) % config.every == 0 or step + 1 == config.steps:
            checkpoint.save(config.folder / f"step_{step + 1}", now)


def last_saved(config: Config, begin: Callable[[], Any], shardings: Any) -> Any:
    """Where training goes on: the last checkpoint, or the beginning."""
    path = checkpoint.latest(config.folder)
    if path is None:
        return jax.jit(begin, out_shardings=shardings)()

    def placed(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return checkpoint.load(path, jax.tree.map(placed, jax.eval_shape(begin), shardings))


def tell(config: Config, step: int, loss: float) -> None:
    """Notes the loss of a step; steps that are done again are noted again."""
    if jax.process_index() == 0:
        with (config.folder / LOSSES).open("a") as file:
            print(json.dumps([step, loss]), file=file)


LOSSES = "losses.jsonl"


def kill_once(config: Config) -> None:
    """Dies as if somebody had pulled the plug, the first time."""
    if not (config.folder / "killed").exists():
        (config.folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)


# All processes, on one machine


def launch(config: Config) -> None:
    """Starts all processes, again and again until they are done."""
    for attempt in range(RESTARTS):
        begun = checkpoint.latest(config.folder)
        print(f"{config.processes} processes begin at {begun or 'the beginning'}")
        codes = wait(start(config))
        if not any(codes):
            break
        print(f"attempt {attempt + 1}: exit codes {codes}; all begin again")
    else:
        raise SystemExit(f"gave up after {RESTARTS} attempts; see {config.out}/*.log")
    lines = (config.folder / LOSSES).read_text().splitlines()
    losses = dict(map(json.loads, lines))
    print(f"losses: {losses[0]:.4f} at first, {losses[config.steps - 1]:.4f} at last")


def start(config: Config) -> list[subprocess.Popen[bytes]]:
    """Starts a process for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    devices = f"--xla_force_host_platform_device_count={config.devices}"
    environment = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}"}
    children = []
    for rank in range(config.processes):
        flags = {**vars(config), "coordinator": address, "rank": rank}
        values = [f"--{name}={value}" for name, value in flags.items()]
        command = [sys.executable, __file__, *values]
        with (config.folder / f"process_{rank}.log").open("ab") as log:
            child = subprocess.Popen(
                command, env=os.environ | environment, stdout=log, stderr=log
            )
        children.append(child)
    return children


def wait(children: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Waits for all, or for the first that fails: the others would wait for it."""
    try:
        while True:
            codes = [child.poll() for child in children]
            if any(codes) or None not in codes:
                return codes
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.wait()


def main(config: Config) -> None:
    """One process, or all."""
    if config.coordinator == "local":
        launch(config)
    else:
        work(config)


if __name__ == "__main__":
    common.run(main, DEFAULT)
