"""`python -m ra_jax.evaluate` on synthetic scenes, and PSNR and rewards compared with closed forms."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image

from ra_jax import evaluate
from ra_jax.data.synthetic import DatasetSettings, write_dataset
from ra_jax.evaluation.measure import Evaluation, Networks, measure_arrays
from ra_jax.evaluation.pairs import Pair
from ra_jax.inference.candidates import find_scenes, plan_candidates, write_candidates
from ra_jax.reporting.contact_sheet import LINE_HEIGHT, MARGIN

WEIGHTS = (0.4, 0.3, 0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "scored"
    return write_dataset(folder, DatasetSettings(scenes=3, size=64, mix="one_clean", seed=0))


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory):
    """Rows, summary and output folder of an evaluation of all results with ground truth."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    evaluate.main(flags(data, out))
    return rows_of(out), json.loads((out / "summary.json").read_text()), out


def flags(data, out, **more):
    given = {"results": data / "labeled_dict.json", "truth": data / "triplets.json", "output_dir": out} | more
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def rows_of(out):
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def of_kind(rows, kind, name):
    return np.array([float(row[name]) for row in rows if row["result"].endswith(f"_{kind}.png")])


def refused(argv):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(argv)
    assert isinstance(caught.value.code, str)  # Python prints it and exits with status 1
    return caught.value.code


class TestPixels:
    rng = np.random.default_rng(0)
    source, truth = rng.uniform(0.2, 0.8, (2, 24, 30, 3)).astype(np.float32)
    mask = np.zeros((24, 30), bool)
    mask[8:16, 10:20] = True

    def test_psnr_of_a_constant_error_in_each_region(self):
        error = np.where(self.mask, 0.1, 0.01)[..., None].astype(np.float32)
        values = measure_arrays(self.truth + error, self.source, self.mask, self.truth, WEIGHTS)
        assert values["psnr_mask"] == pytest.approx(20.0, abs=1e-3)
        assert values["psnr_outside"] == pytest.approx(40.0, abs=1e-3)
        inside = self.mask.mean()
        assert values["mask_area"] == pytest.approx(inside)
        whole = inside * 0.1**2 + (1.0 - inside) * 0.01**2
        assert values["psnr"] == pytest.approx(-10.0 * math.log10(whole), abs=1e-3)
        band = np.zeros_like(self.mask)  # the mask is 8 pixels high, so all of it lies within 4 pixels of its edge
        band[4:20, 6:24] = True
        inner = (self.mask & band).sum() / band.sum()
        seam = inner * 0.1**2 + (1.0 - inner) * 0.01**2
        assert values["psnr_seam"] == pytest.approx(-10.0 * math.log10(seam), abs=1e-3)

    def test_the_rewards_follow_from_psnr(self):
        error = np.where(self.mask, 0.1, 0.03)[..., None].astype(np.float32)
        values = measure_arrays(self.truth + error, self.source, self.mask, self.truth, (0.5, 0.2, 0.1))
        assert values["removal"] == pytest.approx((20.0 - 10.0) / 30.0, abs=1e-4)
        assert values["background"] == pytest.approx((-20.0 * math.log10(0.03) - 20.0) / 20.0, abs=1e-4)
        scores = np.array([values[name] for name in ("removal", "background", "smoothness")])
        assert values["total_reward"] == pytest.approx(float((2.0 * scores - 1.0) @ (0.5, 0.2, 0.1)), abs=1e-5)

    def test_equal_pictures_have_100_db(self):
        values = measure_arrays(self.truth, self.source, self.mask, self.truth, WEIGHTS)
        assert all(values[f"psnr{region}"] == 100.0 for region in ("", "_mask", "_outside", "_seam"))
        assert values["ssim"] == pytest.approx(1.0) and values["removal"] == values["background"] == 1.0

    def test_without_ground_truth(self):
        values = measure_arrays(self.source, self.source, self.mask, None, WEIGHTS)
        rewards = {"removal_without_target", "background_without_target", "smoothness", "total_reward"}
        assert set(values) == rewards | {"mask_area", "psnr_source_outside"}
        assert values["removal_without_target"] == pytest.approx(0.0, abs=1e-5)
        assert values["psnr_source_outside"] == 100.0

    def test_a_mask_without_outside_has_no_metrics_there(self):
        values = measure_arrays(self.truth, self.source, np.ones_like(self.mask), self.truth, WEIGHTS)
        absent = {name for name, value in values.items() if value is None}
        assert absent == {"psnr_outside", "ssim_outside", "psnr_seam", "ssim_seam", "psnr_source_outside"}
        assert all(math.isfinite(value) for value in values.values() if value is not None)


