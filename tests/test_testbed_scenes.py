"""Drawn scenes: determinism, and pictures that show what the metadata say."""

from __future__ import annotations

import numpy as np
import pytest

from quota_jax.errors import QuotaError
from quota_jax.testbed import SceneObject, ask, draw_scenes
from quota_jax.testbed.atlas import GLYPHS, ICON_SIZES, atlas
from quota_jax.testbed.layout import (
    IMAGE_SIZE,
    MAX_OBJECTS,
    UNIFORMS_PER_SCENE,
    Difficulty,
    Uniforms,
    sample_layout,
)
from quota_jax.testbed.renderer import (
    DETAIL,
    KIND_NONE,
    KIND_SIGN,
    PALETTE,
    patch_labels,
    render_nhwc,
)
from quota_jax.testbed.scenes import Scene
from quota_jax.testbed.vocabulary import COLORS, KINDS, SIGN_WORDS

SOLID = ("circle", "square", "heart", "triangle", "diamond", "cloud", "star", "cross")


@pytest.fixture(scope="module")
def scenes() -> tuple[Scene, ...]:
    return draw_scenes(7, 24)


def test_scenes_depend_on_seed_and_index_alone(scenes):
    again = draw_scenes(7, 5)
    for first, second in zip(scenes, again, strict=False):
        assert first.objects == second.objects
        assert first.sign == second.sign
        np.testing.assert_array_equal(first.image, second.image)
    other = draw_scenes(8, 5)
    assert all(a.objects != b.objects for a, b in zip(scenes, other, strict=False))


def test_metadata_of_a_known_scene():
    # A change here changes every published accuracy figure.
    scene = draw_scenes(5, 2)[1]
    assert [(o.color, o.kind, round(o.x), round(o.y), round(o.size)) for o in scene.objects] == [
        ("yellow", "cross", 69, 58, 70),
        ("yellow", "umbrella", 264, 275, 64),
        ("yellow", "cross", 190, 29, 35),
        ("yellow", "cross", 128, 134, 35),
    ]
    assert scene.sign is not None
    assert (scene.sign.text, round(scene.sign.x), round(scene.sign.y)) == ("lucky", 108, 243)


def test_pictures_are_uint8_rgb_and_use_the_range(scenes):
    for scene in scenes:
        assert scene.image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert scene.image.dtype == np.uint8
        assert scene.pil.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert len({scene.image.tobytes() for scene in scenes}) == len(scenes)


