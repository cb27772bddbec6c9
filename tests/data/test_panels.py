import numpy as np
import pytest
from PIL import Image

from ra_jax.data.masks import bounding_box
from ra_jax.data.panels import PanelCache, crop_window, load_panels, nearest_bucket, resize_mask
from ra_jax.data.records import load_records


def test_nearest_bucket_has_the_nearest_logarithm_of_the_aspect_ratio():
    buckets = ((64, 64), (32, 64), (64, 32), (128, 128))
    assert nearest_bucket((100, 190), buckets) == 1
    assert nearest_bucket((190, 100), buckets) == 2
    assert nearest_bucket((70, 75), buckets) == 0
    assert nearest_bucket((500, 500), buckets) == 3  # 0 and 3 have the same ratio; 3 is nearer in area
    # The middle of the ratios 1 and 2 is √2 on the logarithmic scale, and 1.5 on the linear one.
    assert nearest_bucket((100, 145), buckets) == 1 and nearest_bucket((70, 98), buckets) == 0


def test_crop_contains_the_mask_and_has_the_buckets_shape_unless_the_mask_does_not_fit():
    rng = np.random.default_rng(0)
    whole_photos = 0
    for _ in range(500):
        size, bucket = rng.integers(20, 200, 2), rng.integers(2, 9, 2) * 16
        top, left = (int(rng.integers(0, side - 1)) for side in size)
        bottom, right = int(rng.integers(top + 1, size[0] + 1)), int(rng.integers(left + 1, size[1] + 1))
        x0, y0, x1, y1 = crop_window(tuple(size), tuple(bucket), (left, top, right, bottom))
        assert 0 <= x0 <= left and right <= x1 <= size[1]
        assert 0 <= y0 <= top and bottom <= y1 <= size[0]
        scale = min(size / bucket)
        has_bucket_shape = abs(y1 - y0 - bucket[0] * scale) <= 0.5 and abs(x1 - x0 - bucket[1] * scale) <= 0.5
        mask_does_not_fit = bottom - top > round(bucket[0] * scale) or right - left > round(bucket[1] * scale)
        assert has_bucket_shape or (mask_does_not_fit and (x0, y0, x1, y1) == (0, 0, size[1], size[0]))
        whole_photos += mask_does_not_fit
    assert 50 < whole_photos < 450


def test_crop_is_centered_on_the_mask_as_far_as_the_photo_allows():
    assert crop_window((100, 300), (64, 64), (140, 40, 160, 60)) == (100, 0, 200, 100)
    assert crop_window((100, 300), (64, 64), (0, 40, 20, 60)) == (0, 0, 100, 100)
    assert crop_window((300, 100), (64, 64), (40, 270, 60, 300)) == (0, 200, 100, 300)
    assert crop_window((100, 300), (64, 64), (20, 40, 280, 60)) == (0, 0, 300, 100)  # the mask does not fit
    assert crop_window((48, 48), (32, 32), (5, 5, 9, 9)) == (0, 0, 48, 48)


def test_a_mask_of_one_pixel_remains_after_resizing():
    rng = np.random.default_rng(0)
    for _ in range(200):
        size, panel = rng.integers(10, 700, 2), rng.integers(1, 5, 2) * 16
        mask = np.zeros(size, bool)
        y, x = (int(rng.integers(side)) for side in size)
        mask[y, x] = True
        resized = resize_mask(mask, (0, 0, int(size[1]), int(size[0])), tuple(panel))
        assert resized.shape == tuple(panel) and resized.dtype == np.uint8
        position = [(y, x)[i] + 0.5 for i in (0, 1)] * panel / size  # on the edge of two pixels, either may be set
        assert any(resized[tuple(point.astype(int))] for point in (position + 1e-6, position - 1e-6))


def test_a_mask_reduced_by_an_integer_factor_is_the_maximum_of_each_block():
    mask = np.random.default_rng(0).random((32, 48)) < 0.02
    expected = mask.reshape(8, 4, 12, 4).any((1, 3))
    np.testing.assert_array_equal(resize_mask(mask, (0, 0, 48, 32), (8, 12)), expected)
    np.testing.assert_array_equal(resize_mask(mask, (0, 0, 48, 32), (32, 48)), mask)


@pytest.fixture
def make_record(make_data_folder):
    """make_record(size, ref=None) -> a record with a photo of `size` (height, width) and the reference image `ref`."""

    def make(size, ref=None):
        data = make_data_folder(sizes=[size], results=1)
        if ref is not None:
            ref.save(data.folder / "ref.png")
            data.records[0]["ref"] = "ref.png"
        return load_records(data.write())[0]

    return make


