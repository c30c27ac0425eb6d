"""Names in a Python loop: the modules of layer 3 are called `layers_3/linear`.

A name scope around each layer puts its index into the names of the modules that it
makes. Parameters and state are stored by names without scopes, so each layer is given
them by all the names that it may ask for.
"""

import contextlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import haiku as hk

from hk_stack import checks, inside


class Scope(NamedTuple):
    """A name scope of one layer.

    Attributes:
      name: In the transform around the outermost stack.
      context: Enters the scope; may be used once.
    """

    name: str
    context: contextlib.AbstractContextManager[None]


def of_layers(stack: str, num_layers: int) -> list[Scope]:
    """A scope for each layer of the stack of this name, below the scopes around it."""
    around = [frame.scope for frame in inside.frames() if frame.scope]
    own = re.sub(r"\W", "_", stack)
    start = f"{around[-1]}/{own}" if around else own

    def make() -> list[Scope]:
        names = [f"{start}_{i}" for i in range(num_layers)]
        return [Scope(name, hk.name_scope(hk.force_name(name))) for name in names]

    # Making them all at once, without texts that nobody reads, takes half of the time.
    # The transform keeps names in use out of that in which the stack runs.
    before = hk.experimental.module_auto_repr(False)
    try:
        return hk.transform(make).apply({}, None)
    finally:
        hk.experimental.module_auto_repr(before)


class Names:
    """The names by which a layer may ask for its parameters and state.

    Modules that the layer makes have its scope in their names; modules of the layers
    around have theirs, and others have none.

    Attributes:
      scopes: Of the loops around the layer and of its own, innermost last; "" for
        names without one.
      where: Names the stack in errors.
    """

    def __init__(self, scopes: Sequence[str], where: str):
        self.scopes = scopes
        self.where = where

    def added(self, tree: Any) -> dict[str, Any]:
        """Parameters or state by all names, from those by names without scopes."""
        names = {
            _below(s, module): tree[module] for s in self.scopes for module in tree
        }
        checks.no_clash(
            len(names), len(self.scopes) * len(tree), self.scopes, self.where
        )
        return names

    def dropped(self, after: Any, before: Any) -> dict[str, Any]:
        """State by names without scopes; of several with one name, what changed."""
        plain: dict[str, dict[str, Any]] = {}
        for module, leaves in after.items():
            own = _without(self.scopes, module)
            for name, value in leaves.items():
                is_old = value is before.get(own, {}).get(name)
                if not is_old or name not in plain.get(own, {}):
                    plain.setdefault(own, {})[name] = value
        return plain


def _below(scope: str, module: str) -> str:
    if not scope:
        return module
    return scope if module == "~" else f"{scope}/{module}"


def _without(scopes: Iterable[str], module: str) -> str:
    """The inverse of `_below`, for the innermost scope that fits."""
    fitting = (s for s in scopes if s and f"{module}/".startswith(f"{s}/"))
    scope = max(fitting, key=len, default="")
    if not scope:
        return module
    return "~" if module == scope else module[len(scope) + 1 :]
