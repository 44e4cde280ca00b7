"""Qwen2.5-VL: pictures of any size through a window-attention tower and a patch merger."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.stable import activated
from quota_jax.batch import Patches
from quota_jax.config import QwenVlConfig
from quota_jax.models.build import linear, module_bits, norm, tree
from quota_jax.models.decoder import Decoder
from quota_jax.models.qwen_vision import QwenVisionTower
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.quantization import QuantizationConfig


class QwenVl(VisionLanguageModel):
    """The whole model as one pytree. The merger is the module "projector" of other models."""

    config: Any  # QwenVlConfig

    def __init__(self, params: dict, config: QwenVlConfig, quantization: QuantizationConfig):
        self.config = config
        self.quantization = quantization
        self.vision = QwenVisionTower(
            params["vision"], config.vision, module_bits(quantization, "vision")
        )
        bits = module_bits(quantization, "projector")
        merger = params["projector"]
        self.projector = tree(
            norm=norm(merger["norm"], config.vision.norm_eps),
            linear_1=linear(merger["linear_1"], bits),
            linear_2=linear(merger["linear_2"], bits),
        )
        self.decoder = Decoder(params["decoder"], config.text, quantization)

    def visual_features(self, pixels: Patches) -> Float[Array, "R D"]:
        """Visual tokens of all picture slots, flattened ``[P * N / merge_unit, D]``.

        Inside a slot they stand in the order of its patches (attention windows); the rows of a
        batch's ``visual_index`` take that into account.
        """
        config = self.config
        if pixels.values.size == 0:
            return jnp.zeros((0, config.text.hidden_size), self.dtype)
        return self.project(self.vision(pixels))

    def project(self, states: Float[Array, "P N D"]) -> Float[Array, "R text"]:
        """States of the vision tower -> visual tokens, one for ``merge_unit`` neighbours."""
        x = self.projector.norm(states.astype(self.dtype))
        x = x.reshape(-1, self.config.vision.merge_unit * x.shape[-1])
        return self.projector.linear_2(activated(self.projector.linear_1(x), "gelu"))
