"""Training forward pass of the small LLaVA over the project's flat parameter names.

Exactly the architecture of LLaVA-1.5, in the form that trains fast: fixed layout `<s> user: [576
visual tokens] text`, one-hot products instead of gathers (whose gradients scatter), even sequence
lengths and cuDNN attention on a GPU. The library's own forward pass serves every other purpose; a
test holds the two together.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from quota_jax.config import LlavaConfig, TextConfig, VisionConfig
from quota_jax.testbed.atlas import GLYPHS
from quota_jax.testbed.renderer import COLOR_NONE, KIND_SIGN
from quota_jax.testbed.vocabulary import BOS, ID, IMAGE, USER, VOCAB_SIZE

Params = dict[str, Any]

SMALL_LLAVA = LlavaConfig(
    vision=VisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_layers=7,
        num_heads=3,
        image_size=336,
        patch_size=14,
    ),
    text=TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_layers=12,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        rms_norm_eps=1e-5,
        max_position_embeddings=2048,
    ),
    image_token_id=ID[IMAGE],
)
"""The shipped size: 11.4 M parameters. The seventh vision layer is in the file, but never used."""

PREFIX = (ID[BOS], ID[USER])
"""Tokens before the picture."""
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
AUX_CLASSES = {"kind": KIND_SIGN + 1, "color": COLOR_NONE + 1, "glyph": len(GLYPHS)}
"""Outputs of the auxiliary patch classifiers, which exist only during training."""


def parameter_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the stacked parameters by flat name; matrices are [out, in], layers lead."""
    v, t = config.vision, config.text
    d, f, n, p = v.hidden_size, v.intermediate_size, v.num_layers, v.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "vision.class_embed": (d,),
        "vision.patch_embed.weight": (d, v.num_channels, p, p),
        "vision.position_embed.weight": (v.num_patches + 1, d),
    }
    for name in ("pre_norm", "post_norm"):
        shapes |= {f"vision.{name}.scale": (d,), f"vision.{name}.bias": (d,)}
    for name in ("norm1", "norm2"):
        shapes |= {f"vision.layers.{name}.scale": (n, d), f"vision.layers.{name}.bias": (n, d)}
    for name, rows, columns in (
        ("attn.qkv", 3 * d, d),
        ("attn.o", d, d),
        ("mlp.up", f, d),
        ("mlp.down", d, f),
    ):
        shapes |= {
            f"vision.layers.{name}.weight": (n, rows, columns),
            f"vision.layers.{name}.bias": (n, rows),
        }
    e, g, n = t.hidden_size, t.intermediate_size, t.num_layers
    heads = (t.num_heads + 2 * t.num_kv_heads) * t.head_dim
    for name, columns in (("linear_1", d), ("linear_2", e)):
        shapes |= {f"projector.{name}.weight": (e, columns), f"projector.{name}.bias": (e,)}
    return shapes | {
        "decoder.embed.weight": (t.vocab_size, e),
        "decoder.layers.norm1.scale": (n, e),
        "decoder.layers.attn.qkv.weight": (n, heads, e),
        "decoder.layers.attn.o.weight": (n, e, t.num_heads * t.head_dim),
        "decoder.layers.norm2.scale": (n, e),
        "decoder.layers.mlp.gate_up.weight": (n, 2 * g, e),
        "decoder.layers.mlp.down.weight": (n, e, g),
        "decoder.norm.scale": (e,),
        "decoder.head.weight": (t.vocab_size, e),
    }


