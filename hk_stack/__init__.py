"""Deep stacks of Haiku layers: initialised and set up all at once, then scanned."""

import importlib
from typing import Any

from hk_stack._accumulate import accumulate
from hk_stack._frames import layer_index
from hk_stack._hoist import hoist
from hk_stack._layer_axes import layer_axes
from hk_stack._layout import stack_params, unstack_params
from hk_stack._loop import use_loop
from hk_stack._naming import NumberedLayers
from hk_stack._options import Pipeline
from hk_stack._partition import Partition, partition
from hk_stack._per_layer import per_layer, scale_by_layer
from hk_stack._roll import roll
from hk_stack._setup_first import setup_first
from hk_stack._shardings import shardings
from hk_stack._stack import layer_stack
from hk_stack._summary import summary
from hk_stack._taps import collect, tap
from hk_stack.port import flax_to_haiku, haiku_to_flax

__all__ = (
    "NumberedLayers",
    "Partition",
    "Pipeline",
    "accumulate",
    "collect",
    "flax_to_haiku",
    "haiku_to_flax",
    "hoist",
    "layer_axes",
    "layer_index",
    "layer_stack",
    "partition",
    "per_layer",
    "roll",
    "scale_by_layer",
    "setup_first",
    "shardings",
    "stack_params",
    "summary",
    "tap",
    "unstack_params",
    "use_loop",
)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "checkpoint":  # Few need it, and it takes long to import.
        return importlib.import_module("hk_stack.checkpoint")
    raise AttributeError(f"module 'hk_stack' has no attribute {name!r}")
