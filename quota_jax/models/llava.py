"""LLaVA-1.5: pictures of one size through CLIP and a two-layer projector."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.stable import activated
from quota_jax.config import LlavaConfig
from quota_jax.models.build import linear, module_bits, tree
from quota_jax.models.clip import VisionTower
from quota_jax.models.decoder import Decoder
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.quantization import QuantizationConfig


class Llava(VisionLanguageModel):
    """The whole model as one pytree."""

    config: Any  # LlavaConfig

    def __init__(self, params: dict, config: LlavaConfig, quantization: QuantizationConfig):
        self.config = config
        self.quantization = quantization
        self.vision = VisionTower(
            params["vision"], config.vision, module_bits(quantization, "vision")
        )
        bits = module_bits(quantization, "projector")
        projector = params["projector"]
        self.projector = tree(
            linear_1=linear(projector["linear_1"], bits),
            linear_2=linear(projector["linear_2"], bits),
        )
        self.decoder = Decoder(params["decoder"], config.text, quantization)

    def visual_features(self, pixels: Float[Array, "P 3 height width"]) -> Float[Array, "R D"]:
        """Projected visual tokens of all picture slots, flattened: ``[P * tokens_per_image,
        D]``."""
        config = self.config
        if pixels.shape[0] == 0:
            return jnp.zeros((0, config.text.hidden_size), self.dtype)
        states = self.vision(pixels, config.feature_states)
        if config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        return self.project(states)

    def project(self, states: Float[Array, "P V F"]) -> Float[Array, "R D"]:
        """Features of the vision tower -> visual tokens."""
        hidden = self.projector.linear_1(states.astype(self.dtype))
        hidden = activated(hidden, self.config.projector_hidden_act)
        hidden = self.projector.linear_2(hidden)
        return hidden.reshape(-1, hidden.shape[-1])
