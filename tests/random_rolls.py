"""Random models with a Python loop over random layers in them, as plain data.

A `Loop` is drawn by Hypothesis: the layers are those of a random `Program`, and what
may be different from layer to layer is drawn besides. Its defaults are the plainest
loop, at which what shrinks arrives.
"""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from layer_cases import layer_loop, pile
from random_layers import (
    Program,
    Runner,
    Step,
    Value,
    algebra,
    combined,
    integer,
    matrix,
    mixed_in,
    programs,
    real,
    scalar,
)
from random_layers import steps as random_steps

import hk_stack


class Loop(NamedTuple):
    """A model: steps, a Python loop over layers, steps.

    Attributes:
      program: The layers, and the steps before and after; its options are of `roll`.
      num_layers: `L`.
      second: What every second layer does instead; nothing if all do the same.
      dear: Whether each layer also multiplies the carry with itself.
      again: How many layers of a second loop there are, with parameters of their own.
      between: Whether there is anything between the two loops.
      odd: A layer that does one thing more.
      bare: Whether the first layer does one thing less.
      skip: What layers read besides the layer before, one of `SKIPS`.
      rows: Which parameters each layer has, one of `ROWS`.
      storage: How parameters and state are kept, one of `STORAGE`.
      early: Whether something dear is made of all parameters before the loop.
      keys: How layers come to their random keys, one of `KEYS`.
      raw: Whether keys are arrays of integers.
      wrap: What is around each layer, one of `WRAPS`.
      around: What is around the loops, one of `AROUND`.
      factor: Whether the carry is divided by the number of the layer.
      weak: Whether a Python number is carried along, "alone" or "mixed" with others.
      total: Whether a sum over all layers is carried along.
      chosen: The layers of which values are read later.
      effect: "free" or "ordered", if each layer prints something; "callback".
      nested: Whether stacks inside of layers are Python loops, too.
      also: What else is done with it, "partition" or "gradients".
      least: `min_layers`.
      setup: As for `roll`.
      remat: As for `roll`.
      remat_every: As for `roll`.
    """

    program: Program
    num_layers: int = 3
    second: tuple[Step, ...] = ()
    dear: bool = True
    again: int = 0
    between: bool = False
    odd: int | None = None
    bare: bool = False
    skip: str = ""
    rows: str = "each"
    storage: str = "list"
    early: bool = False
    keys: str = "split"
    raw: bool = False
    wrap: str = ""
    around: str = ""
    factor: bool = False
    weak: str = ""
    total: bool = False
    chosen: tuple[int, ...] = ()
    effect: str = ""
    nested: bool = False
    also: str = "partition"
    least: int = 3
    setup: str = "auto"
    remat: bool = False
    remat_every: int | str | None = None

    @property
    def counts(self) -> list[int]:
        """How many layers each loop has."""
        return [self.num_layers, self.again] if self.again else [self.num_layers]

    @property
    def is_alike(self) -> bool:
        """Whether all layers do the same, and read the same of one another."""
        is_odd = self.odd is not None or self.bare or self.skip in ("two back", "last")
        is_odd |= self.skip == "across" and self.again > self.num_layers
        # Each callback is a function of its own, and no two functions can be compared.
        return not is_odd and self.effect in ("", "free")

    @property
    def is_numbered(self) -> bool:
        """Whether layers know their number."""
        return self.factor or self.keys == "folded inside"

    @property
    def is_scan(self) -> bool:
        """Whether a scan can do the same."""
        is_plain = self.is_alike and not self.second and not self.is_numbered
        return is_plain and self.keys in ALL_KEYS and self.skip != "across"

    def blocks(self) -> set[tuple[int, ...]]:
        """How many blocks the loops must have, in one of these ways; else none must."""
        if not self.is_alike or not self.dear:
            return set()
        # Rules of derivatives cannot be compared if numbers in them differ, or if they
        # differentiate a function that has only another kind of rule.
        if self.wrap.startswith("custom") and self.is_numbered:
            return set()
        all_steps = (*self.program.layer, *self.second)
        if self.wrap == "custom_jvp" and has_step("custom_vjp", all_steps):
            return set()
        # The first layer may be given a Python number, and so be another program.
        is_other = self.weak == "mixed" or (self.wrap and (self.weak or self.total))
        first = {0, int(bool(is_other))}
        period = 2 if self.second else 1
        ways = {
            tuple((n - less * (i == 0)) // period for i, n in enumerate(self.counts))
            for less in first
        }
        is_sure = min(map(min, ways)) >= self.least
        return ways | {(sum(each),) for each in ways} if is_sure else set()

    def steps(self, i: int, count: int) -> tuple[Step, ...]:
        """What layer i of so many does."""
        does = self.second if self.second and i % 2 else self.program.layer
        if self.odd is not None and i == self.odd % count:
            does = (*does, Step("elementwise", (0,), 1))
        return does[:-1] if self.bare and i == 0 else does

    def kinds(self, count: int) -> dict[tuple[Step, ...], int]:
        """What so many layers do, and how many of them do that."""
        return collections.Counter(self.steps(i, count) for i in range(count))


def has_step(op: str, steps: tuple[Step, ...]) -> bool:
    return any(step.op == op or has_step(op, step.body) for step in steps)


# What layer i of n reads that is no carry: which of the values that all layers before
# were given, those of m layers of another loop first; or nothing.

SKIPS: dict[str, Callable[[int, int, int], int | None]] = {
    "": lambda i, n, m: None,
    "first": lambda i, n, m: m,
    "two back": lambda i, n, m: m + i - 1 if i > 1 else None,
    "last": lambda i, n, m: m if i == n - 1 else None,
    "across": lambda i, n, m: m - 1 - i if i < m else None,
}

# Which row of all parameters of its kind the i-th layer of n has.

ROWS: dict[str, Callable[[int, int], int]] = {
    "each": lambda i, n: i,
    "reversed": lambda i, n: n - 1 - i,
    "pairs": lambda i, n: i // 2,
    "one": lambda i, n: 0,
    "later": lambda i, n: i + 1,
    "strided": lambda i, n: 2 * i,
}


def prepared(leaf: Any) -> Any:
    """What is dear to make of a parameter, of the same type."""
    # A stack in a layer keeps vectors as matrices that are not square.
    is_matrix = leaf.ndim == 2 and leaf.shape[0] == leaf.shape[1]
    return algebra(leaf, 2) if is_matrix and leaf.dtype == jnp.float32 else leaf


# From what is kept of all layers to a function that gives that of one.

Fetch = Callable[[int], Any]


def sliced(tree: Any) -> Fetch:
    return lambda i: jax.tree.map(lambda leaf: leaf[i], tree)


def unstacked(tree: Any) -> Fetch:
    rows = jax.tree.map(jnp.unstack, tree)
    return lambda i: jax.tree.map(lambda _, row: row[i], tree, rows)


def dynamic(tree: Any) -> Fetch:
    at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    return lambda i: jax.tree.map(lambda leaf: at(leaf, i), tree)


STORAGE: dict[str, Callable[[Any], Fetch]] = {
    "list": lambda trees: trees.__getitem__,
    "sliced": sliced,
    "unstacked": unstacked,
    "dynamic": dynamic,
}

# The random keys of layers: of all, before the loop; or from layer to layer, the next
# one and that of layer i.


def chained(key: Any, n: int) -> list[Any]:
    keys = []
    for _ in range(n):
        key, own = jax.random.split(key)
        keys.append(own)
    return keys


ALL_KEYS: dict[str, Callable[[Any, int], list[Any]]] = {
    "split": lambda key, n: list(jax.random.split(key, n)),
    "chained before": chained,
    "folded before": lambda key, n: [jax.random.fold_in(key, i) for i in range(n)],
    "folded inside": lambda key, n: [key] * n,
}
NEXT_KEY: dict[str, Callable[[Any, int], Any]] = {
    "chained": lambda key, i: jax.random.split(key),
    "folded": lambda key, i: (key, jax.random.fold_in(key, i)),
}
KEYS = (*ALL_KEYS, *NEXT_KEY)

# What is around a layer: `block(number, params, state, key, given, carry)`.


def closing_over(transform: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the carry alone, made anew for each layer."""

    def wrap(block: Callable[..., Any]) -> Callable[..., Any]:
        def layer(*args: Any) -> Any:
            *rest, carry = args
            return transform(lambda carry: block(*rest, carry))(carry)

        return layer

    return wrap


def custom_jvp(block: Callable[..., Any]) -> Callable[..., Any]:
    """Its derivative is twice that of the block."""

    def layer(number: int, *rest: Any) -> Any:
        run = functools.partial(block, number)
        rule = jax.custom_jvp(run)

        @rule.defjvp
        def _(primals: Any, tangents: Any) -> Any:
            results, found = jax.jvp(run, primals, tangents)
            return results, jax.tree.map(doubled, found)

        return rule(*rest)

    return layer


def custom_vjp(block: Callable[..., Any]) -> Callable[..., Any]:
    """Its derivative is twice that of the block."""

    def layer(number: int, *rest: Any) -> Any:
        run = functools.partial(block, number)

        def backward(rest: Any, cotangents: Any) -> Any:
            return jax.tree.map(doubled, jax.vjp(run, *rest)[1](cotangents))

        rule = jax.custom_vjp(run)
        rule.defvjp(lambda *rest: (run(*rest), rest), backward)
        return rule(*rest)

    return layer


def doubled(tangent: Any) -> Any:
    return tangent if tangent.dtype == jax.dtypes.float0 else tangent + tangent


def both(block: Callable[..., Any]) -> Callable[..., Any]:
    again = jax.checkpoint(block, static_argnums=0, prevent_cse=False)
    return jax.jit(again, static_argnums=0)


WRAPS: dict[str, Callable[..., Any]] = {
    "": lambda block: block,
    "jit": lambda block: jax.jit(block, static_argnums=0),
    "jit closure": closing_over(jax.jit),
    "checkpoint": lambda block: jax.checkpoint(block, static_argnums=0),
    "checkpoint closure": closing_over(jax.checkpoint),
    "both": both,
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
}

# What is around the loops: `run(x) -> (x, rest)`.


def in_scan(run: Callable[..., Any], x: Any) -> Any:
    return jax.lax.scan(lambda x, _: run(x), x, None, length=2)


def in_cond(run: Callable[..., Any], x: Any) -> Any:
    def other(x: Any) -> Any:
        typed = jax.eval_shape(run, x)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), typed)

    return jax.lax.cond(integer(x[0]) < 5, run, other, x)  # It always is.


AROUND: dict[str, Callable[..., Any]] = {
    "": lambda run, x: run(x),
    "jit": lambda run, x: jax.jit(run)(x),
    "checkpoint": lambda run, x: jax.checkpoint(run)(x),
    "scan": in_scan,
    "cond": in_cond,
}


def note(value: Any) -> None:
    """What layers call back."""


class Layer(NamedTuple):
    """A layer of a loop: what it does, and what it is given of its own.

    Attributes:
      steps: What it does.
      params: Its parameters.
      state: Its state.
      key: Its random key.
      inputs: Its per-layer inputs.
      next_key: What is left of the key for the layers after it.
    """

    steps: tuple[Step, ...]
    params: Any
    state: Any
    key: Any
    inputs: list[Any]
    next_key: Any

    def rows(self) -> dict[str, Any]:
        """What another layer has others of."""
        names = ("params", "state", "key", "inputs")
        return {name: getattr(self, name) for name in names}


class Model:
    """A loop as a function of `(params, state, key, x, per_layer, memory)`.

    Attributes:
      loop: The loop.
      as_scan: Whether scans take the place of Python loops.
    """

    def __init__(self, loop: Loop, *, as_scan: bool = False):
        self.loop = loop
        self.as_scan = as_scan
        stack = layer_loop if loop.nested else hk_stack.layer_stack
        self._runner = Runner(stack, loop.program.inline)
        self._layer = functools.cache(self._transformed)
        self._wrapped = functools.cache(
            lambda steps: WRAPS[loop.wrap](functools.partial(self._block, steps))
        )
        self._before, self._after = (
            hk.transform_with_state(functools.partial(self._run, steps, name))
            for name, steps in [
                ("before", loop.program.before),
                ("after", loop.program.after),
            ]
        )

    def _run(self, steps: tuple[Step, ...], name: str, given: list[Any]) -> list[Any]:
        """The values that steps make."""
        loop = self.loop
        is_closed = loop.around in ("scan", "cond") or loop.wrap.startswith("custom")
        pool = [Value(a, False) for a in given]
        made = self._runner.run(steps, pool, name, marks=not is_closed)
        return [value.array for value in made]

    def _transformed(self, steps: tuple[Step, ...]) -> Any:
        """A layer, transformed."""
        program = self.loop.program

        def layer(given: list[Any], x: list[Any]) -> Any:
            made = self._run(steps, "layer", [*given, *x])
            if self.loop.dear:
                made.insert(0, jnp.tanh(0.5 * matrix(x[0]) @ matrix(x[0])))
            outputs = [made[-1 - r % len(made)] for r in program.outputs]
            return mixed_in(x, made, program.carry), list(map(jnp.asarray, outputs))

        return hk.transform_with_state(layer)

    def init(self, key: Any, x: Any, per_layer: Any, memory: Any) -> Any:
        """Parameters and state, of which only the shapes matter."""
        before = self._before.init(key, [*x, memory])
        values, _ = self._before.apply(*before, key, [*x, memory])
        pool = [memory, *values]
        given = [*pool, *(leaf[0] for leaf in per_layer)]
        loops = [self._init(count, key, given, x) for count in self.loop.counts]
        after = self._after.init(key, [*pool, *x])
        parts = zip(before, zip(*loops, strict=True), after, strict=True)
        return [list(part) for part in parts]

    def _init(self, count: int, key: Any, given: Any, x: Any) -> Any:
        """Parameters and state of the layers of a loop, by what they do."""
        row, params, states = ROWS[self.loop.rows], [], []
        for steps, number in self.loop.kinds(count).items():
            own, state = self._layer(steps).init(key, given, x)
            params.append(
                self._kept(own, 1 + max(row(i, number) for i in range(number)))
            )
            states.append(self._kept(state, number))
        return params, states

    def _kept(self, tree: Any, rows: int) -> Any:
        trees = [tree] * rows
        return trees if self.loop.storage == "list" else pile(trees)

    def apply(
        self, params: Any, state: Any, key: Any, x: Any, per_layer: Any, memory: Any
    ) -> dict[str, Any]:
        """All that the model computes, and its new state."""
        loop, given = self.loop, [*x, memory]
        values, first = self._before.apply(params[0], state[0], key, given)
        pool = [memory, *values]

        def run(x: Any) -> Any:
            carry, xs, rest = self._start(x), [], []
            for i, count in enumerate(loop.counts):
                if i and loop.between:
                    first, *others = carry["x"]
                    carry["x"] = [jnp.cos(first), *others]
                trees = params[1][i], state[1][i]
                layers = self._layers(count, *trees, key, per_layer)
                if loop.early or self.as_scan:
                    layers = iter(list(layers))
                run_layers = self._scan if self.as_scan else self._loop
                carry, results = run_layers(count, layers, pool, carry, xs)
                rest.append(results)
            x = carry.pop("x")
            return x, (carry, rest)

        x, rest = AROUND[loop.around](run, x)
        after, last = self._after.apply(params[2], state[2], key, [*pool, *x])
        return {"x": x, "rest": rest, "after": after, "state": (first, last)}

    def _start(self, x: Any) -> dict[str, Any]:
        """What the first layer is given."""
        carry: dict[str, Any] = {"x": x}
        if self.loop.weak:
            carry["weak"] = jnp.float32(0.5) if self.as_scan else 0.5
        if self.loop.total:
            carry["total"] = jnp.float32(0) if self.as_scan else 0.0
        return carry

    def _layers(
        self, count: int, params: Any, states: Any, key: Any, per_layer: Any
    ) -> Iterator[Layer]:
        """The layers of a loop."""
        loop, kinds = self.loop, self.loop.kinds(count)
        fetch, row = STORAGE[loop.storage], ROWS[loop.rows]
        own_params, own_states = (
            dict(zip(kinds, map(fetch, trees), strict=True))
            for trees in (params, states)
        )
        keys = ALL_KEYS[loop.keys](key, count) if loop.keys in ALL_KEYS else None
        done = collections.Counter[tuple[Step, ...]]()
        for i in range(count):
            steps = loop.steps(i, count)
            own = own_params[steps](row(done[steps], kinds[steps]))
            if loop.early:
                own = jax.tree.map(prepared, own)
            if keys is None:
                key, own_key = NEXT_KEY[loop.keys](key, i)
            else:
                own_key = keys[i]
            at = count - 1 - i if loop.program.reverse else i
            inputs = [leaf[at] for leaf in per_layer]
            state = own_states[steps](done[steps])
            yield Layer(steps, own, state, own_key, inputs, key)
            done[steps] += 1

    def _loop(
        self, count: int, layers: Iterator[Layer], pool: Any, carry: Any, xs: list[Any]
    ) -> Any:
        """Layers, one after the other; adds what each is given to `xs`."""
        loop, results, start = self.loop, [], len(xs)
        for i, layer in enumerate(layers):
            xs.append(carry["x"][0])
            skipped = SKIPS[loop.skip](i, count, start)
            if skipped is not None:
                carry = self._joined(carry, xs[skipped])
            number = i if loop.is_numbered else 0
            carry, *found = self._run_one(number, layer, pool, carry)
            results.append((carry["x"][0], *found))
        return carry, self._results(results, layer.next_key)

    def _scan(
        self, count: int, layers: Iterator[Layer], pool: Any, carry: Any, xs: list[Any]
    ) -> Any:
        """The same as a scan."""
        first, *others = layers
        start = carry["x"][0]

        def step(carry: Any, rows: Any) -> Any:
            if self.loop.skip:
                carry = self._joined(carry, start)
            layer = first._replace(**rows)
            carry, *found = self._run_one(0, layer, pool, carry)
            return carry, (carry["x"][0], *found)

        rows = pile([layer.rows() for layer in (first, *others)])
        carry, results = jax.lax.scan(step, carry, rows)
        row = sliced(results)
        return carry, self._results(list(map(row, range(count))), first.next_key)

    def _run_one(self, number: int, layer: Layer, pool: Any, carry: Any) -> Any:
        own = layer.params, layer.state, layer.key, [*pool, *layer.inputs]
        return self._wrapped(layer.steps)(number, *own, carry)

    def _joined(self, carry: Any, other: Any) -> Any:
        first, *rest = carry["x"]
        return {**carry, "x": [combined(first, other, 0), *rest]}

    def _block(
        self,
        steps: tuple[Step, ...],
        number: int,
        params: Any,
        state: Any,
        key: Any,
        given: list[Any],
        carry: dict[str, Any],
    ) -> Any:
        """A layer; returns the next carry, its outputs and the new state."""
        loop = self.loop
        if loop.keys == "folded inside":
            key = jax.random.fold_in(key, number)
        if loop.effect:
            noted = scalar(carry["x"][0])
            if loop.effect == "callback":
                jax.debug.callback(note, noted)
            else:
                jax.debug.print("{}", noted, ordered=loop.effect == "ordered")
        (x, ys), new = self._layer(steps).apply(params, state, key, given, carry["x"])
        if loop.factor:
            x = [x[0] * (1 / (number + 1)), *x[1:]]
        after = {**carry, "x": x}
        if loop.weak:
            after["weak"] = 0.9 * jnp.cos(carry["weak"])
            if loop.weak == "mixed":
                after["weak"] += 0.1 * scalar(x[0])
            after["x"] = [x[0] * after["weak"].astype(x[0].dtype), *x[1:]]
        if loop.total:
            after["total"] = carry["total"] + sum(
                [real(y).mean() for y in ys], scalar(x[0])
            )
        return after, ys, new

    def _results(self, results: list[Any], key: Any) -> dict[str, Any]:
        """What is read of all layers later, and of some."""
        chosen = [results[i % len(results)][:2] for i in self.loop.chosen]
        states = [state for *_, state in results]
        return {"chosen": chosen, "states": states, "key": as_bits(key)}


def as_bits(key: Any) -> Any:
    is_key = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(key) if is_key else key


# How they are drawn.


@st.composite
def loops(draw: Any) -> Loop:
    """Random loops; a third of them are of layers that are alike and dear."""

    def often(*options: Any) -> Any:
        return draw(st.sampled_from(options))

    def seldom(plain: Any, *options: Any) -> Any:
        return draw(st.sampled_from([plain] * 4 * len(options) + [*options]))

    program = draw(programs())
    second = (*draw(random_steps("layer", 1, 3)), Step("algebra", (0,), 2))
    return Loop(
        program._replace(layer=program.layer[: 2 + often(1, 2, 3, 4)]),
        num_layers=often(3, 4, 5, 6, 3, 4, 5, 6, 2),
        second=seldom((), second),
        dear=often(True, True, False),
        again=seldom(0, 2, 3, 4),
        between=often(False, True),
        odd=seldom(None, 0, 1, 2, 3, 4, 5),
        bare=seldom(False, True),
        skip=seldom("", *list(SKIPS)[1:]),
        rows=often("each", "each", *ROWS),
        storage=often("list", *STORAGE),
        early=seldom(False, True),
        keys=often(*KEYS),
        raw=seldom(False, True),
        wrap=often("", "", "", *WRAPS),
        around=often("", "", "", *AROUND),
        factor=often(False, True),
        weak=often("", "", "alone", "mixed"),
        total=often(False, True),
        chosen=tuple(draw(st.lists(st.integers(0, 5), max_size=3))),
        effect=seldom("", "free", "ordered", "callback"),
        # Marks in a stack are on what it closes over, too.
        nested=often(False, not has_step("hoist", (*program.layer, *second))),
        also=often("partition", "gradients"),
        least=often(3, 3, 2),
        setup=often("auto", "auto", "marked", "inline"),
        remat=seldom(False, True),
        remat_every=seldom(None, 2, "sqrt"),
    )
