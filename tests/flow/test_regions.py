"""Compares region weights and mean_Ω with loops over latent cells."""

import numpy as np
import pytest

from ra_jax.flow.regions import region_mean, region_weights
from ra_jax.models.conditioning import pack

# Masks of a right panel of 48 × 64 pixels: (top, bottom, left, right).
BOXES = {
    "one pixel": (20, 21, 30, 31),
    "the seam": (8, 20, 0, 4),
    "a corner": (40, 48, 56, 64),
    "large": (24, 44, 30, 60),
}
FACTORS = (4, 8)


def diptych_mask(box) -> np.ndarray:
    mask = np.zeros((1, 48, 128), np.float32)
    top, bottom, left, right = box
    mask[:, top:bottom, 64 + left : 64 + right] = 1
    return mask


def edited_cells(mask: np.ndarray, factor: int) -> np.ndarray:
    """Compute the edited region M: right-panel cells within two rows and columns of a cell with a masked pixel."""
    _, height, width = mask.shape
    rows, columns = height // factor, width // factor
    masked_cells = [
        (y, x)
        for y in range(rows)
        for x in range(columns)
        if mask[0, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor].any()
    ]
    edited = np.zeros((rows, columns), bool)
    for y in range(rows):
        for x in range(columns // 2, columns):
            edited[y, x] = any(abs(y - cy) <= 2 and abs(x - cx) <= 2 for cy, cx in masked_cells)
    return edited


def arrange_by_cell(weights: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Arrange weights [1, N, 4] as [rows, columns] of latents; the cells of a token are in the order (row, column)."""
    cells = np.zeros((rows, columns))
    for y in range(rows):
        for x in range(columns):
            cells[y, x] = weights[0, (y // 2) * (columns // 2) + x // 2, 2 * (y % 2) + x % 2]
    return cells


def right_panel(rows: int, columns: int) -> np.ndarray:
    return np.broadcast_to(np.arange(columns) >= columns // 2, (rows, columns))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_balanced_gives_half_of_the_weight_to_the_edited_region_and_half_to_the_rest(box, factor):
    mask = diptych_mask(box)
    edited = edited_cells(mask, factor)
    rest = right_panel(*edited.shape) & ~edited
    assert edited.any() and rest.any()
    expected = 0.5 * edited / edited.sum() + 0.5 * rest / rest.sum()
    weights = region_weights(mask, factor)
    assert weights.shape == (1, edited.size // 4, 4)
    np.testing.assert_allclose(arrange_by_cell(np.asarray(weights), *edited.shape), expected, rtol=1e-5, atol=1e-8)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("box", [(0, 48, 0, 64), (4, 44, 4, 60)], ids=["mask", "dilated mask"])
def test_an_edited_region_that_is_the_whole_photo_gets_all_of_the_weight(box):
    weights = np.asarray(region_weights(diptych_mask(box), 4))
    panel = right_panel(12, 32)
    np.testing.assert_allclose(arrange_by_cell(weights, 12, 32), panel / panel.sum(), rtol=1e-5)


@pytest.mark.parametrize("factor", FACTORS)
def test_panel_mask_and_all_give_equal_weights_to_the_cells_of_their_region(factor):
    mask = diptych_mask(BOXES["the seam"])
    edited = edited_cells(mask, factor)
    panel = right_panel(*edited.shape)
    for kind, region in {"panel": panel, "mask": edited, "all": np.ones_like(panel)}.items():
        weights = np.asarray(region_weights(mask, factor, kind))
        np.testing.assert_allclose(
            arrange_by_cell(weights, *edited.shape), region / region.sum(), rtol=1e-5, err_msg=kind
        )


def test_each_image_of_a_batch_has_its_own_region():
    masks = np.concatenate([diptych_mask(box) for box in BOXES.values()])
    together = region_weights(masks, 4)
    for i, mask in enumerate(masks):
        np.testing.assert_allclose(together[i], region_weights(mask[None], 4)[0], rtol=1e-6)


def test_region_mean_is_the_mean_over_the_regions_cells_and_all_channels():
    mask = diptych_mask(BOXES["one pixel"])
    edited = edited_cells(mask, 4)
    rest = right_panel(*edited.shape) & ~edited
    latents = np.random.default_rng(0).normal(size=(1, *edited.shape, 3)).astype(np.float32)
    expected = 0.5 * latents[0][edited].mean() + 0.5 * latents[0][rest].mean()
    mean = region_mean(pack(latents), region_weights(mask, 4))
    assert mean.shape == (1,)
    np.testing.assert_allclose(mean, expected, rtol=1e-4)


def test_the_left_panel_has_no_weight():
    mask = diptych_mask(BOXES["the seam"])
    latents = np.random.default_rng(0).normal(size=(1, 12, 32, 3)).astype(np.float32)
    other = latents.copy()
    other[:, :, :16] = 1e6
    for kind in ("balanced", "panel", "mask"):
        weights = region_weights(mask, 4, kind)
        np.testing.assert_array_equal(region_mean(pack(latents), weights), region_mean(pack(other), weights))


def test_an_unknown_region_is_refused():
    with pytest.raises(ValueError, match="loss_region='inside': expected one of balanced, panel, mask, all"):
        region_weights(diptych_mask(BOXES["large"]), 4, "inside")
