import numpy as np
from PIL import Image

from ra_jax.reporting.contact_sheet import LINE_HEIGHT, MARGIN, captioned_sheet, contact_sheet, thumbnail


def flat(color, height=100, width=120):
    return np.full((height, width, 3), color, np.uint8)


def test_panels_of_any_size_stand_in_rows_and_columns():
    sheet = np.asarray(contact_sheet([[flat(10), flat(20, 110, 100)], [flat(30, 96, 96), flat(40)]]))
    assert sheet.shape == (110 + 100 + 3 * MARGIN, 120 + 120 + 3 * MARGIN, 3)
    top, left = 110 + 2 * MARGIN, 120 + 2 * MARGIN
    corners = [sheet[y, x, 0] for y in (MARGIN, top) for x in (MARGIN, left)]
    assert corners == [10, 20, 30, 40]
    assert (sheet[-MARGIN:] == 255).all() and (sheet[:, :MARGIN] == 255).all()


def test_tiny_panels_are_enlarged_pixel_by_pixel():
    tiny = np.zeros((24, 32, 3), np.uint8)
    tiny[0, 0] = 200
    sheet = np.asarray(contact_sheet([[tiny]]))
    assert sheet.shape == (72 + 2 * MARGIN, 96 + 2 * MARGIN, 3)
    assert (sheet[MARGIN:][:3, MARGIN:][:, :3] == 200).all() and (sheet[MARGIN + 3, MARGIN : MARGIN + 9] == 0).all()


def test_captions_stand_before_their_rows_and_titles_above():
    sheet = np.asarray(captioned_sheet([["one", "1.0"], ["two", "2.0"]], [[flat(10)], [flat(20)]], ["result"]))
    first = LINE_HEIGHT + 2 * MARGIN
    pictures = sheet.shape[1] - MARGIN - 120
    assert [sheet[y, pictures, 0] for y in (first, first + 100 + MARGIN)] == [10, 20]
    for top, left, right in ((MARGIN, pictures, None), (first, 0, pictures), (first + 100 + MARGIN, 0, pictures)):
        assert (sheet[top : top + 2 * LINE_HEIGHT if left == 0 else top + LINE_HEIGHT, left:right] < 128).any()


def test_a_long_caption_is_not_cut():
    lines = ["a name that is much longer than any picture is wide, and then goes on", *"abcdefghijk"]
    sheet = captioned_sheet([lines], [[flat(10)]], ["result"])
    assert sheet.height >= len(lines) * LINE_HEIGHT and sheet.width > 300
    last = np.asarray(sheet)[-LINE_HEIGHT - MARGIN :, : sheet.width - 130]
    assert (last < 128).any()


def test_thumbnails_are_bounded_and_never_enlarged():
    assert thumbnail(Image.new("RGB", (400, 200)), 100).shape == (50, 100, 3)
    assert thumbnail(Image.new("L", (30, 20)), 100).shape == (20, 30, 3)
