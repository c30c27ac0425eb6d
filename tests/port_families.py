"""Small models of well-known families: names and shapes of their trees, and both sides.

Leaves are written as `path sizes`; `*` is the number of a layer, sizes are letters. The
forward passes are written for these trees, in plain JAX and in Haiku.
"""

import contextlib
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

import hk_stack
from hk_stack.port import recipes

SIZES = {
    "B": 2,  # batch
    "T": 5,  # length
    "D": 8,  # width
    "H": 2,  # heads
    "K": 4,  # width of a head
    "F": 12,  # width between
    "V": 11,  # vocabulary
    "L": 3,  # layers
    "N": 6,  # states, buckets
    "P": 2,  # patch
    "C": 3,  # channels, classes
}


class Family(NamedTuple):
    """A model in both frameworks.

    Attributes:
      leaves: What Flax has.
      recipe: The rules.
      flax: The forward pass on the variables.
      haiku: The same with Haiku's modules.
      inputs: Their shapes; `ids` are of token ids.
      moved: What is not called and shaped in Haiku as in Flax: the path, with a
        function of one layer, or several of these.
      around: What is around all modules in Flax only.
    """

    leaves: str
    recipe: dict[str, Any]
    flax: Callable[..., Any]
    haiku: Callable[..., Any]
    inputs: tuple[str, ...]
    moved: dict[str, Any] = {}  # noqa: RUF012, never changed
    around: str = ""


# Trees


def paths_of(leaves, sizes=SIZES):
    """The shape of each leaf by its path, with `*` for layers."""
    found = {}
    for line in filter(None, map(str.strip, leaves.split("\n"))):
        path, *shape = line.split()
        choices = [x[1:-1].split(",") for x in re.findall(r"\{.*?\}", path)]
        template = re.sub(r"\{.*?\}", "{}", path)
        for texts in itertools.product(*choices):
            shape_of = tuple(eval(text, {}, sizes) for text in shape)
            found[template.format(*texts)] = shape_of
    return found


def nested(leaves):
    """Leaves by paths as nested dicts."""
    tree = {}
    for path, leaf in leaves.items():
        *modules, name = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = leaf
    return tree


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def numbered(family, make, sizes=SIZES, first=0):
    """Each leaf by its path with numbers, made from a shape."""
    found = {}
    for path, shape in paths_of(family.leaves, sizes).items():
        count = range(first, first + sizes["L"]) if "*" in path else [0]
        for i in count:
            found[path.replace("*", str(i))] = make(shape)
    return found


def variables_of(family, make, sizes=SIZES):
    """Linen's variables: a collection is the first part of a path, if it is written."""
    leaves = numbered(family, make, sizes)
    collections = ("params/", "batch_stats/", "cache/")
    return nested(
        {
            x if x.startswith(collections) else f"params/{x}": v
            for x, v in leaves.items()
        }
    )


def expected(family, variables):
    """Haiku's parameters and state, written down leaf by leaf."""
    leaves = {x.removeprefix("params/"): leaf for x, leaf in flat(variables).items()}
    params, state = {}, {}
    for path in paths_of(family.leaves):
        pattern = re.escape(path).replace(r"\*", "([0-9]+)")
        found = [match for one in leaves if (match := re.fullmatch(pattern, one))]
        found.sort(key=lambda match: int(match[1]) if match.groups() else 0)
        moved = family.moved.get(path, (default(path, family), np.copy))
        for new, change in [moved] if isinstance(moved, tuple) else moved:
            layers = [change(leaves[match[0]]) for match in found]
            module, _, name = new.rpartition("/")
            if name in ("mean", "var") and layers:
                average = {"hidden": layers[0], "average": layers[0]}
                average["counter"] = np.array(2**30, np.int32)
                state[f"{module}/~/{name}_ema"] = average
            elif layers:
                array = np.stack(layers) if "*" in path else layers[0]
                params.setdefault(module or "~", {})[name] = array
    return params, state


def default(path, family):
    """A path in Haiku, of a stack where Flax has numbers."""
    module, _, name = path.removeprefix(family.around).rpartition("/")
    is_norm = f"{path.rpartition('/')[0]}/scale" in paths_of(family.leaves)
    words = {"kernel": "w", "embedding": "embeddings"}
    words["bias"] = "offset" if is_norm else "b"
    return f"{re.sub(r'[/_][*]', '', module)}/{words.get(name, name)}"


# Flax: plain functions of dicts


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", jnp.zeros(p["kernel"].shape[-1]))


def conv1d(p, x):
    return x @ p["kernel"].T + p["bias"]


def norm(p, x, eps):
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + eps)
    return x * p["scale"] + p["bias"]


def rms(scale, x, eps=1e-6):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + eps) * scale


