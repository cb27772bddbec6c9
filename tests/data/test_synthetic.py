"""Synthetic data sets: the scenes, the measurement of defects, the scores, and the files on disk."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ra_jax.data.records import load_records, scene_ids
from ra_jax.data.synthetic import (
    DEFECTS,
    DatasetSettings,
    Scene,
    apply_defects,
    candidate_strengths,
    defect_basis,
    draw_scenes,
    make_scene,
    measure_defects,
    quantize,
    rule_scores,
    stack_scenes,
    write_dataset,
)
from ra_jax.errors import OutputError

SETTINGS = DatasetSettings(scenes=3, size=32, mix="no_clean", seed=4, first_scene=10, candidates=3)
REWARD_WEIGHTS = np.array([0.4, 0.3, 0.3])


@pytest.fixture(scope="module", params=[32, 64])
def scene_stack(request):
    """A stack of 60 scenes of 32 or 64 px."""
    return stack_scenes(draw_scenes(seed=5, first=0, count=60, size=request.param))


def single_defect(defect, strength):
    return {name: strength * (name == defect) for name in DEFECTS}


def compute_reward(image, scene_stack):
    """Compute the total reward in [−1, 1]."""
    return (2 * rule_scores(image, scene_stack) - 1) @ REWARD_WEIGHTS


def test_a_scene_looks_the_same_at_any_size():
    for number in range(8):
        fine, coarse = (make_scene(np.random.SeedSequence((1, number)), size) for size in (128, 32))
        for name in ("source", "truth", "reference"):
            halved = getattr(fine, name).reshape(32, 4, 32, 4, 3).mean((1, 3))
            assert np.abs(halved - getattr(coarse, name)).mean() < 0.01
        assert np.abs(fine.mask.mean() - coarse.mask.mean()) < 0.02


def test_a_scene_depends_on_its_seed_and_number_alone():
    from_several, alone = draw_scenes(3, 0, 5, 32)[4], draw_scenes(3, 4, 1, 32)[0]
    assert all(np.array_equal(getattr(from_several, name), getattr(alone, name)) for name in vars(alone))
    assert not np.array_equal(from_several.truth, draw_scenes(4, 4, 1, 32)[0].truth)


def test_size_below_16_is_refused():
    with pytest.raises(ValueError, match="scene size 8: expected at least 16"):
        make_scene(np.random.SeedSequence(0), 8)


def test_the_mask_covers_the_object_and_does_not_touch_the_border():
    scene_stack = stack_scenes(draw_scenes(7, 0, 300, 32))
    area = scene_stack.mask.mean((1, 2))
    assert area.min() > 0.03 and area.max() < 0.30
    assert not (scene_stack.mask[:, [0, -1]].any() or scene_stack.mask[:, :, [0, -1]].any())
    outside = ~scene_stack.mask[..., None]
    assert np.all(scene_stack.reference[outside[..., 0]] == 1.0)
    # Outside the mask, the source differs from the truth only by the shadow, which darkens it. In more than 90 % of the
    # scenes, it darkens some pixel by more than 0.03.
    shadow = (scene_stack.truth - scene_stack.source) * outside
    assert shadow.min() >= -1e-6
    assert np.mean(shadow.max((1, 2, 3)) > 0.03) > 0.9


def test_the_reference_shows_the_object_at_its_position_in_the_source(scene_stack):
    equal_pixels = np.all(scene_stack.source == scene_stack.reference, axis=-1)
    assert np.all(equal_pixels.sum((1, 2)) > 0.15 * scene_stack.mask.sum((1, 2)))
    assert not np.any(equal_pixels & ~scene_stack.mask)


def test_pixels_with_defects_rarely_leave_the_range_from_0_to_1(scene_stack):
    assert scene_stack.truth.min() >= 0.2 and scene_stack.truth.max() <= 0.8
    strengths = np.stack([candidate_strengths("no_clean", 0, number) for number in range(60)], axis=1)
    images = apply_defects(scene_stack, strengths)
    assert np.mean((images < 0) | (images > 1)) < 1e-3


def test_each_defect_has_the_documented_region_and_form(scene_stack):
    inside = scene_stack.mask[..., None]
    basis = dict(zip(DEFECTS, np.moveaxis(defect_basis(scene_stack), 1, 0), strict=True))
    ghosted = scene_stack.truth + basis["ghost"]
    np.testing.assert_allclose(ghosted, np.where(inside, scene_stack.source, scene_stack.truth), atol=1e-6)
    assert not np.any(basis["cast"] * inside) and not np.any(basis["seam"] * ~inside)
    cast_outside = basis["cast"][~scene_stack.mask]
    np.testing.assert_allclose(cast_outside, np.broadcast_to([0.22, 0, -0.22], cast_outside.shape), rtol=1e-6)
    edge = scene_stack.mask & ~np.roll(scene_stack.mask, 1, axis=1)
    interior = scene_stack.mask & np.roll(scene_stack.mask, 4, 1) & np.roll(scene_stack.mask, -4, 1)
    assert basis["seam"][edge].mean() > 1.5 * basis["seam"][interior].mean()
    blurred, texture = (scene_stack.truth + basis["blur"]), scene_stack.truth
    assert np.all(blurred.std((1, 2)).mean(-1) < texture.std((1, 2)).mean(-1))


def test_strengths_of_mixed_defects_are_measured_with_their_sign(scene_stack):
    strengths = np.random.default_rng(0).uniform(-1, 1, (60, 4))
    np.testing.assert_allclose(
        measure_defects(apply_defects(scene_stack, strengths), scene_stack), strengths, atol=1e-3
    )


def test_strengths_can_be_measured_in_8_bit_images():
    for number, scene in enumerate(draw_scenes(5, 0, 60, 64)):
        strengths = candidate_strengths("no_clean", 5, number)
        image = quantize(apply_defects(scene, strengths)) / 255
        assert np.abs(measure_defects(image, scene) - strengths).max() < 0.03


def test_noise_changes_the_measured_strengths_only_slightly(scene_stack):
    basis = defect_basis(scene_stack).reshape(60, 4, -1).astype(np.float64)
    gram = basis @ basis.mT
    scale = np.sqrt(np.einsum("naa->na", gram))
    assert np.linalg.cond(gram / (scale[:, :, None] * scale[:, None])).max() < 6
    noisy = scene_stack.truth + np.random.default_rng(0).normal(0, 0.05, scene_stack.truth.shape)
    assert np.abs(measure_defects(noisy, scene_stack)).mean(0).max() < 0.05


def test_an_unknown_defect_is_refused():
    scene = draw_scenes(0, 0, 1, 32)[0]
    with pytest.raises(ValueError, match=r"unknown defects \['gost'\]"):
        apply_defects(scene, {"gost": 1.0})


def test_the_truth_has_scores_of_one_and_the_whole_object_has_removal_score_zero(scene_stack):
    np.testing.assert_array_equal(rule_scores(scene_stack.truth, scene_stack), np.ones((60, 3)))
    np.testing.assert_allclose(
        rule_scores(apply_defects(scene_stack, single_defect("ghost", 1)), scene_stack)[:, 0], 0, atol=1e-5
    )


def test_scores_of_ghost_and_cast_follow_the_formula(scene_stack):
    strength = 0.4
    ghost = rule_scores(apply_defects(scene_stack, single_defect("ghost", strength)), scene_stack)
    np.testing.assert_allclose(ghost, np.broadcast_to([1 - strength, 1, 1], ghost.shape), atol=1e-4)
    cast = rule_scores(apply_defects(scene_stack, single_defect("cast", strength)), scene_stack)
    background = 1 - strength * 0.22 * np.sqrt(2 / 3) / 0.2
    np.testing.assert_allclose(cast, np.broadcast_to([1, background, 1], cast.shape), atol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("defect", "score"), [("ghost", 0), ("cast", 1), ("seam", 2), ("blur", 0), ("blur", 1), ("blur", 2)]
)
def test_scores_decrease_with_the_strength_of_their_defects(scene_stack, defect, score, sign):
    scores = [
        rule_scores(apply_defects(scene_stack, single_defect(defect, sign * s)), scene_stack)[:, score]
        for s in np.linspace(0, 1, 6)
    ]
    assert np.all(np.diff(scores, axis=0) < 0)


def test_every_defect_lowers_the_reward_at_a_similar_rate(scene_stack):
    slopes = [
        (1 - compute_reward(apply_defects(scene_stack, single_defect(name, 0.6)), scene_stack)).mean() / 0.6
        for name in DEFECTS
    ]
    assert min(slopes) > 0.4 and max(slopes) < 2 * min(slopes)


def test_lowering_one_of_several_defects_raises_the_reward(scene_stack):
    rng = np.random.default_rng(1)
    strengths = rng.uniform(0.2, 1.0, (60, 4))
    slopes = []
    for number in range(4):
        weaker, stronger = strengths - 0.05 * np.eye(4)[number], strengths + 0.05 * np.eye(4)[number]
        gain = compute_reward(apply_defects(scene_stack, weaker), scene_stack) - compute_reward(
            apply_defects(scene_stack, stronger), scene_stack
        )
        assert np.mean(gain > 0) > 0.9
        slopes.append(gain.mean() / 0.1)
    assert max(slopes) < 4 * min(slopes)


def test_another_pattern_inside_the_mask_lowers_the_removal_score(scene_stack):
    rows, columns = np.indices(scene_stack.mask.shape[1:]) * 16 // scene_stack.mask.shape[1]
    chessboard = np.where((rows + columns) % 2, 0.3, -0.3)[..., None]
    removal = rule_scores(scene_stack.truth + scene_stack.mask[..., None] * chessboard, scene_stack)[:, 0]
    assert removal.max() < 0.9 and removal.mean() < 0.7


def test_stacked_scenes_give_the_same_values_as_single_scenes():
    singles = draw_scenes(2, 0, 3, 32)
    images = [apply_defects(scene, dict.fromkeys(DEFECTS, 0.5)) for scene in singles]
    scene_stack = stack_scenes(singles)
    for function in (rule_scores, measure_defects):
        expected = np.stack([function(image, scene) for image, scene in zip(images, singles, strict=True)])
        np.testing.assert_allclose(function(np.stack(images), scene_stack), expected, atol=1e-5)


def test_candidates_of_each_mix_have_the_documented_strengths():
    np.testing.assert_array_equal(candidate_strengths("one_clean", 0, 0)[1:], 0.6 * np.eye(4))
    assert not candidate_strengths("one_clean", 0, 0)[0].any()
    strengths = np.concatenate([candidate_strengths("no_clean", 0, number, 5) for number in range(500)])
    assert strengths.shape == (2500, 4) and set((strengths > 0).sum(1)) == {3, 4}
    assert strengths[strengths > 0].min() >= 0.2 and strengths.max() <= 1
    np.testing.assert_allclose(strengths.mean(0), 0.525, atol=0.03)
    with pytest.raises(ValueError, match="unknown mix 'clean'"):
        candidate_strengths("clean", 0, 0)
    with pytest.raises(ValueError, match="candidates=1: expected at least 2"):
        candidate_strengths("no_clean", 0, 0, 1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The folder of a data set that was written with `SETTINGS`."""
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    return write_dataset(folder, SETTINGS)


