"""Names in a Python loop: the modules of layer 3 are called `layers_3/linear`.

A name scope around each layer puts its index into the names of the modules that it
makes, and the layer is given its parameters and state by these names. A module that was
made elsewhere, or has forced a name on Haiku, gets such a name while the layer runs it.
"""

import contextlib
import functools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax

from hk_stack import _frames, _naming
from hk_stack._types import State, Tree


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
    around = [frame.scope for frame in _frames.frames() if frame.scope]
    own = re.sub(r"\W", "_", stack)
    start = f"{around[-1]}/{own}" if around else own

    def make() -> list[Scope]:
        names = [f"{start}_{i}" for i in range(num_layers)]
        return [Scope(name, hk.name_scope(hk.force_name(name))) for name in names]

    # Making them all at once takes half of the time. The transform keeps names in use
    # out of that in which the stack runs.
    with without_texts():
        scopes: list[Scope] = hk.transform(make).apply({}, None)
        return scopes


@contextlib.contextmanager
def without_texts() -> Iterator[None]:
    """Modules that are made here get no `repr`, which takes most of the time."""
    before = hk.experimental.module_auto_repr(False)
    try:
        yield
    finally:
        hk.experimental.module_auto_repr(before)


class Names:
    """The names of one layer's modules, parameters and state, while it runs.

    Parameters and state are stored by plain names, without a scope.

    Attributes:
      frame: Of the layer.
      own: Its scope, or "".
      around: The scopes around it.
      module: Plain name of the module around a transparent stack, or "".
      naming_map: Of a transparent stack.
      given: The parameters of the layer, by its names; None while it is initialised.
      were_odd: Whether a module was met that has to be told its name in this layer.
    """

    def __init__(self, module: str, naming_map: _naming.Map | None) -> None:
        *around, self.frame = _frames.frames()
        self.own = self.frame.scope
        self.around = [frame.scope for frame in around if frame.scope]
        self.module = module
        self.naming_map = naming_map
        self.given: Mapping[str, Any] | None = None
        self.were_odd = False

    def added(self, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Parameters or state by the names of this layer, from those by plain names."""
        return {_below(self.own, module): tree[module] for module in tree}

    def dropped(self, after: State, before: State) -> dict[str, Any]:
        """The inverse of `added`; of several with one name, what changed."""
        plain: dict[str, dict[str, Any]] = {}
        for module, leaves in after.items():
            own = _without([self.own], module)
            for name, value in leaves.items():
                is_old = value is before.get(own, {}).get(name)
                if not is_old or name not in plain.get(own, {}):
                    plain.setdefault(own, {})[name] = value
        return plain

    @contextlib.contextmanager
    def watched(
        self, guard: Callable[[str], contextlib.AbstractContextManager[Any]]
    ) -> Iterator[None]:
        """Gives the modules that a layer uses its names.

        Args:
          guard: What to put around methods of a module that was made outside of the
            layer, given its plain name.
        """
        here: dict[int, Any] = {}  # Weak, as modules may hold traced values.

        def on_method(
            next_f: Callable[..., Tree],
            args: tuple[Tree, ...],
            kwargs: dict[str, Tree],
            context: hk.MethodContext,
        ) -> Tree:
            module, run = context.module, functools.partial(next_f, *args, **kwargs)
            if context.method_name == "__init__":
                return self._make(module, run, here)
            if id(module) in here:
                return self._with_bare(module, run())
            with guard(self._of_other(module.module_name)):
                is_ours = self._are_in_force()
                return self._borrow(module, run, here) if is_ours else run()

        with hk.intercept_methods(on_method):
            yield

    def _make(
        self, module: hk.Module, run: Callable[[], Tree], here: dict[int, Any]
    ) -> Tree:
        """Runs the `__init__` of a module, which may force another name on Haiku."""
        key = id(module)
        here[key] = weakref.ref(module, lambda _: here.pop(key, None))
        result = run()
        is_own = module.module_name.startswith(f"{self.own}/") or not self.own
        if not is_own and self._are_in_force():
            self._rename(module)
        return result

    def _borrow(
        self, module: hk.Module, run: Callable[[], Tree], here: dict[int, Any]
    ) -> Tree:
        """Runs a method of a module that was made elsewhere, by its name here."""
        before = self._rename(module)
        here[id(module)] = module
        try:
            return self._with_bare(module, run())
        finally:
            del here[id(module)]
            for attribute, name in before.items():
                setattr(module, attribute, name)

    def _are_in_force(self) -> bool:
        """Whether the code that runs is in a transform in which modules have scopes.

        The layer function may have made another transform, with names of its own.
        """
        if (
            not (self.own or self.around or self.module)
            or self.frame is not _frames.frames()[-1]
        ):
            return False
        if self.given is None:
            return hk.running_init()
        found = hk.experimental.get_params()
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(self.given), strict=False)
        return found.keys() == self.given.keys() and all(a is b for a, b in pairs)

    def _rename(self, module: hk.Module) -> dict[str, str]:
        """Gives a module the name that it has in this layer; returns the old ones."""
        self.were_odd = True
        before = {a: getattr(module, a) for a in _NAMES if hasattr(module, a)}
        for attribute, name in before.items():
            own = _below(self.own, self._of_other(name or _BARE))
            setattr(module, attribute, "" if own == _BARE else own)
        return before

    def _of_other(self, module: str) -> str:
        """The plain name of a module that was made outside of the layer.

        A transparent stack knows it by the name from the transform on, as
        `hk.layer_stack` does; or, where that is none of the stack's, by the name from
        the module around the stack on, as it is stored.
        """
        name = _without(self.around, module)
        if self.naming_map is None or _naming.is_stacked(self.naming_map, name):
            return name
        return _without([self.module], name)

    def _with_bare(self, module: hk.Module, result: Tree) -> Tree:
        """What `hk.transparent_lift` finds, with parameters that are of no module.

        It looks for them in a module `~` of the scope, where they are of the scope.
        """
        is_lift = self.own and getattr(module, _PREFIX, None) == self.own
        if not (is_lift and isinstance(result, tuple)):
            return result
        self.were_odd = True
        bare = hk.experimental.get_params(), hk.experimental.get_current_state()
        for tree, around in zip(result, bare, strict=True):
            if self.own in around:
                tree[_BARE] = {**around[self.own], **tree.get(_BARE, {})}
        return result


# What Haiku calls parameters and state of no module, and where lifted ones come from.
_BARE, _PREFIX = "~", "prefix_name"
_NAMES = ("module_name", _PREFIX)


def around() -> str:
    """What names of modules that are made here begin with; "" outside of modules."""
    with hk.name_scope("hk_stack_scope"):  # Knows of the method that runs, too.
        return hk.experimental.current_name().rpartition("/")[0]


def plain(module: str) -> str:
    """A module's name in the layer that runs, without the layer's scope."""
    return _without([frame.scope for frame in _frames.frames()[-1:]], module)


def plain_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the transform that runs, by plain names."""
    return {plain(module): tree[module] for module in tree}


def _below(scope: str, module: str) -> str:
    if not scope:
        return module
    return scope if module == _BARE else f"{scope}/{module}"


def _without(scopes: Sequence[str], module: str) -> str:
    """The inverse of `_below`, for the innermost scope that fits."""
    fitting = (s for s in scopes if s and f"{module}/".startswith(f"{s}/"))
    scope = max(fitting, key=len, default="")
    return module[len(scope) + 1 :] or _BARE if scope else module