def test_clean_results_rank_above_defective_ones(evaluated):
    rows, _, _ = evaluated
    assert len(rows) == 15
    for name in ("total_reward", "psnr", "ssim"):
        clean = of_kind(rows, "clean", name)
        assert all((clean > of_kind(rows, kind, name)).all() for kind in ("ghost", "cast", "seam", "blur"))
    assert (of_kind(rows, "clean", "psnr") == 100.0).all()
    assert (of_kind(rows, "ghost", "removal") < of_kind(rows, "cast", "removal")).all()
    assert (of_kind(rows, "cast", "background") < of_kind(rows, "seam", "background")).all()
    assert (of_kind(rows, "seam", "smoothness") < of_kind(rows, "cast", "smoothness")).all()


def test_rows_stand_in_the_order_of_the_records(evaluated, data):
    records = json.loads((data / "labeled_dict.json").read_text())
    assert [row["result"].split("/")[-1] for row in evaluated[0]] == [r["result"].split("/")[-1] for r in records]


def test_the_summary_is_of_the_rows_and_says_what_is_missing(evaluated):
    rows, summary, _ = evaluated
    for name in ("psnr_mask", "ssim_seam", "smoothness"):
        values = np.array([float(row[name]) for row in rows])
        told = summary["metrics"][name]
        assert told["mean"] == pytest.approx(values.mean(), rel=1e-4) and told["count"] == 15
        assert told["median"] == pytest.approx(np.median(values), rel=1e-4)
    assert set(summary["not_computed"]) == {"lpips", "clip_similarity", "dino_similarity", "fid"}
    assert "--inception_weights FILE" in summary["not_computed"]["fid"]
    assert summary["pictures"] == 15 and summary["settings"]["removal_reward_weight"] == 0.4


def test_without_ground_truth_it_says_so(data, tmp_path, capsys):
    evaluate.main(flags(data, tmp_path, truth=None, only="*_ghost"))
    printed = capsys.readouterr().out
    assert "3 results without ground truth: only metrics that do not need it" in printed
    assert "psnr_mask" in printed.split("not computed:")[1] and "give --truth" in printed
    columns = rows_of(tmp_path)[0]
    assert {"removal_without_target", "smoothness", "mask_area"} < set(columns) and "psnr" not in columns
    assert columns["truth"] == ""


def test_what_infer_writes_is_measured_against_triplets(data, tmp_path):
    scenes = find_scenes(data / "triplets.json")
    candidates = plan_candidates(scenes, range(2), tmp_path / "removed")
    # The second candidate of each scene is the unchanged photo; the first fills the mask with gray.
    for _ in write_candidates(candidates, lambda photo, mask, ref, seed: photo if seed else painted(photo, mask)):
        pass
    evaluate.main(flags(data, tmp_path / "out", results=tmp_path / "removed"))
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"scene_{scene:05d}_{seed}" for scene in range(3) for seed in (0, 1)]
    assert all(row["truth"].endswith(f"gt/{row['id'][:-2]}.png") for row in rows)
    assert all(float(row["psnr_source_outside"]) == 100.0 for row in rows)
    for gray, untouched in zip(rows[::2], rows[1::2], strict=True):
        truth, mask = (np.asarray(Image.open(data / room / f"{gray['id'][:-2]}.png")) for room in ("gt", "mask"))
        error = (truth[mask > 127] / 255.0 - 128.0 / 255.0) ** 2
        assert float(gray["psnr_mask"]) == pytest.approx(-10.0 * math.log10(error.mean()), abs=1e-3)
        assert gray["psnr_outside"] == untouched["psnr_outside"]


def painted(photo, mask):
    pixels = np.asarray(photo).copy()
    pixels[mask > 127] = 128
    return Image.fromarray(pixels)