def _position_table(config: VisionConfig) -> np.ndarray:
    """Half a 2-D sine-cosine table, [patches + 1, D]; a start the learned table can leave."""
    side = config.image_size // config.patch_size
    width = config.hidden_size // 4
    frequencies = 1.0 / 10000 ** (np.arange(width) / width)
    angles = np.arange(side)[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows = np.repeat(axis, side, axis=0)
    columns = np.tile(axis, (side, 1))
    table = np.concatenate([rows, columns], axis=1)
    return 0.5 * np.concatenate([np.zeros((1, table.shape[1])), table]).astype(np.float32)


def init_params(config: LlavaConfig, seed: int) -> Params:
    """Float32 parameters: matrices N(0, 1/fan_in), residual outputs smaller by sqrt(2 layers)."""
    rng = np.random.default_rng(seed)
    params: Params = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith(".bias"):
            value = np.zeros(shape)
        elif name.endswith(".scale"):
            value = np.ones(shape)
        elif name == "vision.position_embed.weight":
            value = _position_table(config.vision)
        elif name in ("vision.class_embed", "decoder.embed.weight"):
            value = rng.normal(size=shape) * 0.3
        else:
            fan_in = math.prod(shape[1:]) if "layers" not in name else shape[-1]
            value = rng.normal(size=shape) / math.sqrt(fan_in)
            if name.endswith(("attn.o.weight", "mlp.down.weight")):
                value = value / math.sqrt(2 * shape[0])
        params[name] = value.astype(np.float32)
    return params


def init_aux(config: LlavaConfig) -> Params:
    """Zero-initialised linear patch classifiers on the vision features."""
    d = config.vision.hidden_size
    return {
        f"aux.{name}.weight": np.zeros((n, d), np.float32) for name, n in AUX_CLASSES.items()
    } | {f"aux.{name}.bias": np.zeros((n,), np.float32) for name, n in AUX_CLASSES.items()}


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    y = x @ weight.astype(x.dtype).T
    return y if bias is None else y + bias.astype(x.dtype)


def _layer_norm(x: Any, scale: Any, bias: Any, eps: float) -> Any:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    unit = centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + eps)
    return (unit * scale + bias).astype(x.dtype)


def _rms_norm(x: Any, scale: Any, eps: float) -> Any:
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt((wide**2).mean(-1, keepdims=True) + eps) * scale).astype(x.dtype)


def _attention(q: Any, k: Any, v: Any, *, causal: bool, valid: int, backend: str) -> Any:
    """Attention over [B, S, heads, head_dim]; only the first `valid` keys count.

    On "cudnn" an odd S (which has no gradient there) is padded by one row.
    """
    length = q.shape[1]
    if backend != "cudnn":
        mask = None if causal else (jnp.arange(length) < valid)[None, None, None, :]
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=causal, implementation="xla"
        )
    if length % 2:
        pad = ((0, 0), (0, 1), (0, 0), (0, 0))
        q, k, v = (jnp.pad(x, pad) for x in (q, k, v))
    lengths: dict[str, Any] = {}
    if not causal:
        batch = q.shape[0]
        lengths = {
            "query_seq_lengths": jnp.full((batch,), q.shape[1], jnp.int32),
            "key_value_seq_lengths": jnp.full((batch,), valid, jnp.int32),
        }
    out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn", **lengths)
    return out[:, :length]


def _scan_layers(body: Any, x: Any, params: Params, prefix: str, count: int) -> Any:
    layers = {
        name.removeprefix(prefix): value[:count]
        for name, value in params.items()
        if name.startswith(prefix)
    }
    return lax.scan(lambda carry, layer: (body(carry, layer), None), x, layers)[0]


