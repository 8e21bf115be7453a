"""Maps laid over images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import vitfast
from tests.vitfast._maps import reference
from vitfast.images.resize import ResizeCrop
from vitfast.maps.maps import AttentionMaps, attention_maps
from vitfast.maps.pictures import draw, overlay


def test_overlay_brightens_where_the_map_is_high() -> None:
    image = Image.new("L", (60, 40), 128)
    values = torch.zeros(4, 6)
    values[0, 0] = 3.0
    picture = np.asarray(overlay(image, values, alpha=1.0)).astype(int)
    assert picture.shape == (40, 60, 3)
    # brightest colour in the middle of the first patch, darkest far away
    assert picture[3, 3].sum() > 600
    assert picture[30, 50].sum() < 100
    untouched = np.asarray(overlay(image, values, alpha=0.0))
    assert (untouched == 128).all()


def test_overlay_shows_the_part_that_the_model_saw() -> None:
    # 36 of 40 rows, in the middle of an image twice as wide as high
    spec = vitfast.ImageSpec((36, 36), (0.5,) * 3, (0.5,) * 3, ResizeCrop((36, 36), 0.9))
    photo = Image.new("RGB", (800, 400), "black")
    photo.paste("white", (220, 20, 400, 380))
    left = np.array([[1.0, 0.0]]).repeat(2, 0)
    with pytest.raises(ValueError, match="image has 800 x 400 pixels and the map 4 x 4 patches"):
        overlay(photo, np.eye(4))
    # the whole of the white half, and nothing else, lies under the bright half of the map
    for picture in (overlay(photo, left, spec, alpha=0.0), overlay(photo, left, spec)):
        assert np.abs(np.subtract(picture.size, (360, 360))).max() <= 1
        seen = np.asarray(picture).astype(int).sum(-1)
        assert seen[:, :80].min() > seen[:, 280:].max() + 100
    pixels = vitfast.preprocess(photo, spec)[0]
    assert (np.asarray(overlay(pixels, np.eye(4), alpha=0.0)) == pixels.permute(1, 2, 0).numpy()).all()


def test_overlay_of_a_constant_map_and_of_nonsense() -> None:
    image = Image.new("RGB", (8, 8), (255, 255, 255))
    assert len(np.unique(np.asarray(overlay(image, np.full((2, 2), 7.0))).reshape(-1, 3), axis=0)) == 1
    with pytest.raises(ValueError, match="finite"):
        overlay(image, np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match=r"\[4\]"):
        overlay(image, np.zeros(4))


def test_draw_shows_the_image_every_map_and_the_rollout() -> None:
    # class token, register, 2 x 3 patches; each map is bright in one place
    layers = torch.zeros(2, 1, 2, 8, 8)
    for layer, head, patch in ((0, 0, 0), (0, 1, 5), (1, 0, 2), (1, 1, 3)):
        layers[layer, 0, head, 0, 2 + patch] = 1.0
    maps = AttentionMaps(tuple(layers), (4, 7), (2, 3), 2, True)
    flow = torch.zeros(1, 2, 3)
    flow[0, 0, 1] = 1.0
    view = Image.new("RGB", (90, 60), "blue")
    pixels = np.asarray(draw(view, maps, flow)).astype(int)
    # 224 x 149 each, in three columns
    assert pixels.shape == (2 * 175 + 6, 3 * 230 + 6, 3)
    bright = [None, (0, 0), (1, 2), (0, 2), (1, 0), (0, 1)]
    for i, patch in enumerate(bright):
        x, y = 6 + i % 3 * 230, 6 + i // 3 * 175
        assert pixels[y : y + 20, x : x + 100].min() < 128, "no label"
        panel = pixels[y + 20 : y + 169, x : x + 224]
        if patch is None:
            assert (panel == (0, 0, 255)).all()
        else:
            red = panel[..., 0].reshape(-1)
            row, column = divmod(int(red.argmax()), 224)
            assert (row * 2 // 149, column * 3 // 224) == patch
    assert np.asarray(draw(view, AttentionMaps(maps[:1], (4,), (2, 3), 2, True))).shape == (2 * 175 + 6, 2 * 230 + 6, 3)


def test_draw_takes_rows_of_the_class_token_and_models_without_one() -> None:
    view = Image.new("RGB", (60, 60), "blue")
    model, pixels = reference(), torch.randn(1, 3, 32, 32)
    whole, rows = (
        np.asarray(draw(view, attention_maps(model, pixels, rows=rows))).astype(int) for rows in ("all", "cls")
    )
    np.testing.assert_allclose(whole, rows, atol=1)
    maps = attention_maps(reference(class_token=False, global_pool="avg"), pixels)
    torch.testing.assert_close(maps.seen(maps[0]), maps[0].mean(1).reshape(1, 4, 4))
