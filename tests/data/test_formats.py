"""Pictures that belong together by their names."""

from pathlib import Path

from ra_jax.data.formats import images_by_stem, match_stem


def folder_with(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_pictures_are_found_by_stem_sorted_and_nothing_else(tmp_path):
    folder = folder_with(tmp_path / "masks", "b.png", "a.png", "a.JPG", "a.txt", "c.d.webp")
    found = {stem: [path.name for path in paths] for stem, paths in images_by_stem(folder).items()}
    assert found == {"a": ["a.JPG", "a.png"], "b": ["b.png"], "c.d": ["c.d.webp"]}
    assert images_by_stem(tmp_path / "none") == {}


def test_the_picture_of_the_same_name_goes_before_those_of_the_stem():
    pictures = {"a": [Path("masks/a.jpg"), Path("masks/a.png")]}
    assert match_stem("a.png", pictures) == Path("masks/a.png")
    assert match_stem("photos/a.webp", pictures) == Path("masks/a.jpg")
    assert match_stem("b.png", pictures) is None