def read_image(folder, name):
    return np.asarray(Image.open(folder / name)) / 255


@pytest.mark.parametrize("score_format", ["dict", "tensor"])
def test_a_written_data_set_can_be_loaded_from_each_of_its_files(dataset, score_format):
    records = load_records(dataset / f"labeled_{score_format}.json", use_human_scores=True, score_format=score_format)
    assert list(scene_ids(records)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(load_records(dataset / "triplets.json")) == 3
    unscored = load_records(dataset / "unscored.json")
    assert [record.result.name for record in unscored] == [f"scene_{10 + i:05d}_{i}.png" for i in range(3)]
    assert all(record.scores is None for record in unscored)


def test_written_scores_and_strengths_match_the_written_images(dataset):
    records = json.loads((dataset / "labeled_tensor.json").read_text())
    defects = json.loads((dataset / "defects.json").read_text())
    assert defects["settings"] == {"mix": "no_clean", "seed": 4, "size": 32, "scenes": 3, "first_scene": 10}
    for record, strengths in zip(records, defects["records"], strict=True):
        name = record["src"].removeprefix("input/")
        mask = read_image(dataset, record["mask"]) > 0.5
        scene = Scene(*(read_image(dataset, f"{subfolder}/{name}") for subfolder in ("input", "gt", "ref")), mask)
        result = read_image(dataset, record["result"])
        assert strengths["result"] == record["result"]
        np.testing.assert_allclose(measure_defects(result, scene), [strengths[name] for name in DEFECTS], atol=0.04)
        np.testing.assert_allclose(rule_scores(result, scene), record["scores"], atol=1e-4)
    means = [np.mean([strengths[name] for strengths in defects["records"]]) for name in DEFECTS]
    np.testing.assert_allclose([defects["mean_strength"][name] for name in DEFECTS], means)


def test_clean_results_equal_the_truth_and_have_scores_of_one(tmp_path):
    folder = write_dataset(tmp_path / "set", DatasetSettings(scenes=2, size=32, mix="one_clean", seed=0))
    records = json.loads((folder / "labeled_dict.json").read_text())
    assert [record["result"].split("_")[-1] for record in records[:5]] == [f"{k}.png" for k in ("clean", *DEFECTS)]
    for record in records[::5]:
        assert set(record["scores"].values()) == {1.0}
        np.testing.assert_array_equal(
            read_image(folder, record["result"]), read_image(folder, record["src"].replace("input", "gt"))
        )


def test_equal_settings_write_equal_bytes_and_replace_their_own_data_set(dataset, tmp_path):
    folder = tmp_path / "set"
    for _ in range(2):
        write_dataset(folder, SETTINGS)
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 3 * (4 + 3) + 5
    assert all((folder / file).read_bytes() == (dataset / file).read_bytes() for file in files)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_other_files_and_other_data_sets_are_not_replaced(tmp_path):
    settings = DatasetSettings(scenes=1, size=32, mix="one_clean", seed=0)
    folder = write_dataset(tmp_path / "set", settings)
    with pytest.raises(OutputError, match="other settings"):
        write_dataset(folder, replace(settings, seed=1))
    (folder / "input" / "holiday.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"do not belong to the data set \(1, for example input/holiday\.png\)"):
        write_dataset(folder, settings)
    assert (folder / "input" / "holiday.png").read_bytes() == b"mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="expected a folder, found a file"):
        write_dataset(tmp_path / "file", settings)
    with pytest.raises(ValueError, match="scenes=0"):
        write_dataset(tmp_path / "none", replace(settings, scenes=0))
    with pytest.raises(ValueError, match="scene size 8"):
        write_dataset(tmp_path / "none", replace(settings, size=8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "set"]


@pytest.mark.parametrize(
    "file", ["labeled_dict.json", "triplets.json", "input/scene_00000.png", "result/scene_00000_blur.png"]
)
def test_an_edited_file_is_not_replaced(tmp_path, file):
    settings = DatasetSettings(scenes=1, size=32, mix="one_clean", seed=0)
    folder = write_dataset(tmp_path / "set", settings)
    (folder / file).write_bytes(b"mine")
    with pytest.raises(OutputError, match=f"set: {file} differs from the file that would replace it"):
        write_dataset(folder, settings)
    assert (folder / file).read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("name", ["notes", "input/more", "labeled_dict.json"])
def test_a_folder_of_the_user_is_not_deleted(tmp_path, name):
    settings = DatasetSettings(scenes=1, size=32, mix="one_clean", seed=0)
    folder = write_dataset(tmp_path / "set", settings)
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    with pytest.raises(OutputError, match=rf"do not belong to the data set \(1, for example {name}\)"):
        write_dataset(folder, settings)
    assert (folder / name).is_dir()


def test_a_deleted_file_is_written_again(dataset, tmp_path):
    folder = write_dataset(tmp_path / "set", SETTINGS)
    deleted = folder / "input/scene_00010.png"
    deleted.unlink()
    write_dataset(folder, SETTINGS)
    assert deleted.read_bytes() == (dataset / "input/scene_00010.png").read_bytes()
