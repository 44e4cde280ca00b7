"""Kept tokens, where they are in the picture that the model saw, and what is drawn."""

from __future__ import annotations

import functools
import io
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from quota_jax.config import QwenVlConfig
from quota_jax.errors import QuotaError
from quota_jax.figures.canvas import check_plots
from quota_jax.figures.kept_plot import draw_kept, faded, stage_name
from quota_jax.figures.pictures import pixel_scale, seen_pictures, token_cells
from quota_jax.figures.profile_plot import draw_profile
from quota_jax.figures.recipe_plot import draw_tokens_per_layer
from quota_jax.prune.kept import kept_tokens
from quota_jax.prune.profile import Profile, Series, Spread, propose_candidates
from quota_jax.recipe import Recipe, Selector, Stage
from tests.tiny_models import draw_picture, write_tiny_llava
from tests.tiny_params import random_model, read_tiny
from tests.tiny_qwen import write_tiny_qwen

PROMPT = "USER: <image>\nis there a red circle ? ASSISTANT:"
TWO = "USER: <image> <image>\nis there a red circle ? ASSISTANT:"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory):
    folder = write_tiny_llava(tmp_path_factory.mktemp("llava"), num_layers=2, image_size=56)
    return read_tiny(folder)


@functools.partial(jax.jit, static_argnames="recipes")
def left(model, batch, recipes):
    """What the deployed pass leaves in the end under each of some recipes."""
    made = []
    for recipe in recipes:
        x, sequence, vision = model.decoder_input(batch, recipe)
        _, last, _ = model.decoder.prefill(x, sequence, recipe, vision)
        made.append((last.source, last.is_visual))
    return made


def test_kept_tokens_are_those_of_the_deployed_pass(llava):
    config, processor = llava
    batch = processor(
        images=[[draw_picture(0)], [draw_picture(1), draw_picture(2)]], prompts=[PROMPT, TWO]
    )
    model = random_model(config, 1)
    fastv, stride = Selector(name="fastv"), Selector(name="stride")
    stages = (
        Stage(layer=0, keep=0.8, point="before_attention", selector=stride),
        Stage(layer=0, keep=0.6, selector=fastv, trim_own_cache=False),
        Stage(layer=1, keep=0.6, selector=fastv),  # drops nothing: canonicalised away
    )
    found = kept_tokens(model, batch, Recipe(num_layers=2, stages=stages))
    assert [each.stage for each in found] == [*stages[:2]]
    parts = tuple(Recipe(num_layers=2, stages=stages[:count]) for count in (1, 2))
    for each, (source, visual) in zip(found, left(model, batch, parts), strict=True):
        for row, places in enumerate(each.places):
            np.testing.assert_array_equal(places, np.asarray(source)[row][np.asarray(visual)[row]])
    # ceil(.8 n) and ceil(.6 n) of 16 and 32.
    counts = [[len(places) for places in each.places] for each in found]
    assert counts == [[13, 26], [10, 20]]
    assert kept_tokens(model, batch, Recipe.none(2)) == []


def test_llavas_grid_lies_on_the_cropped_picture(llava):
    config, processor = llava
    wide = draw_picture(3, (200, 80))
    batch = processor(images=[[draw_picture(0)], [wide]], prompts=[PROMPT, PROMPT])
    scale = pixel_scale(processor.pictures.image_processor)
    seen = seen_pictures(config, batch, *scale)
    # The shorter edge becomes 56 pixels, then 56 x 56 are cut out of the middle.
    resized = wide.resize((140, 56), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((42, 0, 98, 56)), np.float64) / 255
    np.testing.assert_allclose(seen[1], expected, atol=1e-6)

    cells, visual = token_cells(config, batch), np.asarray(batch.is_visual)
    assert (cells[~visual] == -1).all()
    for row in range(2):
        rows, columns = np.divmod(np.arange(16), 4)
        expected = np.stack([np.full(16, row), rows, columns], 1)
        np.testing.assert_array_equal(cells[row][visual[row]], expected)


