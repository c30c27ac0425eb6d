"""Deep stacks of Haiku layers: initialised and set up all at once, then scanned."""

from hk_stack.accumulate import accumulate
from hk_stack.cut import hoist
from hk_stack.inside import layer_index, tap
from hk_stack.layout import NumberedLayers, stack_params, unstack_params
from hk_stack.loop import use_loop
from hk_stack.partition import Partition, partition
from hk_stack.port import flax_to_haiku, haiku_to_flax
from hk_stack.stack import layer_stack
from hk_stack.summary import summary
from hk_stack.taps import collect

__all__ = (
    "NumberedLayers",
    "Partition",
    "accumulate",
    "collect",
    "flax_to_haiku",
    "haiku_to_flax",
    "hoist",
    "layer_index",
    "layer_stack",
    "partition",
    "stack_params",
    "summary",
    "tap",
    "unstack_params",
    "use_loop",
)
__version__ = "0.1.0"