def attend(q, k, v, heads, bias=0.0, scale=None):
    """Attention of `[B, T, H * K]`."""
    q, k, v = (x.reshape(*x.shape[:-1], heads, -1) for x in (q, k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    y = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
    return y.reshape(*y.shape[:2], -1)


def causal(length):
    return jnp.where(jnp.tri(length, dtype=bool), 0.0, -1e9)


def layers_of(tree, name=""):
    """The layers of numbered modules, in their order."""
    numbers = sorted(int(x[len(name) :]) for x in tree if x.startswith(name))
    return [tree[f"{name}{i}"] for i in numbers]


# Haiku


force = hk.experimental.force_name  # A path; inside of a stack, in the stack.


def linear(x, size, path, bias=True):
    return hk.Linear(size, with_bias=bool(bias), name=force(path))(x)


def layer_norm(x, path, eps):
    return hk.LayerNorm(-1, True, True, eps=eps, name=force(path))(x)


def rms_norm(x, path, eps=1e-6):
    return hk.RMSNorm(-1, eps=eps, name=force(path))(x)


def table(rows, width, path):
    """The rows of an `hk.Embed`."""
    return hk.Embed(rows, width, name=force(path)).embeddings


def stack(layer, x, path):
    *around, name = path.split("/")
    with contextlib.ExitStack() as scopes:
        for scope in around:
            scopes.enter_context(hk.name_scope(scope))
        return hk_stack.layer_stack(L, name=name)(layer)(x)


class Own(hk.Module):
    """Has parameters of any name."""

    def __call__(self, name, shape):
        return hk.get_parameter(name, shape, init=hk.initializers.RandomNormal())


def parameter(path, name, shape):
    if not path:
        return hk.get_parameter(name, shape, init=hk.initializers.RandomNormal())
    return Own(name=force(path))(name, shape)


B, T, D, H, K, F, V, L, N, P, C = SIZES.values()

# Hugging Face's GPT-2


def gpt2(variables, ids):
    p = variables["params"]["transformer"]
    x = p["wte"]["embedding"][ids] + p["wpe"]["embedding"]
    for block in layers_of(p["h"]):
        h = conv1d(block["attn"]["c_attn"], norm(block["ln_1"], x, 1e-5))
        y = attend(*jnp.split(h, 3, -1), H, causal(T))
        x = x + conv1d(block["attn"]["c_proj"], y)
        h = jax.nn.gelu(conv1d(block["mlp"]["c_fc"], norm(block["ln_2"], x, 1e-5)))
        x = x + conv1d(block["mlp"]["c_proj"], h)
    return norm(p["ln_f"], x, 1e-5) @ p["wte"]["embedding"].T


def haiku_gpt2(ids):
    def layer(x):
        h = layer_norm(x, "ln_1", 1e-5)
        qkv = [linear(h, D, f"attn/{name}") for name in ("query", "key", "value")]
        x = x + linear(attend(*qkv, H, causal(T)), D, "attn/c_proj")
        h = jax.nn.gelu(linear(layer_norm(x, "ln_2", 1e-5), F, "mlp/c_fc"))
        return x + linear(h, D, "mlp/c_proj")

    words = table(V, D, "wte")
    x = stack(layer, words[ids] + table(T, D, "wpe"), "h")
    return layer_norm(x, "ln_f", 1e-5) @ words.T


def third(i, turn=False):
    def change(x):
        part = np.split(x, 3, 0)[i]
        return part.T if turn else part

    return change


GPT2_MOVED = {
    **{
        f"transformer/h/*/attn/c_attn/{leaf}": [
            (f"h/attn/{name}/{new}", third(i, leaf == "kernel"))
            for i, name in enumerate(("query", "key", "value"))
        ]
        for leaf, new in (("kernel", "w"), ("bias", "b"))
    },
    **{
        f"transformer/h/*/{name}/kernel": (f"h/{name}/w", np.transpose)
        for name in ("attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    },
}

# Its BERT


def bert(variables, ids):
    p = variables["params"]["bert"]
    e = p["embeddings"]
    x = e["word_embeddings"]["embedding"][ids] + e["position_embeddings"]["embedding"]
    x = norm(e["LayerNorm"], x + e["token_type_embeddings"]["embedding"][0], 1e-12)
    for block in layers_of(p["encoder"]["layer"]):
        inside = block["attention"]["self"]
        y = attend(*(dense(inside[n], x) for n in ("query", "key", "value")), H)
        out = block["attention"]["output"]
        x = norm(out["LayerNorm"], x + dense(out["dense"], y), 1e-12)
        h = jax.nn.gelu(dense(block["intermediate"]["dense"], x), approximate=False)
        out = block["output"]
        x = norm(out["LayerNorm"], x + dense(out["dense"], h), 1e-12)
    return jnp.tanh(dense(p["pooler"]["dense"], x[:, 0]))


def haiku_bert(ids):
    def layer(x):
        names = [f"attention/self/{name}" for name in ("query", "key", "value")]
        y = attend(*(linear(x, D, name) for name in names), H)
        x = x + linear(y, D, "attention/output/dense")
        x = layer_norm(x, "attention/output/LayerNorm", 1e-12)
        h = jax.nn.gelu(linear(x, F, "intermediate/dense"), approximate=False)
        return layer_norm(x + linear(h, D, "output/dense"), "output/LayerNorm", 1e-12)

    x = table(V, D, "embeddings/word_embeddings")[ids]
    x = x + table(T, D, "embeddings/position_embeddings")
    x = x + table(2, D, "embeddings/token_type_embeddings")[0]
    x = stack(layer, layer_norm(x, "embeddings/LayerNorm", 1e-12), "encoder/layer")
    return jnp.tanh(linear(x[:, 0], D, "pooler/dense"))


# Its T5


def buckets(length):
    """A simple stand-in for T5's buckets: which of `N` a distance is in."""
    distance = jnp.arange(length)[None] - jnp.arange(length)[:, None]
    return jnp.clip(distance + N // 2, 0, N - 1)


def t5_stack(p, ids, words, encoded=None):
    x = words[ids]
    first = p["block"]["0"]["layer"]["0"]["SelfAttention"]
    bias = first["relative_attention_bias"]["embedding"][buckets(T)].transpose(2, 0, 1)
    bias = bias if encoded is None else bias + causal(T)
    for block in layers_of(p["block"]):
        one, *others = layers_of(block["layer"])
        h = rms(one["layer_norm"]["weight"], x)
        qkv = [dense(one["SelfAttention"][n], h) for n in "qkv"]
        x = x + dense(one["SelfAttention"]["o"], attend(*qkv, H, bias, 1.0))
        if encoded is not None:
            cross = others[0]["EncDecAttention"]
            q = dense(cross["q"], rms(others[0]["layer_norm"]["weight"], x))
            kv = [dense(cross[n], encoded) for n in "kv"]
            x = x + dense(cross["o"], attend(q, *kv, H, 0.0, 1.0))
        last = others[-1]
        h = dense(last["DenseReluDense"]["wi"], rms(last["layer_norm"]["weight"], x))
        x = x + dense(last["DenseReluDense"]["wo"], jax.nn.relu(h))
    return rms(p["final_layer_norm"]["weight"], x)


def t5(variables, ids, targets):
    p = variables["params"]
    words = p["shared"]["embedding"]
    encoded = t5_stack(p["encoder"], ids, words)
    return t5_stack(p["decoder"], targets, words, encoded) @ words.T


def haiku_t5_stack(name, ids, words, encoded=None):
    bias = table(N, H, f"{name}/relative_bias")[buckets(T)].transpose(2, 0, 1)
    bias = bias if encoded is None else bias + causal(T)

    def layer(x):
        h = rms_norm(x, "layer/layer_norm")
        qkv = [linear(h, D, f"layer/SelfAttention/{n}", False) for n in "qkv"]
        y = attend(*qkv, H, bias, 1.0)
        x = x + linear(y, D, "layer/SelfAttention/o", False)
        last = "layer_1"
        if encoded is not None:
            last = "layer_2"
            at = "layer_1/EncDecAttention"
            q = linear(rms_norm(x, "layer_1/layer_norm"), D, f"{at}/q", False)
            kv = [linear(encoded, D, f"{at}/{n}", False) for n in "kv"]
            x = x + linear(attend(q, *kv, H, 0.0, 1.0), D, f"{at}/o", False)
        h = linear(rms_norm(x, f"{last}/layer_norm"), F, f"{last}/DenseReluDense/wi", 0)
        return x + linear(jax.nn.relu(h), D, f"{last}/DenseReluDense/wo", False)

    x = stack(layer, words[ids], f"{name}/block")
    return rms_norm(x, f"{name}/final_layer_norm")


def haiku_t5(ids, targets):
    words = table(V, D, "shared")
    encoded = haiku_t5_stack("encoder", ids, words)
    return haiku_t5_stack("decoder", targets, words, encoded) @ words.T


def t5_moved():
    found = {}
    for side, count in (("encoder", 2), ("decoder", 3)):
        old = f"{side}/block/0/layer/0/SelfAttention/relative_attention_bias/embedding"
        found[old] = f"{side}/relative_bias/embeddings", np.copy
        old, new = f"{side}/final_layer_norm/weight", f"{side}/final_layer_norm/scale"
        found[old] = new, np.copy
        for i in range(count):
            layer = f"layer_{i}" if i else "layer"
            old = f"{side}/block/*/layer/{i}"
            new = f"{side}/block/{layer}"
            found[f"{old}/layer_norm/weight"] = f"{new}/layer_norm/scale", np.copy
            for part in ("SelfAttention", "EncDecAttention"):
                for n in "qkvo":
                    found[f"{old}/{part}/{n}/kernel"] = f"{new}/{part}/{n}/w", np.copy
            for n in ("wi", "wo"):
                at = f"DenseReluDense/{n}"
                found[f"{old}/{at}/kernel"] = f"{new}/{at}/w", np.copy
    return found


# Its ViT, and vision_transformer


def patches(x, kernel, bias):
    p, size = kernel.shape[0], x.shape[1]
    x = x.reshape(x.shape[0], size // p, p, size // p, p, -1)
    y = jnp.einsum("bipjqc,pqcd->bijd", x, kernel) + bias
    return y.reshape(x.shape[0], -1, y.shape[-1])


def with_token(token, x):
    token = jnp.broadcast_to(token, (x.shape[0], 1, x.shape[2]))
    return jnp.concatenate([token, x], 1)


def vit(variables, images):
    p = variables["params"]["vit"]
    e = p["embeddings"]
    projection = e["patch_embeddings"]["projection"]
    x = patches(images, projection["kernel"], projection["bias"])
    x = with_token(e["cls_token"], x) + e["position_embeddings"]
    for block in layers_of(p["encoder"]["layer"]):
        inside = block["attention"]["attention"]
        h = norm(block["layernorm_before"], x, 1e-12)
        y = attend(*(dense(inside[n], h) for n in ("query", "key", "value")), H)
        x = x + dense(block["attention"]["output"]["dense"], y)
        h = dense(
            block["intermediate"]["dense"], norm(block["layernorm_after"], x, 1e-12)
        )
        x = x + dense(block["output"]["dense"], jax.nn.gelu(h, approximate=False))
    x = norm(p["layernorm"], x, 1e-12)
    return dense(variables["params"]["classifier"], x[:, 0])


def haiku_patches(x, path):
    y = hk.Conv2D(D, P, P, padding="VALID", name=force(path))(x)
    return y.reshape(x.shape[0], -1, D)


def haiku_vit(images):
    def layer(x):
        names = [f"attention/attention/{name}" for name in ("query", "key", "value")]
        h = layer_norm(x, "layernorm_before", 1e-12)
        y = attend(*(linear(h, D, name) for name in names), H)
        x = x + linear(y, D, "attention/output/dense")
        h = linear(layer_norm(x, "layernorm_after", 1e-12), F, "intermediate/dense")
        return x + linear(jax.nn.gelu(h, approximate=False), D, "output/dense")

    x = haiku_patches(images, "vit/embeddings/patch_embeddings/projection")
    x = with_token(parameter("vit/embeddings", "cls_token", [1, 1, D]), x)
    x = x + parameter("vit/embeddings", "position_embeddings", [1, 5, D])
    x = layer_norm(stack(layer, x, "vit/encoder/layer"), "vit/layernorm", 1e-12)
    return linear(x[:, 0], C, "classifier")


def heads_in(p, x):
    return jnp.einsum("btd,dhk->bthk", x, p["kernel"]) + p["bias"]


def vision_transformer(variables, images):
    p = variables["params"]
    x = patches(images, p["embedding"]["kernel"], p["embedding"]["bias"])
    p, whole = p["Transformer"], p
    x = with_token(whole["cls"], x) + p["posembed_input"]["pos_embedding"]
    for block in layers_of(p, "encoderblock_"):
        h = norm(block["LayerNorm_0"], x, 1e-6)
        inside = block["MultiHeadDotProductAttention_1"]
        qkv = [heads_in(inside[n], h) for n in ("query", "key", "value")]
        y = attend(*(part.reshape(*part.shape[:2], -1) for part in qkv), H)
        out = inside["out"]
        x = x + y @ out["kernel"].reshape(H * K, D) + out["bias"]
        h = dense(block["MlpBlock_3"]["Dense_0"], norm(block["LayerNorm_2"], x, 1e-6))
        x = x + dense(block["MlpBlock_3"]["Dense_1"], jax.nn.gelu(h, approximate=False))
    x = norm(p["encoder_norm"], x, 1e-6)
    return dense(whole["head"], x[:, 0])


def haiku_vision_transformer(images):
    def layer(x):
        h = layer_norm(x, "norm", 1e-6)
        init = hk.initializers.VarianceScaling()
        options = {"w_init": init, "model_size": D, "name": "attention"}
        attention = hk.MultiHeadAttention(H, K, **options)
        x = x + attention(h, h, h)
        h = linear(layer_norm(x, "norm_1", 1e-6), F, "mlp/linear")
        return x + linear(jax.nn.gelu(h, approximate=False), D, "mlp/linear_1")

    x = with_token(parameter("", "cls", [1, 1, D]), haiku_patches(images, "embedding"))
    x = x + parameter("Transformer/posembed_input", "pos_embedding", [1, 5, D])
    x = layer_norm(
        stack(layer, x, "Transformer/encoderblock"), "Transformer/encoder_norm", 1e-6
    )
    return linear(x[:, 0], C, "head")


BLOCK = "Transformer/encoderblock_*"
INSIDE = f"{BLOCK}/MultiHeadDotProductAttention_1"
VISION_MOVED = {
    **{
        f"{BLOCK}/LayerNorm_{i}/{leaf}": (f"{BLOCK[:-2]}/{new}/{to}", np.copy)
        for i, new in ((0, "norm"), (2, "norm_1"))
        for leaf, to in (("scale", "scale"), ("bias", "offset"))
    },
    **{
        f"{INSIDE}/{n}/{leaf}": (f"{BLOCK[:-2]}/attention/{n}/{to}", change)
        for n in ("query", "key", "value")
        for leaf, to, change in (
            ("kernel", "w", lambda x: x.reshape(len(x), -1)),
            ("bias", "b", np.ravel),
        )
    },
    f"{INSIDE}/out/kernel": (
        f"{BLOCK[:-2]}/attention/linear/w",
        lambda x: x.reshape(-1, x.shape[-1]),
    ),
    f"{INSIDE}/out/bias": (f"{BLOCK[:-2]}/attention/linear/b", np.copy),
    **{
        f"{BLOCK}/MlpBlock_3/Dense_{i}/{leaf}": (
            f"{BLOCK[:-2]}/mlp/{new}/{to}",
            np.copy,
        )
        for i, new in enumerate(("linear", "linear_1"))
        for leaf, to in (("kernel", "w"), ("bias", "b"))
    },
    "cls": ("/cls", np.copy),
}

# T5X, scanned


def t5x(variables, ids):
    p = variables["params"]
    x = p["token_embedder"]["embedding"][ids]
    p = p["decoder"]
    for i in range(p["layers"]["pre_mlp_layer_norm"]["scale"].shape[1]):
        block = jax.tree.map(lambda leaf: leaf[:, i], p["layers"])  # noqa: B023
        h = rms(block["pre_self_attention_layer_norm"]["scale"], x)
        inside = block["self_attention"]
        qkv = [dense(inside[n], h) for n in ("query", "key", "value")]
        bias = block["relpos_bias"]["rel_embedding"][:, buckets(T)] + causal(T)
        x = x + dense(inside["out"], attend(*qkv, H, bias, 1.0))
        h = rms(block["pre_mlp_layer_norm"]["scale"], x)
        mlp = block["mlp"]
        h = jax.nn.gelu(dense(mlp["wi_0"], h)) * dense(mlp["wi_1"], h)
        x = x + dense(mlp["wo"], h)
    return dense(p["logits_dense"], rms(p["decoder_norm"]["scale"], x))


def haiku_t5x(ids):
    def layer(x):
        h = rms_norm(x, "pre_self_attention_layer_norm")
        names = [f"self_attention/{n}" for n in ("query", "key", "value")]
        qkv = [linear(h, D, name, False) for name in names]
        bias = parameter("relpos_bias", "rel_embedding", [H, N])[:, buckets(T)]
        y = attend(*qkv, H, bias + causal(T), 1.0)
        x = x + linear(y, D, "self_attention/out", False)
        h = rms_norm(x, "pre_mlp_layer_norm")
        h = jax.nn.gelu(linear(h, F, "mlp/wi_0", False)) * linear(h, F, "mlp/wi_1", 0)
        return x + linear(h, D, "mlp/wo", False)

    x = stack(layer, table(V, D, "token_embedder")[ids], "decoder/layers")
    return linear(rms_norm(x, "decoder/decoder_norm"), V, "decoder/logits_dense", False)


def axis_one(path):
    """A scanned leaf, with layers in front."""
    return path.replace("/kernel", "/w"), lambda x: np.moveaxis(x, 1, 0)


# S4 and S5


def s4_kernel(p, length):
    """Something like it, of the same leaves, for each of `H` features `[N, H]`."""
    rate = jax.nn.sigmoid(p["Lambda_re"] - p["log_step"]) * jnp.cos(p["Lambda_im"])
    mix = (p["B"] + p["P"]) * p["C"].sum(-1)
    return jnp.einsum("tnh,nh->th", rate ** jnp.arange(length)[:, None, None], mix)


def causal_convolution(kernel, x):
    lags = jnp.arange(x.shape[1])
    lags = lags[:, None] - lags
    kernel = jnp.where(lags[..., None] >= 0, kernel[lags], 0)
    return jnp.einsum("tsh,bsh->bth", kernel, x)


def s4_layer(seq, x):
    return causal_convolution(s4_kernel(seq, x.shape[1]), x) + seq["D"] * x


def annotated_s4(variables, x):
    p = variables["params"]
    x = dense(p["encoder"], x)
    for block in layers_of(p, "layers_"):
        h = jax.nn.gelu(s4_layer(block["seq"], norm(block["norm"], x, 1e-6)))
        x = x + dense(block["out"], h) * jax.nn.sigmoid(dense(block["out2"], h))
    return dense(p["decoder"], jnp.mean(x, 1))


S4_LEAVES = {
    "Lambda_re": (N, D),
    "Lambda_im": (N, D),
    "P": (N, D),
    "B": (N, D),
    "C": (N, D, 2),
    "D": (1, D),
    "log_step": (1, D),
}


def haiku_annotated_s4(x):
    def layer(x):
        seq = {n: parameter("seq", n, shape) for n, shape in S4_LEAVES.items()}
        h = jax.nn.gelu(s4_layer(seq, layer_norm(x, "norm", 1e-6)))
        return x + linear(h, D, "out") * jax.nn.sigmoid(linear(h, D, "out2"))

    x = stack(layer, linear(x, D, "encoder"), "layers")
    return linear(jnp.mean(x, 1), C, "decoder")


S5_LEAVES = {
    "Lambda_re": (N,),
    "Lambda_im": (N,),
    "B": (N, D, 2),
    "C": (D, N, 2),
    "D": (D,),
    "log_step": (N, 1),
}


def s5_layer(seq, x):
    rate = jax.nn.sigmoid(seq["Lambda_re"] - seq["log_step"][:, 0])
    rate = rate * jnp.cos(seq["Lambda_im"])
    inputs = jnp.einsum("nh,bth->btn", seq["B"].sum(-1), x)
    powers = rate ** jnp.arange(x.shape[1])[:, None]
    states = causal_convolution(powers, inputs)
    return jnp.einsum("hn,btn->bth", seq["C"].sum(-1), states) + seq["D"] * x


def s5(variables, x):
    p = variables["params"]
    x = dense(p["encoder"]["encoder"], x)
    for block in layers_of(p["encoder"], "layers_"):
        h = jax.nn.gelu(s5_layer(block["seq"], norm(block["norm"], x, 1e-6)))
        x = x + h * jax.nn.sigmoid(dense(block["out2"], h))
    return dense(p["decoder"], jnp.mean(x, 1))


def haiku_s5(x):
    def layer(x):
        seq = {n: parameter("seq", n, shape) for n, shape in S5_LEAVES.items()}
        h = jax.nn.gelu(s5_layer(seq, layer_norm(x, "norm", 1e-6)))
        return x + h * jax.nn.sigmoid(linear(h, D, "out2"))

    x = stack(layer, linear(x, D, "encoder/encoder"), "encoder/layers")
    return linear(jnp.mean(x, 1), C, "decoder")


# Gemma, of NNX


def gemma(variables, ids):
    p = variables["params"]
    words = p["embedder"]["input_embedding"]
    x = words[ids] * D**0.5
    for block in layers_of(p["layers"]):
        h = rms(1 + block["pre_attention_norm"]["scale"], x)
        inside = block["attn"]
        q = jnp.einsum("btd,hdk->bthk", h, inside["q_einsum"]["w"])
        kv = jnp.einsum("btd,nhdk->nbthk", h, inside["kv_einsum"]["w"])
        k, v = (jnp.repeat(part, H, 2).reshape(*h.shape[:2], -1) for part in kv)
        y = attend(q.reshape(*h.shape[:2], -1), k, v, H, causal(T))
        x = x + y @ inside["attn_vec_einsum"]["w"].reshape(H * K, D)
        h = rms(1 + block["pre_ffw_norm"]["scale"], x)
        mlp = block["mlp"]
        h = jax.nn.gelu(dense(mlp["gate_proj"], h)) * dense(mlp["up_proj"], h)
        x = x + dense(mlp["down_proj"], h)
    return rms(1 + p["final_norm"]["scale"], x) @ words.T


def gemma_norm(x, path):
    return rms(1 + parameter(path, "scale", [D]), x)


def haiku_gemma(ids):
    def layer(x):
        h = gemma_norm(x, "pre_attention_norm")
        q = linear(h, H * K, "attn/q_einsum", False)
        k, v = (linear(h, K, f"attn/{n}_einsum", False) for n in "kv")
        k, v = (jnp.tile(part, H) for part in (k, v))
        x = x + linear(attend(q, k, v, H, causal(T)), D, "attn/attn_vec_einsum", False)
        h = gemma_norm(x, "pre_ffw_norm")
        up = linear(h, F, "mlp/up_proj", False)
        h = jax.nn.gelu(linear(h, F, "mlp/gate_proj", False)) * up
        return x + linear(h, D, "mlp/down_proj", False)

    words = parameter("embedder", "input_embedding", [V, D])
    x = stack(layer, words[ids] * D**0.5, "layers")
    return gemma_norm(x, "final_norm") @ words.T


def merged(x):
    """`[heads, D, K]` as a matrix `[D, heads * K]`."""
    return np.concatenate(list(x), -1)


GEMMA_MOVED = {
    "layers/*/attn/q_einsum/w": ("layers/attn/q_einsum/w", merged),
    "layers/*/attn/kv_einsum/w": [
        ("layers/attn/k_einsum/w", lambda x: merged(x[0])),
        ("layers/attn/v_einsum/w", lambda x: merged(x[1])),
    ],
    "layers/*/attn/attn_vec_einsum/w": (
        "layers/attn/attn_vec_einsum/w",
        np.concatenate,
    ),
}

# ResNet


def convolve(p, x, stride=1):
    return jax.lax.conv_general_dilated(
        x,
        p["kernel"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def batch_norm(p, s, x):
    return (x - s["mean"]) / jnp.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]


def resnet(variables, x):
    p, s = variables["params"], variables["batch_stats"]
    x = jax.nn.relu(batch_norm(p["bn_init"], s["bn_init"], convolve(p["conv_init"], x)))
    blocks = layers_of(p, "ResNetBlock_"), layers_of(s, "ResNetBlock_")
    for p_, s_ in zip(*blocks, strict=True):
        stride = 2 if "conv_proj" in p_ else 1
        h = convolve(p_["Conv_0"], x, stride)
        h = jax.nn.relu(batch_norm(p_["BatchNorm_0"], s_["BatchNorm_0"], h))
        h = batch_norm(p_["BatchNorm_1"], s_["BatchNorm_1"], convolve(p_["Conv_1"], h))
        if stride == 2:
            x = batch_norm(
                p_["norm_proj"], s_["norm_proj"], convolve(p_["conv_proj"], x, 2)
            )
        x = jax.nn.relu(x + h)
    return dense(p["Dense_0"], jnp.mean(x, (1, 2)))


def haiku_convolve(x, width, shape=3, stride=1, name=None):
    return hk.Conv2D(width, shape, stride, with_bias=False, name=name)(x)


def haiku_batch_norm(x, name=None):
    return hk.BatchNorm(True, True, 0.9, name=name)(x, is_training=hk.running_init())


def haiku_resnet(x):
    x = haiku_convolve(x, D, 3, 1, "conv_init")
    x = jax.nn.relu(haiku_batch_norm(x, "bn_init"))
    for i, width in enumerate((D, F)):
        with hk.name_scope("res_net_block"):
            stride = 2 if i else 1
            h = jax.nn.relu(haiku_batch_norm(haiku_convolve(x, width, 3, stride)))
            h = haiku_batch_norm(haiku_convolve(h, width))
            if stride == 2:
                x = haiku_convolve(x, width, 1, 2, "conv_proj")
                x = haiku_batch_norm(x, "norm_proj")
            x = jax.nn.relu(x + h)
    return hk.Linear(C)(jnp.mean(x, (1, 2)))


RESNET_LEAVES = """
conv_init/kernel 3 3 C D
bn_init/{scale,bias} D
ResNetBlock_0/{Conv_0,Conv_1}/kernel 3 3 D D
ResNetBlock_0/{BatchNorm_0,BatchNorm_1}/{scale,bias} D
ResNetBlock_1/Conv_0/kernel 3 3 D F
ResNetBlock_1/Conv_1/kernel 3 3 F F
ResNetBlock_1/{BatchNorm_0,BatchNorm_1,norm_proj}/{scale,bias} F
ResNetBlock_1/conv_proj/kernel 1 1 D F
Dense_0/kernel F C
Dense_0/bias C
batch_stats/bn_init/{mean,var} D
batch_stats/ResNetBlock_0/{BatchNorm_0,BatchNorm_1}/{mean,var} D
batch_stats/ResNetBlock_1/{BatchNorm_0,BatchNorm_1,norm_proj}/{mean,var} F
"""


def of_resnet(path):
    """A leaf in Haiku's own names."""
    new = path.removeprefix("batch_stats/")
    for old, word in {
        "ResNetBlock": "res_net_block",
        "Conv": "conv2_d",
        "BatchNorm": "batch_norm",
        "Dense": "linear",
    }.items():
        new = new.replace(old, word)
    new = new.replace("_0/", "/").replace("/kernel", "/w")
    if "linear" in path or "linear" in new:
        return new.replace("/bias", "/b"), np.copy
    is_matrix = new.endswith("/w")
    new = new.replace("/bias", "/offset")
    return new, np.copy if is_matrix else lambda x: x.reshape(1, 1, 1, -1)


# All of them

T5X_LAYERS = """
decoder/layers/{pre_self_attention_layer_norm,pre_mlp_layer_norm}/scale D L
decoder/layers/self_attention/{query,key,value,out}/kernel D L D
decoder/layers/relpos_bias/rel_embedding H L N
decoder/layers/mlp/{wi_0,wi_1}/kernel D L F
decoder/layers/mlp/wo/kernel F L D
"""

FAMILIES = {
    "GPT2": Family(
        """
        transformer/wte/embedding V D
        transformer/wpe/embedding T D
        transformer/h/*/{ln_1,ln_2}/{scale,bias} D
        transformer/h/*/attn/c_attn/kernel 3*D D
        transformer/h/*/attn/c_attn/bias 3*D
        transformer/h/*/attn/c_proj/kernel D D
        transformer/h/*/{attn,mlp}/c_proj/bias D
        transformer/h/*/mlp/c_fc/kernel F D
        transformer/h/*/mlp/c_fc/bias F
        transformer/h/*/mlp/c_proj/kernel D F
        transformer/ln_f/{scale,bias} D
        """,
        recipes.GPT2,
        gpt2,
        haiku_gpt2,
        ("ids",),
        GPT2_MOVED,
        "transformer/",
    ),
    "BERT": Family(
        """
        bert/embeddings/word_embeddings/embedding V D
        bert/embeddings/position_embeddings/embedding T D
        bert/embeddings/token_type_embeddings/embedding 2 D
        bert/embeddings/LayerNorm/{scale,bias} D
        bert/encoder/layer/*/attention/self/{query,key,value}/kernel D D
        bert/encoder/layer/*/attention/self/{query,key,value}/bias D
        bert/encoder/layer/*/attention/output/dense/kernel D D
        bert/encoder/layer/*/{attention/output,output}/dense/bias D
        bert/encoder/layer/*/{attention/output,output}/LayerNorm/{scale,bias} D
        bert/encoder/layer/*/intermediate/dense/kernel D F
        bert/encoder/layer/*/intermediate/dense/bias F
        bert/encoder/layer/*/output/dense/kernel F D
        bert/pooler/dense/kernel D D
        bert/pooler/dense/bias D
        """,
        recipes.BERT,
        bert,
        haiku_bert,
        ("ids",),
        {},
        "bert/",
    ),
    "T5": Family(
        """
        shared/embedding V D
        encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding N H
        decoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding N H
        {encoder,decoder}/block/*/layer/0/SelfAttention/{q,k,v,o}/kernel D D
        {encoder,decoder}/block/*/layer/{0,1}/layer_norm/weight D
        encoder/block/*/layer/1/DenseReluDense/wi/kernel D F
        encoder/block/*/layer/1/DenseReluDense/wo/kernel F D
        decoder/block/*/layer/1/EncDecAttention/{q,k,v,o}/kernel D D
        decoder/block/*/layer/2/layer_norm/weight D
        decoder/block/*/layer/2/DenseReluDense/wi/kernel D F
        decoder/block/*/layer/2/DenseReluDense/wo/kernel F D
        {encoder,decoder}/final_layer_norm/weight D
        """,
        recipes.T5,
        t5,
        haiku_t5,
        ("ids", "ids"),
        t5_moved(),
    ),
    "VIT": Family(
        """
        vit/embeddings/cls_token 1 1 D
        vit/embeddings/position_embeddings 1 5 D
        vit/embeddings/patch_embeddings/projection/kernel P P C D
        vit/embeddings/patch_embeddings/projection/bias D
        vit/encoder/layer/*/attention/attention/{query,key,value}/kernel D D
        vit/encoder/layer/*/attention/attention/{query,key,value}/bias D
        vit/encoder/layer/*/attention/output/dense/kernel D D
        vit/encoder/layer/*/{attention/output,output}/dense/bias D
        vit/encoder/layer/*/{layernorm_before,layernorm_after}/{scale,bias} D
        vit/encoder/layer/*/intermediate/dense/kernel D F
        vit/encoder/layer/*/intermediate/dense/bias F
        vit/encoder/layer/*/output/dense/kernel F D
        vit/layernorm/{scale,bias} D
        classifier/kernel D C
        classifier/bias C
        """,
        recipes.VIT,
        vit,
        haiku_vit,
        ("images",),
    ),
    "VISION_TRANSFORMER": Family(
        f"""
        cls 1 1 D
        embedding/kernel P P C D
        embedding/bias D
        Transformer/posembed_input/pos_embedding 1 5 D
        {BLOCK}/{{LayerNorm_0,LayerNorm_2}}/{{scale,bias}} D
        {INSIDE}/{{query,key,value}}/kernel D H K
        {INSIDE}/{{query,key,value}}/bias H K
        {INSIDE}/out/kernel H K D
        {INSIDE}/out/bias D
        {BLOCK}/MlpBlock_3/Dense_0/kernel D F
        {BLOCK}/MlpBlock_3/Dense_0/bias F
        {BLOCK}/MlpBlock_3/Dense_1/kernel F D
        {BLOCK}/MlpBlock_3/Dense_1/bias D
        Transformer/encoder_norm/{{scale,bias}} D
        head/kernel D C
        head/bias C
        """,
        recipes.VISION_TRANSFORMER,
        vision_transformer,
        haiku_vision_transformer,
        ("images",),
        VISION_MOVED,
    ),
    "T5X": Family(
        f"""
        token_embedder/embedding V D
        {T5X_LAYERS}
        decoder/decoder_norm/scale D
        decoder/logits_dense/kernel D V
        """,
        recipes.T5X,
        t5x,
        haiku_t5x,
        ("ids",),
        {path: axis_one(path) for path in paths_of(T5X_LAYERS)},
    ),
    "ANNOTATED_S4": Family(
        """
        encoder/kernel C D
        encoder/bias D
        layers_*/norm/{scale,bias} D
        layers_*/seq/{Lambda_re,Lambda_im,P,B} N D
        layers_*/seq/C N D 2
        layers_*/seq/{D,log_step} 1 D
        layers_*/{out,out2}/kernel D D
        layers_*/{out,out2}/bias D
        decoder/kernel D C
        decoder/bias C
        cache/layers_0/seq/cache_x_k N D
        """,
        recipes.ANNOTATED_S4,
        annotated_s4,
        haiku_annotated_s4,
        ("signals",),
        {"cache/layers_0/seq/cache_x_k": []},
    ),
    "S5": Family(
        """
        encoder/encoder/kernel C D
        encoder/encoder/bias D
        encoder/layers_*/norm/{scale,bias} D
        encoder/layers_*/seq/{Lambda_re,Lambda_im} N
        encoder/layers_*/seq/B N D 2
        encoder/layers_*/seq/C D N 2
        encoder/layers_*/seq/D D
        encoder/layers_*/seq/log_step N 1
        encoder/layers_*/out2/kernel D D
        encoder/layers_*/out2/bias D
        decoder/kernel D C
        decoder/bias C
        """,
        recipes.S5,
        s5,
        haiku_s5,
        ("signals",),
    ),
    "GEMMA": Family(
        """
        embedder/input_embedding V D
        layers/*/{pre_attention_norm,pre_ffw_norm}/scale D
        layers/*/attn/q_einsum/w H D K
        layers/*/attn/kv_einsum/w 2 1 D K
        layers/*/attn/attn_vec_einsum/w H K D
        layers/*/mlp/{gate_proj,up_proj}/kernel D F
        layers/*/mlp/down_proj/kernel F D
        final_norm/scale D
        """,
        recipes.GEMMA,
        gemma,
        haiku_gemma,
        ("ids",),
        GEMMA_MOVED,
    ),
    "RESNET": Family(
        RESNET_LEAVES,
        recipes.RESNET,
        resnet,
        haiku_resnet,
        ("images",),
        {path: of_resnet(path) for path in paths_of(RESNET_LEAVES)},
    ),
}


def inputs_of(family, seed=1):
    rng = np.random.default_rng(seed)
    kinds = {
        "ids": lambda: rng.integers(0, V, (B, T)).astype(np.int32),
        "images": lambda: rng.normal(size=(B, 2 * P, 2 * P, C)).astype(np.float32),
        "signals": lambda: rng.normal(size=(B, T, C)).astype(np.float32),
    }
    return [kinds[kind]() for kind in family.inputs]
