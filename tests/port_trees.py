"""Trees with a value of its own in each element, and whether a port is right."""

import itertools
import math
import re

import jax
import numpy as np

import hk_stack
from hk_stack import port

_numbers = itertools.cycle(range(1, 2**24))  # All that float32 tells apart.


def new(*shape, dtype=np.float32):
    """An array of numbers that no other array has."""
    count = math.prod(shape)
    values = np.fromiter(itertools.islice(_numbers, count), np.int64, count)
    return values.reshape(shape).astype(dtype)


def types(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def is_right(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def right_or_refused(flax, haiku, **said):
    """Whether the port is right, both ways; False if it is refused.

    Then what fits nevertheless is right, too.
    """
    try:
        found = hk_stack.flax_to_haiku(flax, types(haiku), **said)
        back = hk_stack.haiku_to_flax(haiku, types(flax), **said)
    except ValueError:
        assert_right_as_far_as_it_goes(flax, haiku, **said)
        return False
    assert is_right(found, haiku) and is_right(back, flax)
    return True


def assert_right_as_far_as_it_goes(flax, haiku, **said):
    found, _ = hk_stack.flax_to_haiku(flax, types(haiku), strict=False, **said)
    back, _ = hk_stack.haiku_to_flax(haiku, types(flax), strict=False, **said)
    for tree, expected in ((found, haiku), (back, flax)):
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
        for leaf, right in pairs:
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                np.testing.assert_array_equal(leaf, right)


# What errors propose


def proposals(text):
    """What an error, a plan or a row of it says to write, as arguments."""
    rules = re.findall(r"(?:\. Say |; this fits: | rows?: )(.*)", text)
    rules = [rule for line in rules for rule in line.split("; or ")]
    rules += re.findall(r"like, ((?:rename|ignore)=.*)\)$", text, re.M)
    names = {"hk_stack": hk_stack, "dict": dict}
    return [eval(f"dict({rule})", names) for rule in dict.fromkeys(rules)]


def with_proposal(said, proposed):
    """Rules, and those of a proposal beside them."""
    both = {**said, **proposed}
    for argument in ("layer_axis", "leaf", "rename"):
        if argument in proposed:
            old = said.get(argument, {})
            old = old if isinstance(old, dict) else {"": old}
            both[argument] = {**old, **proposed[argument]}
    return both


def assert_proposals_lead_on(flax, haiku, said, depth=4):
    """Each proposal is taken, and what is left has fewer leaves, or other proposals.

    Then the first of these is taken, until there are none.
    """
    before = port.plan(flax, haiku, **said)
    for i, proposed in enumerate(proposals(str(before))):
        rules = with_proposal(said, proposed)
        after = port.plan(flax, haiku, **rules)
        # A rule that says the contrary is to be left out.
        unused = [x for x in after.unused_rules if not x.endswith(" out.")]
        assert not set(unused) - set(before.unused_rules), proposed
        if "ignore" in proposed:
            assert not {row.status for row in after.rows} & {"unused", "missing"}
            continue
        bad, rest = ([row for row in x.rows if not row.ok] for x in (before, after))
        is_less = sum(map(size, rest)) < sum(map(size, bad))
        assert is_less or set(rest) != set(bad), (proposed, str(before), str(after))
        assert proposed not in proposals(str(after)), (proposed, str(after))
        assert depth
        if not i:
            assert_proposals_lead_on(flax, haiku, rules, depth - 1)


def size(row):
    """How many leaves a row is about."""
    sides = (row.flax, row.haiku)
    more = re.findall(r"and (\d+) more", " ".join(sides))
    return sum(map(bool, sides)) + sum(map(int, more))
