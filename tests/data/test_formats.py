"""Matching of images by file name."""

from pathlib import Path

from ra_jax.data.formats import images_by_stem, match_stem


def make_folder(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_images_by_stem_lists_only_images_sorted_by_name(tmp_path):
    folder = make_folder(tmp_path / "masks", "b.png", "a.png", "a.JPG", "a.txt", "c.d.webp")
    names = {stem: [path.name for path in paths] for stem, paths in images_by_stem(folder).items()}
    assert names == {"a": ["a.JPG", "a.png"], "b": ["b.png"], "c.d": ["c.d.webp"]}
    assert images_by_stem(tmp_path / "none") == {}


def test_an_image_of_the_same_name_is_preferred_to_one_of_the_same_stem():
    images = {"a": [Path("masks/a.jpg"), Path("masks/a.png")]}
    assert match_stem("a.png", images) == Path("masks/a.png")
    assert match_stem("photos/a.webp", images) == Path("masks/a.jpg")
    assert match_stem("b.png", images) is None