def test_the_contact_sheet_shows_the_worst_first(data, tmp_path):
    evaluate.main(flags(data, tmp_path, only="scene_00001_*", sort_by="psnr", sheet_rows=3))
    ordered = sorted(rows_of(tmp_path), key=lambda row: float(row["psnr"]))
    assert not ordered[0]["result"].endswith("clean.png")
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png"))
    top, side = LINE_HEIGHT + 2 * MARGIN, 128  # images of 64 px are enlarged by 2
    row_height = (sheet.shape[0] - top) // 3
    right = sheet.shape[1]
    lefts = [right - n * (side + MARGIN) for n in (4, 3, 2, 1)]
    files = {"src": "input/scene_00001.png", "mask": "mask/scene_00001.png", "gt": "gt/scene_00001.png"}
    for number, row in enumerate(ordered[:3]):
        at = top + number * row_height
        shown = (files["src"], files["mask"], row["result"], files["gt"])
        for left, name in zip(lefts, shown, strict=True):
            expected = np.asarray(Image.open(data / name).convert("RGB")).repeat(2, 0).repeat(2, 1)
            np.testing.assert_array_equal(sheet[at : at + side, left : left + side], expected)


def test_sizes_are_measured_one_after_the_other_and_told_in_order(tmp_path):
    pairs = []
    for number, size in enumerate([(20, 16), (24, 16), (20, 16)]):
        shade = np.full((size[1], size[0], 3), 10 * number, np.uint8)
        mask = np.zeros(shade.shape[:2], np.uint8)
        mask[4:9, 5:12] = 255
        paths = [tmp_path / f"{number}_{name}.png" for name in ("src", "mask", "result", "truth")]
        for path, pixels in zip(paths, (shade, mask, shade, np.zeros_like(shade)), strict=True):
            Image.fromarray(pixels).save(path)
        pairs.append(Pair(str(number), *paths, (size[1], size[0])))
    evaluation = Evaluation(pairs, WEIGHTS, Networks())
    assert [pair.size for pair in evaluation.measure()] == [(16, 20), (16, 20), (16, 24)]
    assert [row["id"] for row in evaluation.rows] == ["0", "1", "2"]
    expected = [100.0, -20.0 * math.log10(10 / 255), -20.0 * math.log10(20 / 255)]
    assert [row["psnr"] for row in evaluation.rows] == pytest.approx(expected, abs=1e-3)


def test_an_earlier_evaluation_is_kept_unless_told(data, tmp_path):
    earlier = json.dumps({"settings": {}, "metrics": {}})
    (tmp_path / "summary.json").write_text(earlier)
    assert "summary.json: already exists; choose another --output_dir, or add --overwrite" in refused(
        flags(data, tmp_path)
    )
    assert (tmp_path / "summary.json").read_text() == earlier
    (tmp_path / "notes.txt").write_text("kept")
    evaluate.main([*flags(data, tmp_path, only="*_seam"), "--overwrite"])
    assert json.loads((tmp_path / "summary.json").read_text())["pictures"] == 3
    evaluate.main([*flags(data, tmp_path, only="*_seam", sheet_rows=0), "--overwrite"])
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "summary.json", "notes.txt"}


@pytest.mark.torch
def test_weights_that_are_not_there_are_named(data, tmp_path):
    message = refused(flags(data, tmp_path / "out", inception_weights=tmp_path / "none.pt"))
    assert "none.pt: no such file" in message


def test_what_a_user_can_mend_is_told(data, tmp_path):
    out = tmp_path / "out"
    told = {
        "--sort_by lpips: not computed (not requested; give --lpips": {"sort_by": "lpips"},
        "--sort_by colour: not a metric of this evaluation; expected one of total_reward": {"sort_by": "colour"},
        "--sort_by psnr: not computed (no ground truth": {"sort_by": "psnr", "truth": None},
        "sheet_rows = -1: expected a value at least 0": {"sheet_rows": -1},
        "removal_reward_weight = nan: expected a finite number": {"removal_reward_weight": "nan"},
        "which is an input of --results": {"results": data, "output_dir": data},
        "is a file; expected a folder": {"output_dir": data / "triplets.json"},
        "matches none of 15 results": {"only": "*_model*"},
    }
    for message, more in told.items():
        assert message in refused(flags(data, out, **more))
    assert not out.exists()


@pytest.mark.torch
def test_networks_that_are_not_there_are_told(data, tmp_path):
    out = tmp_path / "out"
    assert "no such file" in refused(flags(data, out, inception_weights=tmp_path / "none.pt"))
    assert "--clip_model" in refused(flags(data, out, clip_model=tmp_path))
    assert not out.exists()