def test_color_at_the_centre_of_solid_objects(scenes):
    checked = 0
    for scene in scenes:
        for thing in scene.objects:
            if thing.kind not in SOLID:
                continue
            x, y = int(thing.x), int(thing.y)
            seen = scene.image[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(0) / 255
            distances = np.abs(PALETTE * 0.92 - seen).sum(1)
            assert COLORS[int(distances.argmin())] == thing.color, thing
            checked += 1
    assert checked > 20


def test_objects_leave_the_background_elsewhere():
    """Removing one object changes pixels inside its square only, and changes many there."""
    rng = np.random.default_rng(0)
    uniforms = rng.random((4, UNIFORMS_PER_SCENE), dtype=np.float32)
    layout = sample_layout(uniforms, Difficulty())
    bare = layout._replace(present=layout.present & (np.arange(MAX_OBJECTS) != 0))
    changed = (np.asarray(render_nhwc(layout)) != np.asarray(render_nhwc(bare))).any(-1)
    for scene in range(4):
        ys, xs = np.nonzero(changed[scene])
        reach = 0.72 * layout.size[scene, 0]
        assert np.abs(xs + 0.5 - layout.x[scene, 0]).max() <= reach
        assert np.abs(ys + 0.5 - layout.y[scene, 0]).max() <= reach
        assert len(xs) > 0.1 * layout.size[scene, 0] ** 2


def test_layout_statistics():
    rng = np.random.default_rng(1)
    layout = sample_layout(rng.random((2000, UNIFORMS_PER_SCENE), dtype=np.float32), Difficulty())
    assert layout.present[:, 0].all()
    assert 4.5 < layout.present.sum(1).mean() < 6.0
    assert 0.6 < layout.sign_present.mean() < 0.7
    sizes = layout.size[layout.present]
    assert sizes.min() >= 26
    assert sizes.max() <= 104.001
    for values, names in ((layout.kind, KINDS), (layout.color, COLORS)):
        share = np.bincount(values[layout.present], minlength=len(names)) / layout.present.sum()
        assert np.abs(share * len(names) - 1).max() < 0.25
    cells = np.histogram2d(
        layout.y[layout.present], layout.x[layout.present], bins=3, range=[[0, 336], [0, 336]]
    )[0]
    assert cells.max() / cells.sum() < 0.16  # uniform: .111


def test_objects_and_sign_do_not_overlap():
    rng = np.random.default_rng(2)
    layout = sample_layout(rng.random((300, UNIFORMS_PER_SCENE), dtype=np.float32), Difficulty())
    distance = np.hypot(
        layout.x[:, :, None] - layout.x[:, None], layout.y[:, :, None] - layout.y[:, None]
    )
    both = layout.present[:, :, None] & layout.present[:, None] & ~np.eye(MAX_OBJECTS, dtype=bool)
    reach = 0.58 * (layout.size[:, :, None] + layout.size[:, None])
    assert (distance >= reach - 1e-3)[both].all()
    near_sign = (np.abs(layout.x - layout.sign_x[:, None]) < 0.5 * layout.size) & (
        np.abs(layout.y - layout.sign_y[:, None]) < 0.5 * layout.size
    )
    assert not (near_sign & layout.present & layout.sign_present[:, None]).any()


def test_difficulty_bounds_are_respected():
    easy = Difficulty(1, 3, 70.0, 104.0, 34.0, 44.0)
    for scene in draw_scenes(3, 8, difficulty=easy):
        assert 1 <= len(scene.objects) <= 3
        assert all(70 <= thing.size <= 104.001 for thing in scene.objects)
        assert scene.sign is None or 34 <= scene.sign.height <= 44


def test_host_and_device_sample_the_same_scenes():
    import jax
    import jax.numpy as jnp

    uniforms = np.random.default_rng(4).random((64, UNIFORMS_PER_SCENE), dtype=np.float32)
    host = sample_layout(uniforms, Difficulty())
    device = jax.jit(lambda u: sample_layout(u, Difficulty(), jnp))(uniforms)
    for name in ("present", "kind", "color", "sign_present", "sign_glyphs"):
        np.testing.assert_array_equal(getattr(host, name), getattr(device, name), err_msg=name)
    np.testing.assert_allclose(host.x, device.x, atol=1e-3)


def test_patch_labels_match_the_metadata(scenes):
    for scene in scenes[:6]:
        kind, color, glyph = (np.asarray(x)[0] for x in patch_labels(scene.layout))
        for thing in scene.objects:
            if thing.kind in SOLID:
                patch = int(thing.y // 14) * 24 + int(thing.x // 14)
                assert kind[patch] == KINDS.index(thing.kind)
                assert color[patch] == COLORS.index(thing.color)
        assert (kind == KIND_SIGN).any() == (scene.sign is not None)
        assert set(kind) <= {KIND_NONE, KIND_SIGN} | {KINDS.index(o.kind) for o in scene.objects}
        if scene.sign is not None:
            assert {GLYPHS[g] for g in glyph[glyph >= 0]} <= set(scene.sign.text.upper())


def test_every_icon_and_letter_is_distinct():
    table = atlas()
    edge = ICON_SIZES[-1]
    icons = table.icons[table.icon_offsets[-1] :].reshape(len(KINDS), -1) / 65535
    assert icons.shape[1] == edge * edge
    for i in range(len(KINDS)):
        for j in range(i):
            assert np.abs(icons[i] - icons[j]).mean() > 0.03, (KINDS[i], KINDS[j])
    letters = table.glyphs[: table.glyph_offsets[1]].reshape(len(GLYPHS), -1) / 255.0
    gaps = np.abs(letters[:, None] - letters[None]).mean(-1) + np.eye(len(GLYPHS))
    assert gaps.min() > 0.02
    assert all(set(word.upper()) <= set(GLYPHS) for word in SIGN_WORDS)


def test_details_contrast_with_their_color():
    assert (np.abs(PALETTE - DETAIL).max(1) > 0.3).all()


def test_bad_arguments_are_named():
    with pytest.raises(QuotaError, match="-1"):
        draw_scenes(-1, 1)
    with pytest.raises(QuotaError, match="at least 0"):
        draw_scenes(0, -2)
    with pytest.raises(QuotaError, match="unknown question type 'taste'"):
        ask(draw_scenes(0, 1)[0], 0, type="taste")
    with pytest.raises(ValueError, match="uniforms wanted"):
        Uniforms(np.zeros((1, 3))).take(4)


def test_scene_object_is_a_value():
    thing = SceneObject(kind="car", color="red", x=1.0, y=2.0, size=30.0)
    assert thing == SceneObject(kind="car", color="red", x=1.0, y=2.0, size=30.0)
