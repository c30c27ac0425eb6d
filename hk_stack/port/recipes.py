"""Rules to port well-known families of models, as `hk_stack.flax_to_haiku` takes them.

```
params, state = hk_stack.flax_to_haiku(variables, like, **port.recipes.GPT2)
```

Each is for trees as they are published, and a Haiku model that calls its modules as
they are called there, with layers on a stack of the same name: `h/0/ln_1` is `ln_1` in
`hk_stack.layer_stack(12, name="h")`. Names of your own take a `rename` more. A recipe
is a plain dict: copy what you need of it.
"""

from typing import Any

from hk_stack.port._regroup import SAME, TRANSPOSED, split, transpose

Recipe = dict[str, Any]

# Hugging Face's Flax models

GPT2: Recipe = {
    "leaf": {
        "transformer/h/*/attn/c_attn": split("query", "key", "value", axis=0),
        "transformer/h/*/*/*/kernel": TRANSPOSED,
    }
}
"""GPT-2: fused `c_attn`; kernels stored `[out, in]`; the head is tied to `wte`.

In Haiku, `h/attn/{query,key,value}`; there is no head, as it uses `wte`.
"""

BERT: Recipe = {}
"""BERT: all names and shapes agree, with the layers on a stack `encoder/layer`."""

T5: Recipe = {
    "rename": {
        "*/block/0/layer/0/SelfAttention/relative_attention_bias": "*/relative_bias",
        "*/block/*/layer/*/layer_norm/weight": "*/block_*/layer_*/layer_norm/scale",
        "*/final_layer_norm/weight": "*/final_layer_norm/scale",
    }
}
"""T5: the first layer of a stack has a bias for all; norms have a `weight`.

In Haiku, `encoder/relative_bias` is an `hk.Embed` beside the stack `encoder/block`, in
which `layer`, `layer_1` (and in the decoder `layer_2`) are as in Flax.
"""

VIT: Recipe = {"leaf": {"vit/embeddings/patch_embeddings/projection": SAME}}
"""ViT: the convolution of patches has a name of its own."""

# Google's

VISION_TRANSFORMER: Recipe = {
    "rename": {
        "Transformer/encoderblock_*/LayerNorm_2": "Transformer/encoderblock_*/norm_1",
        "Transformer/encoderblock_*/LayerNorm_0": "Transformer/encoderblock_*/norm",
        "Transformer/encoderblock_*/MultiHeadDotProductAttention_1": (
            "Transformer/encoderblock_*/attention"
        ),
        "Transformer/encoderblock_*/MlpBlock_3": "Transformer/encoderblock_*/mlp",
    },
    "leaf": {"embedding": SAME},
}
"""vision_transformer: one count for all modules of a block; heads are an axis.

In Haiku, `Transformer/encoderblock/{norm,attention,norm_1,mlp}`, where `attention` is
an `hk.MultiHeadAttention` and `mlp` has two `hk.Linear` without names.
"""

T5X: Recipe = {"layer_axis": {"*/layers": 1}}
"""T5X and flaxformer, scanned: the layers are on axis 1, of `[D, L, F]`.

In Haiku, stacks `encoder/layers` and `decoder/layers`.
"""

GEMMA: Recipe = {
    "leaf": {
        "layers/*/attn/kv_einsum": split("k_einsum", "v_einsum", axis=0),
        "layers/*/attn/q_einsum": transpose(1, 0, 2),
        "layers/*/attn/k_einsum": transpose(0, 2, 1, 3),
        "layers/*/attn/v_einsum": transpose(0, 2, 1, 3),
        "layers/*/attn/attn_vec_einsum": transpose(0, 1, 2),
    }
}
"""Gemma in NNX: `q_einsum` is `[heads, D, K]`, `kv_einsum` `[2, heads, D, K]`.

In Haiku, `layers/attn/{q,k,v,attn_vec}_einsum` are `hk.Linear`s without bias, with
`[D, heads * K]` and `[heads * K, D]`.
"""

# State spaces, and convolutions

ANNOTATED_S4: Recipe = {
    "layer_axis": {"layers_*": ()},
    "ignore": ["cache"],
}
"""annotated-s4: `nn.vmap` puts features on axis 1, where Haiku has them as well.

In Haiku, a stack `layers` in which `seq` has the leaves of Flax, `Lambda_re` `[N, H]`.
What is cached for decoding is made anew. Ignore `prime` as well, if there is one.
"""

S5: Recipe = {"layer_axis": {"encoder/layers_*": ()}}
"""S5: leaves as they are, in a stack `encoder/layers`."""

RESNET: Recipe = {
    "leaf": {"conv_init": SAME, "ResNetBlock_*/conv_proj": SAME},
    "layer_axis": {"": ()},
}
"""ResNet of Flax's examples: convolutions with names, without biases; statistics.

In Haiku, a loop of `res_net_block`s, as their widths differ: nothing is on an axis.
"""