def load_pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_images_of_the_buckets_size_stay_unchanged(make_record):
    record = make_record((24, 32))
    panels = load_panels(record, (24, 32))
    np.testing.assert_array_equal(panels.source, load_pixels(record.src))
    np.testing.assert_array_equal(panels.result, load_pixels(record.result))
    mask = np.asarray(Image.open(record.mask)) > 127
    np.testing.assert_array_equal(panels.mask, mask)
    np.testing.assert_array_equal(panels.reference, np.where(mask[..., None], panels.source, 255))


def test_source_mask_and_result_have_the_same_crop(make_record):
    record = make_record((40, 100))
    left, top, right, bottom = crop_window((40, 100), (20, 20), bounding_box(np.asarray(Image.open(record.mask))))
    panels = load_panels(record, (20, 20))
    for panel, path in ((panels.source, record.src), (panels.result, record.result)):
        window = load_pixels(path)[top:bottom, left:right].reshape(20, 2, 20, 2, 3).mean((1, 3))
        assert np.abs(panel - window).mean() < 2
    window = np.asarray(Image.open(record.mask))[top:bottom, left:right] > 127
    np.testing.assert_array_equal(panels.mask, window.reshape(20, 2, 20, 2).any((1, 3)))


def test_a_large_jpeg_is_not_shifted_by_decoding_at_reduced_size(make_data_folder):
    """Decoding at reduced size changes the coordinates. The image must still agree with the same image in PNG."""
    data = make_data_folder(sizes=[(403, 901)], results=1)
    with Image.open(data.folder / "input/s0.png") as photo:
        photo.save(data.folder / "input/s0.jpg", quality=98, subsampling=0)
    from_png = load_panels(load_records(data.write())[0], (32, 32)).source.astype(int)
    data.records[0]["src"] = "input/s0.jpg"
    from_jpeg = load_panels(load_records(data.write())[0], (32, 32)).source.astype(int)
    assert np.abs(from_jpeg - from_png).max() <= 4


def test_photo_and_mask_are_turned_upright_by_their_exif_orientation(make_data_folder):
    data = make_data_folder(sizes=[(24, 32)], results=1)
    upright = load_panels(load_records(data.write())[0], (24, 32))
    exif = Image.Exif()
    exif[0x0112] = 8
    for path in (data.folder / "input/s0.png", data.folder / "mask/s0.png"):
        with Image.open(path) as image:
            image.transpose(Image.Transpose.ROTATE_270).save(path, exif=exif)
    turned = load_panels(load_records(data.write())[0], (24, 32))
    np.testing.assert_array_equal(turned.source, upright.source)
    np.testing.assert_array_equal(turned.mask, upright.mask)


def test_reference_of_another_size_is_shown_whole_and_centered_on_white(make_record):
    panels = load_panels(make_record((24, 24), Image.new("RGB", (10, 20), "red")), (32, 32))
    expected = np.full((32, 32, 3), 255)
    expected[:, 8:24] = (255, 0, 0)
    np.testing.assert_array_equal(panels.reference, expected)


def test_reference_of_the_photos_size_is_cropped_like_the_photo(make_record):
    reference = np.full((40, 100, 3), 255, np.uint8)
    reference[13:20, 33:50] = (0, 0, 255)  # the box of the mask
    panels = load_panels(make_record((40, 100), Image.fromarray(reference)), (40, 40))
    np.testing.assert_array_equal(panels.reference[..., 0] < 128, panels.mask == 1)


def test_transparent_pixels_of_a_reference_become_white(make_record):
    cut_out = Image.new("RGBA", (24, 24), (0, 0, 0, 0))
    cut_out.paste((255, 0, 0, 255), (4, 4, 8, 8))
    reference = load_panels(make_record((24, 24), cut_out), (24, 24)).reference
    assert (reference[4:8, 4:8] == (255, 0, 0)).all() and (reference[12:] == 255).all()


def test_cache_drops_the_least_recently_used_arrays_and_returns_read_only_ones():
    cache, computed_keys = PanelCache(250), []

    def get(key):
        return cache.get(key, lambda: computed_keys.append(key) or np.zeros(100, np.uint8))

    for key in "abacab":
        get(key)
    assert "".join(computed_keys) == "abcb"  # c replaced b, the least recently used
    with pytest.raises(ValueError, match="read-only"):
        get("a")[0] = 1


def test_cached_panels_are_equal_and_their_files_are_read_once(make_record):
    record, cache = make_record((24, 32)), PanelCache(10**6)
    first = load_panels(record, (16, 16), cache)
    for path in (record.src, record.mask, record.result):
        path.unlink()
    cached = load_panels(record, (16, 16), cache)
    for name in ("source", "mask", "reference", "result"):
        np.testing.assert_array_equal(getattr(first, name), getattr(cached, name))
    with pytest.raises(FileNotFoundError):
        load_panels(record, (16, 16))
