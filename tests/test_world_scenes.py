"""World scenes: statistics and bounds of the sampler, pictures that show what metadata say."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from quota_jax.errors import QuotaError
from quota_jax.testbed.scenes import describe_scene, draw_scenes
from quota_jax.testbed.world.atlas import FONTS, GLYPHS, ICON_SIZES, atlas
from quota_jax.testbed.world.layout import (
    EASY,
    HELD_OUT,
    MAX_OBJECTS,
    Difficulty,
    Layout,
    Uniforms,
    sample_layout,
    scene_uniforms,
)
from quota_jax.testbed.world.renderer import (
    DETAILS,
    KIND_SIGN,
    PALETTES,
    patch_labels,
    render_nhwc,
)
from quota_jax.testbed.world.vocabulary import (
    COLORS,
    FIRST_LETTER,
    ID,
    KINDS,
    UNK,
    WORDS,
    build_tokenizer,
)

SOLID = ("house", "heart", "cloud", "apple", "cup", "cat")
BATCH, CHUNK = 32, 8  # benchmarks are drawn eight scenes at a time too: one program


def _layout(count: int, seed: int = 0, **options) -> Layout:
    uniforms = scene_uniforms(np.random.default_rng(seed), count)
    return sample_layout(uniforms, options.pop("difficulty", Difficulty()), **options)


def test_statistics():
    layout = _layout(4000)
    there = layout.present.sum(1)
    assert 8 < there.mean() < 10
    assert (there.min(), there.max()) == (4, 14)
    assert 1.4 < layout.sign_present.sum(1).mean() < 2.0
    sizes = layout.size[layout.present]
    assert 18 <= sizes.min() < 18.2
    assert 79 < sizes.max() <= 80
    assert 0.4 < (sizes < 38).mean() < 0.6  # log-uniform: half below the geometric mean
    letters = layout.sign_height[layout.sign_present]
    assert 10 <= letters.min() < 10.1
    share = np.bincount(layout.style, minlength=4) / 4000
    assert np.abs(share - [0.4, 0.35, 0.25, 0]).max() < 0.03
    for values, names in ((layout.kind, KINDS), (layout.color, COLORS)):
        counts = np.bincount(values[layout.present], minlength=len(names))
        assert np.abs(counts / counts.mean() - 1).max() < 0.2
    assert (layout.sign_number >= 0)[layout.sign_present].mean() == pytest.approx(0.34, abs=0.05)


@pytest.mark.parametrize("size", [(336, 336), (224, 280), (560, 392)])
def test_places(size):
    """Everything inside the picture, signs free, overlap of objects within its bound."""
    height, width = size
    layout = _layout(300, 1, size=size)
    reach = 0.53 * layout.size
    for i in range(300):
        objects = np.flatnonzero(layout.present[i])
        signs = np.flatnonzero(layout.sign_present[i])
        assert len(objects)
        assert len({layout.sign_color[i, s] for s in signs}) == len(signs)
        assert len({tuple(layout.sign_text[i, s]) for s in signs}) == len(signs)
        for n, a in enumerate(objects):
            x, y, r = layout.x[i, a], layout.y[i, a], reach[i, a]
            assert min(x, y, width - x, height - y) >= r - 1e-2
            for b in objects[:n]:
                far = np.hypot(x - layout.x[i, b], y - layout.y[i, b])
                assert layout.size[i, a] <= layout.size[i, b]
                assert r + reach[i, b] - far <= 2 * 0.28 * r + 1e-2
            for s in signs:
                half = np.array([layout.sign_length[i, s] * 0.375 + 0.35, 0.85])
                half *= layout.sign_height[i, s]
                gap = np.abs([x - layout.sign_x[i, s], y - layout.sign_y[i, s]]) - half
                assert np.hypot(*np.maximum(gap, 0)) >= r - 1e-2


def test_difficulty_and_style():
    layout = _layout(200, 2, difficulty=EASY)
    assert layout.present.sum(1).max() <= 3
    assert layout.size[layout.present].min() >= 60
    assert layout.sign_present.sum(1).max() <= 1
    plain, held_out = _layout(50, 3, style=0), _layout(50, 3, style=HELD_OUT)
    for name in ("present", "kind", "color", "x", "y", "sign_text", "sign_x"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(held_out, name))


def _draw(layout: Layout) -> np.ndarray:
    parts = [Layout(*(x[i : i + CHUNK] for x in layout)) for i in range(0, BATCH, CHUNK)]
    return np.concatenate([render_nhwc(part) for part in parts])


@pytest.fixture(scope="module")
def pictures() -> tuple[Layout, np.ndarray]:
    """A quarter of the scenes held out, the others as trained."""
    layout = _layout(BATCH, 4)
    style = np.where(np.arange(BATCH) % 4 == 3, HELD_OUT, layout.style)
    layout = layout._replace(style=style.astype(np.int32))
    return layout, _draw(layout)


def test_colors_of_solid_objects(pictures):
    layout, images = pictures
    assert images.shape == (BATCH, 336, 336, 3)
    assert images.dtype == np.uint8
    checked = 0
    for i in range(BATCH):
        for j in np.flatnonzero(layout.present[i]):
            hidden = any(
                np.hypot(layout.x[i, k] - layout.x[i, j], layout.y[i, k] - layout.y[i, j])
                < layout.size[i, k]
                for k in np.flatnonzero(layout.present[i])
                if k > j
            )
            if KINDS[layout.kind[i, j]] not in SOLID or hidden or layout.style[i] >= 2:
                continue
            x, y = int(layout.x[i, j]), int(layout.y[i, j]) + int(layout.size[i, j] * 0.05)
            seen = images[i, y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(0) / 255
            near = np.abs(PALETTES[0] * layout.tone[i, j] - seen).sum(1).argmin()
            assert near == layout.color[i, j], (i, j, seen)
            checked += 1
    assert checked > 10


def test_removed_things_leave_no_trace(pictures):
    """Without its last object and first sign a scene changes there, and nowhere else."""
    layout, images = pictures
    last = MAX_OBJECTS - 1 - np.argmax(layout.present[:, ::-1], axis=1)
    kept = layout.present & (np.arange(MAX_OBJECTS) != last[:, None])
    signs = layout.sign_present & (np.arange(4) != 0)
    bare = _draw(layout._replace(present=kept, sign_present=signs))
    changed = (images != bare).any(-1)
    for i in range(BATCH):
        ys, xs = np.nonzero(changed[i])
        half = 0.72 * layout.size[i, last[i]]
        away = np.maximum(
            np.abs(xs + 0.5 - layout.x[i, last[i]]), np.abs(ys + 0.5 - layout.y[i, last[i]])
        )
        at_sign = (
            np.hypot(xs - layout.sign_x[i, 0], ys - layout.sign_y[i, 0])
            < 4 * (layout.sign_height[i, 0])
        )
        assert ((away <= half) | (at_sign & layout.sign_present[i, 0])).all()
        assert (away <= half).sum() > 0.08 * layout.size[i, last[i]] ** 2


def test_patch_labels(pictures):
    layout, _ = pictures
    kind, color, glyph = (np.asarray(x) for x in jax.jit(patch_labels)(layout))
    assert kind.shape == (BATCH, 576)
    for i in range(BATCH):
        scene = describe_scene(layout, i)
        assert set(kind[i]) - set(range(KIND_SIGN - 1, KIND_SIGN + 1)) <= set(
            layout.kind[i][layout.present[i]]
        )
        assert (kind[i] == KIND_SIGN).any() == bool(scene.signs)
        assert {GLYPHS[g] for g in glyph[i] if g >= 0} <= set(
            "".join(s.text for s in scene.signs).upper()
        )
        for sign in scene.signs:
            patch = int(sign.y // 14) * 24 + int(sign.x // 14)
            assert (kind[i, patch], COLORS[color[i, patch]]) == (KIND_SIGN, sign.color)


def test_icons_letters_and_palettes_are_distinct():
    table = atlas()
    edge = ICON_SIZES[-1]
    icons = table.icons[table.icon_offsets[-1] :].reshape(len(KINDS), edge * edge)
    layers = np.stack([icons % 256, icons // 256 % 256], axis=-1).reshape(len(KINDS), -1) / 255
    gaps = np.abs(layers[:, None] - layers[None]).mean(-1) + np.eye(len(KINDS))
    assert gaps.min() > 0.045, [KINDS[i] for i in np.unravel_index(gaps.argmin(), gaps.shape)]
    letters = table.glyphs[: table.glyph_offsets[1]].reshape(FONTS, len(GLYPHS), -1) / 255.0
    for font in letters:
        gaps = np.abs(font[:, None] - font[None]).mean(-1) + np.eye(len(GLYPHS))
        assert gaps.min() > 0.015
    for palette in PALETTES:
        gaps = np.abs(palette[:, None] - palette[None]).sum(-1) + 9 * np.eye(len(COLORS))
        assert gaps.min() > 0.3
    assert (np.abs(PALETTES - DETAILS).max(-1) > 0.25).all()


def test_sign_texts_are_spelled():
    """No word on a sign begins with a known word, so the tokenizer spells all of them."""
    tokenizer = build_tokenizer()
    layout = _layout(3000, 5)
    texts = {
        "".join(GLYPHS[c] for c in codes if c >= 0).lower()
        for codes in layout.sign_text[layout.sign_present]
    }
    assert len(texts) > 3000
    for text in texts:
        pieces = [text[0], *("##" + letter for letter in text[1:])]
        assert tokenizer.encode(text, add_special_tokens=False).tokens == pieces
    # Every three letters, also those that sampling never met.
    known = {w[:3] for w in WORDS if len(w) > 2 and w.isalpha()}
    short = {w for w in WORDS if len(w) == 2 and w.isalpha()}
    for a, b, c in np.ndindex(26, 26, 26):
        start = "".join(chr(97 + n) for n in (FIRST_LETTER[a, b, c], b, c))
        assert start not in known
        assert start[:2] not in short


def test_tokenizer_keeps_option_letters_only():
    tokenizer = build_tokenizer()
    pieces = tokenizer.encode("Is A Answer?\nA. Red\nB. brolk 42 (C)", add_special_tokens=False)
    assert pieces.tokens[:7] == ["is", "A", "answer", "?", "A", ".", "red"]
    assert tokenizer.decode([ID["B"]]) == "B"
    assert ID[UNK] not in pieces.ids
    assert [tokenizer.id_to_token(i) for i in range(len(WORDS))] == list(WORDS)


def test_free_text():
    tokenizer = build_tokenizer()

    def pieces(text: str) -> list[str]:
        return tokenizer.encode(text, add_special_tokens=False).tokens

    assert pieces("Is there a RED Car?") == ["is", "there", "a", "red", "car", "?"]
    assert pieces("42 cars, 123") == ["4", "##2", "cars", ",", "1", "##2", "##3"]
    assert pieces("USER: <image>\nWho?") == ["user:", "<image>", "who", "?"]
    assert pieces("carpet 4x @") == ["car", "##p", "##e", "##t", "4", "x", UNK]
    assert tokenizer.encode("").ids == [ID["<s>"]]


def test_draw_scenes_is_fixed_and_checks_its_arguments():
    # A change here changes every published accuracy figure.
    first, *rest = draw_scenes(5, 3, size=(224, 448))
    assert [(o.color, o.kind) for o in first.objects][:3] == [
        ("green", "ladder"),
        ("brown", "bell"),
        ("white", "mushroom"),
    ]
    assert [s.text for s in first.signs] == ["66", "niho", "taci"]
    assert len(rest) == 2
    assert first.size == (224, 448)
    with pytest.raises(QuotaError, match="unknown style 'wild'"):
        draw_scenes(0, 1, style="wild")
    with pytest.raises(QuotaError, match="multiples of 28"):
        draw_scenes(0, 1, size=(336, 340))
    with pytest.raises(QuotaError, match="seed must be"):
        draw_scenes(-1, 1)
    with pytest.raises(ValueError, match="uniforms wanted"):
        Uniforms(np.zeros((1, 3))).take(4)
