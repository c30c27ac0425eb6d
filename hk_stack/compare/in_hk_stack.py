"""The models of `in_haiku` in `hk_stack.layer_stack`, with all that it offers.

"inline" runs setup in the loop, "auto" before it. "prepared" has derived values for an
argument, that `hk_stack.partition` made before: what is measured is the rest.
"accumulate" is `hk_stack.accumulate`. Others are named after options, "+ remat" after
`remat=True`.
"""

import itertools
from typing import Any

import jax

import hk_stack
from hk_stack.compare import in_haiku, models

WAYS = ("inline", "auto", "prepared", "+ remat")

_SETUP: dict[str, Any] = {
    f"{size} at a time{', remat' * again}": {
        "setup_batch_size": size,
        "setup_remat": again,
    }
    for size, again in itertools.product((1, 2, 4, 8, 16), (False, True))
}
_REMAT: dict[str, Any] = {
    "+ remat": {"remat": True},
    "+ remat, sqrt": {"remat": True, "remat_every": "sqrt"},
    "+ remat, dots kept": {"remat": jax.checkpoint_policies.dots_saveable},
}
_OPTIONS: dict[str, Any] = {"inline": {"setup": "inline"}, "python": {"loop": "python"}}
_OPTIONS |= _SETUP | _REMAT
WAYS_OF = {
    "accumulate": ("auto", "accumulate"),
    "setup": ("auto", *_SETUP),
    "remat": ("auto", *_REMAT),
    "eager": ("python",),
}


def stack(way: str, given: models.Given) -> models.Stack | None:
    """The blocks in `hk_stack.layer_stack`."""
    options, params = _OPTIONS.get(way, {}), given.params
    if options.get("setup_batch_size", 0) > given.num_layers:
        return None
    init, apply = in_haiku.transformed(given, hk_stack.layer_stack, **options)
    if way == "prepared":
        split = hk_stack.partition(apply, params, *given.args)
        return models.Stack(split.setup(params), split.call)
    mean = hk_stack.accumulate if way == "accumulate" else None
    return models.Stack(params, apply, init, mean_gradient=mean)
