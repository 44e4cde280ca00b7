"""How each family writes a conversation around a picture, as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from quota_jax.config import ModelConfig, QwenVlConfig
from quota_jax.processing.windows import rope_positions
from quota_jax.testbed.learning.processor import QWEN_ID
from quota_jax.testbed.world.conversation import compact
from quota_jax.testbed.world.vocabulary import ASSISTANT, BOS, EOS, ID, USER, VOCAB_SIZE
from quota_jax.testbed.world.words import HOLE


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dialect:
    """Ids before and right after the picture, and what stands for each id of the world's turns.

    table: int32 [VOCAB_SIZE, n], the ids written for one id; HOLE fills up.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    table: np.ndarray


def _table(changes: dict[int, tuple[int, ...]]) -> np.ndarray:
    width = max([1, *map(len, changes.values())])
    table = np.full((VOCAB_SIZE, width), HOLE, np.int32)
    table[:, 0] = np.arange(VOCAB_SIZE)
    for word, ids in changes.items():
        table[word, : len(ids)] = ids
    return table


_START, _END = QWEN_ID["<|im_start|>"], QWEN_ID["<|im_end|>"]
_DIALECTS = {
    # <s> USER: <image> question ASSISTANT: answer </s> USER: ...
    "llava": Dialect(before=(ID[BOS], ID[USER]), after=(), table=_table({})),
    # <|im_start|> user <|vision_start|> ... <|vision_end|> question <|im_end|>
    # <|im_start|> assistant answer <|im_end|> ...; line breaks are no tokens.
    "qwen2_5_vl": Dialect(
        before=(_START, ID["user"], QWEN_ID["<|vision_start|>"]),
        after=(QWEN_ID["<|vision_end|>"],),
        table=_table(
            {
                ID[USER]: (_START, ID["user"]),
                ID[ASSISTANT]: (_END, _START, ID["assistant"]),
                ID[EOS]: (_END,),
            }
        ),
    ),
}


def dialect_of(config: ModelConfig) -> Dialect:
    """The dialect of a model family."""
    return _DIALECTS[config.model_type]


def write_turns(
    dialect: Dialect, words: Any, weights: Any, length: int, xp: Any = jnp
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Turns of the world (with holes) as the text after the picture: ids [B, length] and weights.

    Both are 0 behind the end of the text; what is longer loses its end. Only answers and what ends
    them carry weights, and their first id keeps it.
    """
    words, weights = compact(words, weights, length, xp)
    width = dialect.table.shape[1]
    if width > 1:
        # Padding is the same id 0 as <pad>; both must not count as text.
        ids = xp.where((words > 0)[..., None], xp.asarray(dialect.table)[words], HOLE)
        shares = weights[..., None] * (xp.arange(width) == 0)
        ids, shares = (part.reshape(words.shape[0], -1) for part in (ids, shares))
        words, weights = compact(ids, shares, length - len(dialect.after), xp)
    after = xp.asarray(np.array(dialect.after, np.int32))
    after = xp.broadcast_to(after, (words.shape[0], len(dialect.after)))
    zeros = xp.zeros(after.shape, dtype=weights.dtype)
    return (
        xp.concatenate([after, words], axis=1).astype(np.int32),
        xp.concatenate([zeros, weights], axis=1),
    )


def visual_grid(config: ModelConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of visual tokens of a picture of ``size`` (height, width) pixels."""
    edge = config.vision.patch_size
    if isinstance(config, QwenVlConfig):
        edge *= config.vision.spatial_merge_size
    return size[0] // edge, size[1] // edge


def token_positions(config: ModelConfig, size: tuple[int, int], text_length: int) -> np.ndarray:
    """Rotary positions of a training sequence: [S], or [S, 3] with multimodal rotation."""
    rows, columns = visual_grid(config, size)
    first = len(dialect_of(config).before)
    if config.text.mrope_section is None:
        return np.arange(first + rows * columns + text_length)
    visual = np.arange(first + 1 + text_length) == first
    return rope_positions(visual, [(1, rows, columns)], [1.0])
