"""Deep stacks of Haiku layers: initialised and set up all at once, then scanned."""

from hk_stack.layout import stack_params, unstack_params
from hk_stack.partition import hoist
from hk_stack.stack import layer_stack

__all__ = ("hoist", "layer_stack", "stack_params", "unstack_params")
__version__ = "0.1.0"