def test_a_class_token_has_no_cell(tmp_path: Path):
    folder = write_tiny_llava(tmp_path, image_size=30, vision_feature_select_strategy="full")
    config, processor = read_tiny(folder)
    batch = processor(images=[[draw_picture(0)]], prompts=[PROMPT])
    cells = token_cells(config, batch)[0][np.asarray(batch.is_visual)[0]]
    assert cells.tolist() == [[0, -1, -1], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    # 30 pixels hold two patches of 14: two rows and columns of pixels are not seen.
    (seen,) = seen_pictures(config, batch, *pixel_scale(processor.pictures.image_processor))
    assert seen.shape == (28, 28, 3)


def test_qwens_cells_lie_on_pictures_of_any_size(tmp_path: Path):
    config, processor = read_tiny(write_tiny_qwen(tmp_path))
    assert isinstance(config, QwenVlConfig)
    pictures = [draw_picture(1, (230, 90)), draw_picture(2, (64, 150))]
    prompts = ["a <|image_pad|> b <|image_pad|> c"]
    batch = processor(images=[pictures], prompts=prompts)
    seen = seen_pictures(config, batch, *pixel_scale(processor.pictures.image_processor))
    for picture, found in zip(pictures, seen, strict=True):
        resized = picture.resize((found.shape[1], found.shape[0]), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(found, np.asarray(resized, np.float64) / 255, atol=1e-6)

    # Rotary positions tell rows and columns too, from each picture's first token on.
    cells, visual = token_cells(config, batch)[0], np.asarray(batch.is_visual)[0]
    positions = np.asarray(batch.positions)[0]
    edge = config.vision.patch_size * config.vision.spatial_merge_size
    for slot, picture in enumerate(seen):
        here = visual & (cells[:, 0] == slot)
        expected = positions[here][:, 1:] - positions[here][:, 1:].min(0)
        np.testing.assert_array_equal(cells[here, 1:], expected)
        assert here.sum() == picture.shape[0] * picture.shape[1] // edge**2


def test_dropped_tokens_fade_and_kept_ones_do_not():
    picture = np.random.default_rng(0).random((4, 6, 3))
    kept = np.array([[True, False, False], [False, False, True]])
    found = faded(picture, kept)
    np.testing.assert_array_equal(found[:2, :2], picture[:2, :2])
    np.testing.assert_array_equal(found[2:, 4:], picture[2:, 4:])
    dropped = found[:2, 2:]
    np.testing.assert_array_equal(dropped, dropped[..., :1].repeat(3, -1))
    assert (dropped > 0.79).all()


def spread(low: float) -> Spread:
    rows = [tuple(low + step + 0.01 * layer for layer in range(8)) for step in (0, 0.05, 0.1)]
    return Spread(lower=rows[0], median=rows[1], upper=rows[2])


def test_figures_are_pictures_and_equal_each_time(tmp_path: Path):
    one, two = (
        Series(concentration=spread(x), share=spread(x), redundancy=spread(x)) for x in (0.1, 0.3)
    )
    profile = Profile(
        series={"full_precision": one, "quantized": two},
        candidates=propose_candidates(one.concentration.median, one.redundancy.median),
        provenance={},
    )
    recipe = Recipe.uniform(num_layers=8, layers=(2, 3), keep=0.3)
    cells = np.array([[-1, -1, -1], *([0, r, c] for r in range(2) for c in range(3))])
    stages = [("layer 2", np.array([1, 4])), ("layer 3", np.array([4]))]
    picture = np.random.default_rng(1).random((28, 42, 3))
    drawings = {
        "profile": lambda path: draw_profile(profile, path),
        "one": lambda path: draw_tokens_per_layer({"": (recipe, [9] * 8)}, 9, path, "tokens"),
        "kept": lambda path: draw_kept([picture], cells, stages, path, "Is it? " * 40),
    }
    for name, draw in drawings.items():
        files = []
        for suffix in ("png", "png", "svg"):
            path = tmp_path / f"{name}.{suffix}"
            draw(path)
            files.append(path.read_bytes())
        assert files[0] == files[1]
        image = Image.open(io.BytesIO(files[0]))
        image.load()
        assert min(image.size) > 300
        assert files[2].startswith(b"<?xml")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png"] * 3 + [".svg"] * 3


def test_stages_are_named_by_where_they_stand():
    stride = Selector(name="stride")
    points = ("input", "before_attention", "after_attention")
    stages = [Stage(layer=3 * (p != "input"), keep=0.5, point=p, selector=stride) for p in points]
    assert [stage_name(stage) for stage in stages] == ["input", "before 3", "layer 3"]


def test_figures_need_matplotlib_and_a_known_ending(tmp_path: Path, monkeypatch):
    check_plots(tmp_path / "a.PDF")
    with pytest.raises(QuotaError, match=r"a\.gif: figures are written as \.png"):
        check_plots(tmp_path / "a.gif")
    with pytest.raises(QuotaError, match="no such folder"):
        check_plots(tmp_path / "nowhere" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(QuotaError, match=r"pip install 'quota-jax\[plots\]'"):
        check_plots(tmp_path / "a.png")