def vision_features(
    params: Params, config: LlavaConfig, images: Any, *, dtype: Any, backend: str
) -> Float[Array, "B P D"]:
    """Second-to-last hidden state of the tower without the class token.

    images: uint8 or normalised float [B, 3, H, W]; uint8 is normalised with CLIP's mean and
    deviation.
    """
    v = config.vision
    if images.dtype == jnp.uint8:
        scaled = images.astype(jnp.float32) * (1 / 255)
        images = (scaled - MEAN[:, None, None]) / STD[:, None, None]
    side, p = v.image_size // v.patch_size, v.patch_size
    batch = images.shape[0]
    patches = images.reshape(batch, 3, side, p, side, p).transpose(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch, side * side, 3 * p * p).astype(dtype)
    weight = params["vision.patch_embed.weight"].reshape(v.hidden_size, -1)
    x = _linear(patches, weight)
    first = jnp.broadcast_to(params["vision.class_embed"].astype(dtype), (batch, 1, v.hidden_size))
    x = jnp.concatenate([first, x], axis=1) + params["vision.position_embed.weight"].astype(dtype)
    length = x.shape[1]
    if length % 2:  # one padding row through all layers; its key is never seen
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))
    x = _layer_norm(
        x, params["vision.pre_norm.scale"], params["vision.pre_norm.bias"], v.layer_norm_eps
    )

    def block(x: Any, w: Params) -> Any:
        h = _layer_norm(x, w["norm1.scale"], w["norm1.bias"], v.layer_norm_eps)
        qkv = _linear(h, w["attn.qkv.weight"], w["attn.qkv.bias"])
        q, k, val = jnp.split(qkv.reshape(*h.shape[:2], 3 * v.num_heads, v.head_dim), 3, axis=2)
        h = _attention(q, k, val, causal=False, valid=length, backend=backend)
        x = x + _linear(h.reshape(x.shape), w["attn.o.weight"], w["attn.o.bias"])
        h = _layer_norm(x, w["norm2.scale"], w["norm2.bias"], v.layer_norm_eps)
        h = _linear(h, w["mlp.up.weight"], w["mlp.up.bias"])
        h = h * jax.nn.sigmoid(1.702 * h)
        return x + _linear(h, w["mlp.down.weight"], w["mlp.down.bias"])

    x = _scan_layers(block, x, params, "vision.layers.", config.feature_states[0])
    return x[:, 1:length]


def _rotary(x: Any, cos: Any, sin: Any) -> Any:
    low, high = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-high, low], axis=-1) * sin


def text_logits(
    params: Params, config: LlavaConfig, features: Any, tokens: Int[Array, "B T"], *, backend: str
) -> Float[Array, "B T vocab"]:
    """Float32 logits at the text positions (the first predicts the second text token)."""
    t, dtype = config.text, features.dtype
    h = _linear(features, params["projector.linear_1.weight"], params["projector.linear_1.bias"])
    h = jax.nn.gelu(h, approximate=False)
    visual = _linear(h, params["projector.linear_2.weight"], params["projector.linear_2.bias"])
    batch = tokens.shape[0]
    prefix = jnp.broadcast_to(jnp.array(PREFIX, tokens.dtype), (batch, len(PREFIX)))
    table = params["decoder.embed.weight"].astype(dtype)
    words = jax.nn.one_hot(jnp.concatenate([prefix, tokens], 1), t.vocab_size, dtype=dtype) @ table
    x = jnp.concatenate([words[:, : len(PREFIX)], visual, words[:, len(PREFIX) :]], axis=1)
    length = x.shape[1]
    inverse = 1.0 / t.rope_theta ** (np.arange(0, t.head_dim, 2, dtype=np.float64) / t.head_dim)
    angles = np.concatenate([np.arange(length)[:, None] * inverse] * 2, axis=1)[:, None]
    cos, sin = (jnp.asarray(f(angles), dtype=jnp.float32) for f in (np.cos, np.sin))
    sizes = np.cumsum([t.num_heads, t.num_kv_heads])

    def block(x: Any, w: Params) -> Any:
        h = _rms_norm(x, w["norm1.scale"], t.rms_norm_eps)
        qkv = _linear(h, w["attn.qkv.weight"]).reshape(batch, length, -1, t.head_dim)
        q, k, v = jnp.split(qkv, sizes, axis=2)
        q, k = (_rotary(y.astype(jnp.float32), cos, sin).astype(dtype) for y in (q, k))
        h = _attention(q, k, v, causal=True, valid=length, backend=backend)
        x = x + _linear(h.reshape(batch, length, -1), w["attn.o.weight"])
        h = _rms_norm(x, w["norm2.scale"], t.rms_norm_eps)
        gate, up = jnp.split(_linear(h, w["mlp.gate_up.weight"]), 2, axis=-1)
        return x + _linear(jax.nn.silu(gate) * up, w["mlp.down.weight"])

    x = _scan_layers(block, x, params, "decoder.layers.", t.num_layers)
    x = x[:, length - tokens.shape[1] :]
    x = _rms_norm(x, params["decoder.norm.scale"], t.rms_norm_eps)
    return _linear(x, params["decoder.head.weight"]).astype(jnp.float32)
