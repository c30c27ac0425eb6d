"""Trees of well-known families, changed at random, are ported right or refused.

Sizes are equal where they should not be, scopes are renamed, leaves are missing,
layers are counted otherwise, rules are left out: whatever is ported nevertheless is
right, leaf by leaf. There are HK_STACK_TREES trials: `HK_STACK_TREES=10000 pytest -s
tests/test_port_fuzz.py` takes a quarter of an hour, and prints what became of them.
"""

import collections
import os
import random
import re

from port_families import FAMILIES, SIZES, expected, flat, nested, variables_of
from port_trees import (
    assert_right_as_far_as_it_goes,
    new,
    right_or_refused,
    types,
)

from hk_stack import port
from hk_stack.port import _plan

TREES = int(os.environ.get("HK_STACK_TREES", "150"))


def drawn_sizes(rng):
    """Small, so that most are equal; and more than ten layers now and then."""
    sizes = {name: rng.choice([1, 2, 2, 3, 4]) for name in SIZES}
    is_long = rng.random() < 0.1
    return {**sizes, "L": 11 if is_long else rng.choice([1, 2, 2, 3, 4])}


def unflattened(leaves, depth):
    """Haiku's trees: modules have slashes."""
    tree = {}
    for path, leaf in leaves.items():
        parts = path.split("/")
        module = "/".join(parts[:-1])
        tree.setdefault(module, {})[parts[-1]] = leaf
    return tree


# Changes of the leaves of one tree, by their paths


def one_is_gone(rng, leaves):
    """A leaf, or that of all layers."""
    path = rng.choice(sorted(leaves))
    if rng.random() < 0.5:
        gone = {path}
    else:
        pattern = re.sub("[0-9]+", "[0-9]+", re.escape(path))
        gone = {other for other in leaves if re.fullmatch(pattern, other)}
    return {other: leaf for other, leaf in leaves.items() if other not in gone}


def a_module_is_gone(rng, leaves):
    scope = rng.choice(sorted(leaves)).rpartition("/")[0]
    return {p: leaf for p, leaf in leaves.items() if p.rpartition("/")[0] != scope}


def renamed(rng, leaves):
    """A part of a path, wherever it is, is called by a name that nothing else has."""
    parts = sorted({part for path in leaves for part in path.split("/")[1:-1]})
    parts = [part for part in parts if not part.isdecimal() and part != "~"]
    if not parts:
        return leaves
    part = rng.choice(parts)
    base = re.sub("_[0-9]+$", "", part)
    fresh = rng.choice([f"{base}_7", f"{part}_x", f"x_{part}", f"{part}_12"])
    change = {part: fresh}
    return {at_parts(path, change): leaf for path, leaf in leaves.items()}


def at_parts(path, change):
    first, *modules, last = path.split("/")
    return "/".join([first, *(change.get(part, part) for part in modules), last])


# What is numbered by layers; other modules are what their numbers say.
LAYERS = {"", "layers_", "encoderblock_", "ResNetBlock_", "res_net_block_"}


def recounted(rng, leaves):
    """Layers begin with another number, or have one left out."""
    parts = {part for path in leaves for part in path.split("/")[1:-1]}
    bases = {re.sub("[0-9]+$", "", x) for x in parts if re.search("[0-9]$", x)}
    numbered = sorted(bases & LAYERS)
    if not numbered:
        return leaves
    base, by, since = rng.choice(numbered), rng.choice([1, 1, 5]), rng.choice([0, 0, 1])

    def change(part):
        match = re.fullmatch(re.escape(base) + "([0-9]+)", part)
        return (
            f"{base}{int(match[1]) + by}" if match and int(match[1]) >= since else part
        )

    return {
        "/".join(map(change, path.split("/"))): leaf for path, leaf in leaves.items()
    }


def shuffled(rng, leaves):
    return dict(rng.sample(sorted(leaves.items()), len(leaves)))


def wrapped(rng, leaves):
    """A module is around everything."""
    return {
        "/".join([path.split("/")[0], "around", *path.split("/")[1:]]): leaf
        for path, leaf in leaves.items()
    }


CHANGES = [one_is_gone, a_module_is_gone, renamed, recounted, shuffled, wrapped]


def changed(rng, leaves, most=2):
    names = []
    for change in rng.choices(CHANGES, k=rng.randint(0, most)):
        leaves = change(rng, leaves)
        names.append(change.__name__)
    return leaves, names


def rules_of(rng, family):
    """A recipe, of which some rules are left out now and then.

    Not that kernels are transposed: where all are square, nothing else says so.
    """
    rules = {k: v for k, v in family.recipe.items() if k != "ignore"}
    if rng.random() < 0.6:
        return rules
    return {
        argument: {k: v for k, v in said.items() if is_needed(v) or rng.random() < 0.7}
        for argument, said in rules.items()
    }


def trial(seed):
    """Whether a tree was ported, and what was changed."""
    rng = random.Random(seed)
    family = FAMILIES[rng.choice(sorted(FAMILIES))]
    variables = variables_of(family, lambda shape: new(*shape), drawn_sizes(rng))
    variables.pop("cache", None)  # What is ignored stays as it is.
    params, state = expected(family, variables)
    flax, of_flax = changed(rng, flat(variables))
    haiku, of_haiku = changed(rng, flat({"params": params, "state": state}))
    flax = {"params": {}, **nested(flax)}
    sides = [
        {p.partition("/")[2]: x for p, x in haiku.items() if p.startswith(f"{kind}/")}
        for kind in ("params", "state")
    ]
    pair = tuple(unflattened(side, 2) for side in sides)
    rules = rules_of(rng, family)
    found = port.plan(*types((flax, pair)), **rules)
    unused = " ".join(found.unused_rules)
    if unused and not loses_a_transpose(rules, unused):
        rules = used(rules, unused)  # With those that are not, all would be refused.
        found = port.plan(*types((flax, pair)), **rules)
    if found.ok:
        assert right_or_refused(flax, pair, **rules)
    elif not found.unused_rules:
        assert_right_as_far_as_it_goes(flax, pair, **rules)
    return found.ok, bool(of_flax or of_haiku)


def is_needed(rule):
    """Whether a rule is a pair of functions."""
    is_pair = isinstance(rule, tuple) and any(map(callable, rule))
    return is_pair and rule != port.SAME


def loses_a_transpose(rules, unused):
    lost = [v for k, v in rules.get("leaf", {}).items() if f"leaf: {k!r}" in unused]
    return any(map(is_needed, lost))


def used(rules, unused):
    """Rules without those of which an error speaks."""
    return {
        argument: {k: v for k, v in said.items() if f"{argument}: {k!r}" not in unused}
        for argument, said in rules.items()
    }


def test_families_that_are_changed_are_right_or_refused(monkeypatch):
    monkeypatch.setattr(_plan, "_MOST_NAMED", 0)  # Nobody reads what is nearest.
    outcomes = collections.Counter()
    for seed in range(TREES):
        try:
            outcomes[trial(seed)] += 1
        except Exception as error:
            raise AssertionError(f"trial({seed}) failed") from error
    for (is_ported, is_changed), count in sorted(outcomes.items()):
        what = "changed" if is_changed else "as they are"
        print(f"{'right' if is_ported else 'refused'} {count} ({what})")
    assert outcomes[True, False] and outcomes[True, True] > TREES / 20
