"""Trains a deep transformer on text, in half precision, and survives being killed.

    python examples/transformer_lm.py
    python examples/transformer_lm.py --remat=sqrt --layers=48 --out=out/deeper
    python examples/transformer_lm.py --check_finite --learning_rate=1e30 --out=out/bad

A language model of characters, 24 pre-norm blocks on `hk_stack.layer_stack`, reads the
manual that comes with Python (`pydoc_data.topics`), of which a tenth is held out:

- Parameters are float32. Layers compute in bfloat16, and pass it on to the next
  (`jmp` policies, `carry_dtype`); norms, logits and loss are float32.
- Gradients compute layers again instead of keeping all that they computed (`--remat`).
- Later layers drop more (`hk_stack.layer_index`), and weight decay leaves out biases
  and norms, which in a stack look like matrices.
- `--check_finite` says in which layer the first infinity or NaN came up.

Stop it or kill it at any time: the same command goes on from the last checkpoint, and
every loss is what it would have been. All that a step draws at random depends on its
number, and the losses so far are in the checkpoint. A checkpoint of other `--layers`,
`--width`, `--heads` or `--length` is refused; whatever else is changed, `--loop` or
`--remat` for instance, holds from there on.

Two to three minutes on two cores. Writes to `out/transformer_lm` (`--out`):

    checkpoint.safetensors    parameters, optimiser, losses, every --save_every steps
    curves.png                the loss during training, in training and held out

Needs pip install 'hk_stack[checkpoint,examples]'.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import common
import example_data
import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
from common import Losses, flag
from example_data import NUM_CHARACTERS, Batch
from jax.experimental import checkify

import hk_stack
from hk_stack import checkpoint

REMAT: Mapping[str, dict[str, Any]] = {
    "none": {},
    "all": {"remat": True},
    "dots": {"remat": jax.checkpoint_policies.dots_with_no_batch_dims_saveable},
    "sqrt": {"remat": True, "remat_every": "sqrt"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.TextConfig):
    """What to train, and how."""

    steps: int = flag("Training steps.", default=500)
    weight_decay: float = flag("Of AdamW, for weights of layers.", default=0.1)
    save_every: int = flag("Steps from one checkpoint to the next.", default=50)
    remat: str = flag(
        "What gradients compute again instead of keeping it: nothing, each block, each "
        "block but for its products with weights, or groups of blocks.",
        default="all",
        choices=REMAT,
    )
    loop: Literal["scan", "unrolled", "python"] = flag(
        "What runs the blocks; see layer_stack.",
        default="scan",
        choices=("scan", "unrolled", "python"),
    )
    check_finite: bool = flag(
        "Whether to look for values that are not finite in each block.", default=False
    )

    @property
    def sizes(self) -> dict[str, int]:
        """What a checkpoint has to agree with."""
        names = "layers", "width", "heads", "length"
        return {name: getattr(self, name) for name in names}


DEFAULT = Config(layers=24, batch_size=16, learning_rate=5e-3, out="out/transformer_lm")


# Model


class Head(hk.Linear):
    """A linear layer, in a class of its own for the sake of its precision."""


HALF = jmp.get_policy("params=float32,compute=bfloat16,output=bfloat16")
PRECISIONS = {
    hk.Embed: HALF,
    hk.Linear: HALF,
    hk.LayerNorm: jmp.get_policy("params=float32,compute=float32,output=bfloat16"),
    Head: jmp.get_policy("params=float32,compute=float32,output=float32"),
}


@contextlib.contextmanager
def mixed_precision() -> Iterator[None]:
    """Modules that are used in the block cast as `PRECISIONS` says."""
    with contextlib.ExitStack() as stack:
        for kind, policy in PRECISIONS.items():
            stack.enter_context(hk.mixed_precision.push_policy(kind, policy))
        yield


def language_model(config: Config) -> hk.Transformed:
    """Characters `[B, T]` -> logits `[B, T, NUM_CHARACTERS]` of those after them."""

    def model(tokens: jax.Array, is_training: bool) -> jax.Array:
        with mixed_precision():
            embed = hk.Embed(NUM_CHARACTERS, config.width, name="embed")
            positions = hk.Embed(config.length, config.width, name="positions")
            x = embed(tokens) + positions(jnp.arange(tokens.shape[1]))[None]
            x = layers(config, is_training)(x, is_training=is_training)
            return Head(NUM_CHARACTERS, name="head")(norm("norm")(x))

    return hk.transform(model)


def layers(config: Config, is_training: bool) -> Callable[..., jax.Array]:
    """The stack of blocks."""
    stack = hk_stack.layer_stack(
        config.layers,
        name="layers",
        loop=config.loop,
        carry_dtype=jnp.bfloat16,
        # Checks need `checkify` around the program; only the training step has it.
        check_finite=config.check_finite and is_training,
        **REMAT[config.remat],
    )
    return stack(functools.partial(block, config))


def block(config: Config, x: jax.Array, is_training: bool) -> jax.Array:
    """Pre-norm causal self-attention, then a pre-norm MLP of four times the width."""
    # The last layer drops the most: what the first ones lose, all others would miss.
    rate = config.dropout * (hk_stack.layer_index() + 1) / config.layers

    def dropout(x: jax.Array) -> jax.Array:
        return hk.dropout(hk.next_rng_key(), rate, x) if is_training else x

    x = x + dropout(attention(config, norm("attention_norm")(x)))
    h = hk.Linear(4 * config.width, name="mlp_in")(norm("mlp_norm")(x))
    return x + dropout(residual(config, "mlp_out")(jax.nn.gelu(h)))


def attention(config: Config, x: jax.Array) -> jax.Array:
    """Multi-head causal self-attention; JAX computes its softmax in float32."""
    per_head = (*x.shape[:2], 3 * config.heads, config.width // config.heads)
    h = hk.Linear(3 * config.width, name="attention_in")(x).reshape(per_head)
    query, key, value = jnp.split(h, 3, axis=2)
    h = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return residual(config, "attention_out")(h.reshape(x.shape))


def residual(config: Config, name: str) -> hk.Linear:
    """A linear layer; what all of them add up to has the variance of one."""
    w_init = hk.initializers.VarianceScaling(1 / (2 * config.layers))
    return hk.Linear(config.width, w_init=w_init, name=name)


def norm(name: str) -> hk.LayerNorm:
    """A layer norm over features."""
    return hk.LayerNorm(-1, create_scale=True, create_offset=True, name=name)


# Training


def adamw(config: Config) -> optax.GradientTransformation:
    """AdamW; its rate rises for a tenth of the time, then falls to zero."""
    rate = common.schedule(config, config.steps)
    decay = {"weight_decay": config.weight_decay, "mask": is_decayed}
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, **decay)
    )


def is_decayed(params: hk.Params) -> Any:
    """Weights of linear layers decay; biases, norms and embeddings do not.

    The number of axes would not tell: a bias of a stack is `[L, D]`.
    """
    return hk.data_structures.map(lambda module, name, value: name == "w", params)


def start(config: Config) -> tuple[hk.Params, optax.OptState]:
    """What training starts from."""
    tokens = jnp.zeros([1, config.length], jnp.int32)
    key = jax.random.key(config.seed)
    params = language_model(config).init(key, tokens, is_training=False)
    return params, adamw(config).init(params)


def loss(
    config: Config, params: hk.Params, key: Any, batch: Batch, is_training: bool
) -> jax.Array:
    """Mean cross entropy of all characters, in bits."""
    logits = language_model(config).apply(params, key, batch.x, is_training)
    return common.cross_entropy(logits, batch.y) / math.log(2)


def step_of(config: Config) -> Callable[[Any, int], tuple[Any, jax.Array]]:
    """`((params, optimiser), number) -> ((params, optimiser), loss)`."""
    of_batch = functools.partial(loss, config, is_training=True)
    update = common.update(of_batch, adamw(config))
    if config.check_finite:
        update = jax.jit(checkify.checkify(update))

    def step(training: Any, number: int) -> Any:
        # All that is random is of the step's number, so it is the same after a restart.
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        batch = example_data.text_batch(config.length, config, number)
        result: Any = update(training, key, batch)
        if config.check_finite:
            error, result = result
            if message := error.get():
                line, *_ = message.splitlines()
                raise SystemExit(f"Stopped in step {number + 1}: {line}")
        if not math.isfinite(result[1]):
            raise SystemExit(
                f"Stopped in step {number + 1}: the loss is {result[1]}. The same "
                "command with --check_finite says in which layer that begins."
            )
        return result

    return step


# Checkpoints


def save(path: pathlib.Path, config: Config, training: Any, losses: Losses) -> None:
    """Replaces the checkpoint in one step: it is never half there."""
    if not math.isfinite(losses.held_out[-1][1]):
        return  # The next step will say so.
    tree = {
        "training": training,
        "losses": np.asarray(losses.training),
        "held_out": np.asarray(losses.held_out),
        "sizes": config.sizes,
    }
    checkpoint.save(path, tree, layers=hk_stack.NumberedLayers("layers_{}", "layers"))


def resume(config: Config, path: pathlib.Path) -> tuple[Any, Losses]:
    """The training in a checkpoint and its losses, if it exists; else a new start."""
    if not path.exists():
        return jax.jit(functools.partial(start, config))(), Losses([], [])
    try:
        found = checkpoint.load(path)
        sizes = {name: found["sizes"].get(name) for name in config.sizes}
        check_sizes(path, sizes, config.sizes)
        like = {**found, "training": jax.eval_shape(lambda: start(config))}
        found = checkpoint.load(path, like=like)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    held_out = [(int(done), float(x)) for done, x in found["held_out"]]
    losses = Losses(found["losses"].tolist(), held_out)
    print(f"Goes on after step {len(losses.training)}, from {path}")
    return found["training"], losses


def check_sizes(
    path: pathlib.Path, found: Mapping[str, Any], expected: Mapping[str, int]
) -> None:
    """Raises ValueError if a checkpoint is of another model."""
    if found != expected:
        raise ValueError(
            f"{path} is of a model with {as_flags(found)}; these flags ask for "
            f"{as_flags(expected)}. Give the sizes of the checkpoint, or another --out."
        )


def as_flags(sizes: Mapping[str, Any]) -> str:
    """Sizes as one would write them on the command line."""
    return " ".join(f"--{name}={size}" for name, size in sizes.items())


def bits_of_letters_alone() -> float:
    """The held-out loss of a model that knows how frequent characters are."""
    train_on, held_out = example_data.text()
    counts = 1 + np.bincount(train_on, minlength=NUM_CHARACTERS)
    return float(-np.mean(np.log2(counts / np.sum(counts))[held_out]))


def main(config: Config) -> None:
    """Trains as the flags say, or goes on with that, and writes the results."""
    begin = time.perf_counter()
    path = config.folder / "checkpoint.safetensors"
    training, losses = resume(config, path)
    test = example_data.test_text(config.length)
    evaluate = jax.jit(
        lambda training: loss(config, training[0], None, test, is_training=False)
    )
    (params, _), losses = common.train(
        step_of(config),
        training,
        range(len(losses.training), config.steps),
        held_out=evaluate,
        every=config.save_every,
        losses=losses,
        save=functools.partial(save, path, config),
    )
    common.draw_losses(
        losses,
        config.folder / "curves.png",
        title=f"A {config.layers}-layer transformer on Python's manual",
        ylabel="bits per character",
    )
    print(f"Wrote checkpoint.safetensors and curves.png to {config.out}")
    print(
        f"Held-out loss {evaluate((params, None)):.3f} bits per character, "
        f"{bits_of_letters_alone():.3f} from their frequencies alone; took "
        f"{time.perf_counter() - begin:.0f} s"
    )


if __name__ == "__main__":
    common.run(main, DEFAULT)
