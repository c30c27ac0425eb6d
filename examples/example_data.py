"""What the examples read, none of it downloaded: images of digits, Python's manual."""

import functools
from collections.abc import Iterable
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
from common import Config
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NUM_TRAIN, NUM_TEST = 1437, 360  # images of digits
NUM_CHARACTERS = 128  # ASCII; others are read as question marks
NUM_TEST_SEQUENCES = 128


class Batch(NamedTuple):
    """Inputs, and what a model should make of them."""

    x: Any
    y: Any


def digits() -> tuple[Batch, Batch]:
    """Images `[N, 64]` of 17 shades inside scikit-learn, and the digits `[N]` on them.

    A fifth is held out, the same every time.
    """
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        images.astype(np.int32),
        labels,
        test_size=NUM_TEST,
        stratify=labels,
        random_state=0,
    )
    return Batch(x, y), Batch(x_test, y_test)


def shuffled(data: Batch, config: Config, step: int) -> Batch:
    """The batch of a step: epoch by epoch, all of the data in random order."""
    epoch, place = divmod(step, len(data.y) // config.batch_size)
    order = np.random.default_rng([config.seed, epoch]).permutation(len(data.y))
    chosen = order[config.batch_size * place :][: config.batch_size]
    return Batch(data.x[chosen], data.y[chosen])


@functools.cache
def text() -> tuple[np.ndarray, np.ndarray]:
    """Python's own manual as characters `[N]`, to train on and held out."""
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    # Topics share paragraphs: without this, the held-out ones would be in training too.
    paragraphs = list(dict.fromkeys(paragraphs))
    held_out = paragraphs[::10]
    del paragraphs[::10]
    return characters(paragraphs), characters(held_out)


def characters(paragraphs: Iterable[str]) -> np.ndarray:
    """Integers below `NUM_CHARACTERS`."""
    ascii_text = "\n\n".join(paragraphs).encode("ascii", "replace")
    return np.frombuffer(ascii_text, np.uint8).astype(np.int32)


def sequences(data: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    """Sequences `[B, length]` of the data, and the characters that follow each."""
    chosen = data[starts[:, None] + np.arange(length + 1)]
    return Batch(chosen[:, :-1], chosen[:, 1:])


def text_batch(length: int, config: Config, step: int) -> Batch:
    """The batch of a step: sequences from anywhere in the text."""
    data, _ = text()
    rng = np.random.default_rng([config.seed, step])
    starts = rng.integers(len(data) - length, size=config.batch_size)
    return sequences(data, starts, length)


def test_text(length: int) -> Batch:
    """Sequences from all over the held-out text."""
    _, data = text()
    starts = np.linspace(0, len(data) - length - 1, NUM_TEST_SEQUENCES).astype(int)
    return sequences(data, starts, length)
