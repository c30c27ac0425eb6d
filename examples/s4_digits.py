"""Trains an S4 classifier on handwritten digits, each read pixel by pixel.

    python examples/s4_digits.py
    python examples/s4_digits.py --layer_stack=haiku
    python examples/s4_digits.py --framework=linen

The data are the 1,797 images of 8x8 pixels inside scikit-learn, so nothing is
downloaded; a fifth of them is held out. Six S4 layers run over the 64 pixels of an
image as a sequence. Each layer turns its parameters into a convolution kernel: setup,
which `hk_stack` computes for all layers before it loops over them. The same
model runs on `hk.layer_stack` and, written in Flax Linen, on `nn.scan`. Kernels of 64
steps are cheap, so all three take about as long here: a minute on two cores.

Writes to `out/s4_digits` (`--out`):

    curves.png    the loss, in training with dropout and held out
    digits.png    held-out digits with their predictions, the mistakes first
    params.npz    the trained parameters, under Haiku's names in either framework

Needs pip install 'hk_stack[examples]'; for Linen, 'hk_stack[examples,flax]'.
"""

import dataclasses
import time
from typing import Any

import common
import example_data
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import s4_model
from common import flag
from example_data import Batch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from s4_model import Model

import hk_stack

NUM_CLASSES = 10
STACKS = {"hk_stack": hk_stack.layer_stack, "haiku": hk.layer_stack}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(s4_model.Config):
    """What to train, and how."""

    epochs: int = flag("Passes over the training images.", default=20)
    framework: str = flag(
        "Which one to use.", default="haiku", choices=["haiku", "linen"]
    )
    layer_stack: str | None = flag(
        "Whose the model in Haiku uses; that of hk_stack if not given.",
        default=None,
        choices=list(STACKS),
    )

    def __post_init__(self) -> None:
        """Checks that the flags go together."""
        if self.framework == "linen" and self.layer_stack:
            raise ValueError(
                "--layer_stack goes with --framework=haiku only: Linen stacks with "
                "nn.scan"
            )


DEFAULT = Config(layers=6, width=32, dropout=0.1, out="out/s4_digits")


def inked(data: Batch) -> Batch:
    """Images as sequences `[N, 64, 2]`.

    With ink alone, the first layer norm would remove all shades: while the encoder's
    bias is zero they only scale its output.
    """
    ink = (data.x / 16).astype(np.float32)
    return data._replace(x=np.stack([ink, 1 - ink], axis=-1))


def haiku_model(config: Config) -> Model:
    """The classifier in Haiku, on the chosen stack."""

    def classify(x: jax.Array, is_training: bool) -> jax.Array:
        stack = STACKS[config.layer_stack or "hk_stack"]
        layers = s4_model.haiku_layers(config, is_training, stack)
        logits = s4_model.haiku_ends(x, layers, config, NUM_CLASSES)
        return jnp.mean(logits, axis=1)

    return s4_model.of_haiku(classify)


def linen_model(config: Config) -> Model:
    """The same classifier in Flax Linen, on `nn.scan`."""
    init, apply = s4_model.of_linen(s4_model.linen_ends(config, NUM_CLASSES))
    return Model(init, lambda *args: jnp.mean(apply(*args), axis=1))


def named_as_in_haiku(config: Config, params: Any, x: np.ndarray) -> dict[str, Any]:
    """Parameters of either framework as `layers/block/gate/w` -> array `[L, ...]`."""
    if config.framework == "linen":
        like = jax.eval_shape(haiku_model(config).init, jax.random.key(0), x)
        params, _ = hk_stack.flax_to_haiku(params, (like, {}))
    return {
        f"{module}/{name}": np.asarray(value)
        for module, name, value in hk.data_structures.traverse(params)
    }


def draw_digits(images: np.ndarray, found: np.ndarray, y: np.ndarray) -> Figure:
    """Draws 32 digits with what was found on them: mistakes first, up to half."""
    wrong, right = np.flatnonzero(found != y), np.flatnonzero(found == y)
    first = wrong[: max(16, 32 - len(right))]
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    figure.suptitle(
        f"32 of {len(y)} held-out digits: first {len(first)} of the "
        f"{len(wrong)} mistakes (✗), then others"
    )
    shown = [*first, *right][:32]
    for axes, i in zip(figure.subplots(4, 8).flat, shown, strict=True):
        draw_digit(axes, images[i].reshape(8, 8), found[i], y[i])
    return figure


def draw_digit(axes: Axes, image: np.ndarray, found: int, true: int) -> None:
    """Draws one image, titled with its prediction."""
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=16)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="0.7")
    title = axes.set_title(f"predicted {found}\ntrue {true}", fontsize=10)
    if found != true:
        title.set(text=f"{title.get_text()}  ✗", color="firebrick", weight="bold")
        axes.spines[:].set(color="firebrick", linewidth=4)


def main(config: Config) -> None:
    """Trains as the flags say, and writes the results."""
    start = time.perf_counter()
    data, images = example_data.digits()
    data, test = inked(data), inked(images)
    model = {"haiku": haiku_model, "linen": linen_model}[config.framework](config)
    params, losses = s4_model.train(model, config, config.epochs, data, test)
    logits = jax.jit(model.apply, static_argnums=3)(params, None, test.x, False)
    seconds = time.perf_counter() - start
    found = np.argmax(logits, -1)
    accuracy = np.mean(found == test.y)

    common.draw_losses(
        losses,
        config.folder / "curves.png",
        title=f"S4 on handwritten digits: {accuracy:.1%} of those held out are right",
        ylabel="cross entropy",
        yscale="log",
    )
    draw_digits(images.x, found, test.y).savefig(config.folder / "digits.png", dpi=120)
    params = named_as_in_haiku(config, params, test.x[:1])
    np.savez(config.folder / "params.npz", **params)
    print(f"Wrote curves.png, digits.png and params.npz to {config.out}")
    print(
        f"Held-out accuracy {accuracy:.1%}, trained in {seconds:.1f} s, "
        "compilation included"
    )


if __name__ == "__main__":
    common.run(main, DEFAULT)
