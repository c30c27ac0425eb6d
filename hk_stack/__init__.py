"""Deep stacks of Haiku layers: initialised and set up all at once, then scanned."""

from hk_stack.accumulate import accumulate
from hk_stack.cut import hoist
from hk_stack.layout import NumberedLayers, stack_params, unstack_params
from hk_stack.partition import Partition, partition
from hk_stack.port import flax_to_haiku, haiku_to_flax
from hk_stack.stack import layer_stack

__all__ = (
    "NumberedLayers",
    "Partition",
    "accumulate",
    "flax_to_haiku",
    "haiku_to_flax",
    "hoist",
    "layer_stack",
    "partition",
    "stack_params",
    "unstack_params",
)
__version__ = "0.1.0"
