"""Generate synthetic data sets: scenes with exact ground truth, and candidate results with known defects and scores.

A candidate is the ground truth plus a linear combination of four defects B_d with strengths s_d. The signed strength of
each defect can be measured in any image of the scene, also in a generated image, by least squares:

    candidate = truth + Σ_d s_d · B_d        ŝ = argmin_s ‖image − truth − Σ_d s_d · B_d‖²

A fixed rule (`rule_scores`) scores the candidates. Functions with a parameter `scene` accept one scene or a stack of
scenes (`stack_scenes`). The leading axes of images and scenes broadcast.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ra_jax.data.scenes import Scene, check_size, draw_scenes, make_scene, stack_scenes
from ra_jax.data.scores import SCORE_NAMES
from ra_jax.errors import OutputError
from ra_jax.outputs import replace_folder

__all__ = [
    "DEFECTS",
    "MIXES",
    "DatasetSettings",
    "Scene",
    "apply_defects",
    "candidate_strengths",
    "defect_basis",
    "draw_scenes",
    "make_scene",
    "measure_defects",
    "quantize",
    "rule_scores",
    "stack_scenes",
    "write_dataset",
]

DEFECTS = ("ghost", "cast", "seam", "blur")
MIXES = ("one_clean", "no_clean")
SCENE_FOLDERS = ("input", "mask", "gt", "ref")  # one image per scene in each
RESULT_FOLDER = "result"
JSON_FILES = ("labeled_dict.json", "labeled_tensor.json", "triplets.json", "unscored.json", "defects.json")

# A warm tint. Its mean over the channels is 0, so a cast changes only the color. A seam changes only the brightness.
CAST_TINT = np.array([0.22, 0.0, -0.22], np.float32)
SEAM_BRIGHTNESS = 0.25
# Widths are fractions of the image side.
EDGE_WIDTH = 0.05  # σ of the Gaussian that softens the mask
BLUR_WIDTH = 0.09  # σ of the defect "blur", about a third of the texture period, so that textures vanish

ONE_CLEAN_STRENGTH = 0.6
NO_CLEAN_STRENGTH_RANGE = (0.2, 1.0)
NO_CLEAN_DEFECT_COUNTS = (3, 4)

_IMAGE_AXES = (-3, -2, -1)  # axes of rows, columns and channels of an image


@lru_cache(maxsize=32)
def _gaussian_matrix(size: int, sigma: float) -> np.ndarray:
    """Return the [size, size] matrix of a Gaussian blur with σ = `sigma` pixels; every row is scaled to sum to 1."""
    positions = np.arange(size)
    kernel = np.exp(-0.5 * ((positions[:, None] - positions) / sigma) ** 2)
    return (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)


def _smooth(image: np.ndarray, width: float) -> np.ndarray:
    """Blur square images [..., h, h, c] by a Gaussian with σ = `width` · h pixels."""
    kernel = _gaussian_matrix(image.shape[-2], width * image.shape[-2])
    rows = kernel @ image.reshape(*image.shape[:-2], -1)
    return kernel @ rows.reshape(image.shape)


def _soft_mask(scene: Scene) -> np.ndarray:
    """Return the softened mask [..., h, w, 1]. It is ½ at the edge of the mask, and tends to 1 inside and 0 outside."""
    return _smooth(scene.mask[..., None].astype(np.float32), EDGE_WIDTH)


def defect_basis(scene: Scene) -> np.ndarray:
    """Return the four defects at strength 1, [..., 4, h, w, 3] float32 in the order of `DEFECTS`.

    m is the mask, and g is the softened mask (½ at its edge):

        ghost  m · (source − truth)                   the object, and the part of its shadow inside the mask
        cast   (1 − m) · (0.22, 0, −0.22)             warmer colors outside the mask
        seam   m · 0.25 · min(1, 2(1 − g))            a bright rim along the edge of the mask, inside the mask
        blur   min(1, 2g) · (blurred truth − truth)   loss of texture inside the mask and just around the mask
    """
    inside = scene.mask[..., None].astype(np.float32)
    soft = _soft_mask(scene)
    ghost = inside * (scene.source - scene.truth)
    cast = (1 - inside) * CAST_TINT
    seam = np.broadcast_to(inside * SEAM_BRIGHTNESS * np.minimum(1, 2 * (1 - soft)), ghost.shape)
    blur = np.minimum(1, 2 * soft) * (_smooth(scene.truth, BLUR_WIDTH) - scene.truth)
    return np.stack([ghost, cast, seam, blur], axis=-4).astype(np.float32)


def apply_defects(scene: Scene, strengths: Mapping[str, float] | np.ndarray) -> np.ndarray:
    """Add defects to the ground truth; returns [..., h, w, 3] float32, not clipped.

    Args:
        scene: scene or stack of scenes.
        strengths: signed strengths, by defect name or as an array [..., 4] in the order of `DEFECTS`. Defects that are
            not named have strength 0.

    Raises:
        ValueError: a name is not in `DEFECTS`.
    """
    if isinstance(strengths, Mapping):
        if unknown := sorted(set(strengths) - set(DEFECTS)):
            raise ValueError(f"unknown defects {unknown}: expected some of {DEFECTS}")
        strengths = np.array([strengths.get(name, 0.0) for name in DEFECTS])
    strengths = np.asarray(strengths, np.float32)
    return scene.truth + np.einsum("...d,...dhwc->...hwc", strengths, defect_basis(scene))


def measure_defects(image: np.ndarray, scene: Scene) -> np.ndarray:
    """Measure the signed defect strengths [..., 4] (float64) in images [..., h, w, 3] by joint least squares."""
    error = np.asarray(image, np.float64) - scene.truth
    basis = defect_basis(scene).astype(np.float64)
    basis = basis.reshape(*basis.shape[:-3], -1)
    projection = basis @ error.reshape(*error.shape[:-3], -1, 1)
    return np.linalg.solve(basis @ basis.mT, projection)[..., 0]


def quantize(image: np.ndarray) -> np.ndarray:
    """Convert [0, 1] to uint8 by clipping and rounding."""
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _mean(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the weighted mean over pixels and channels of [..., h, w, c], with weights [..., h, w, 1]."""
    return (weight * values).sum(_IMAGE_AXES) / (weight.sum(_IMAGE_AXES) * values.shape[-1])


def _pixel_pairs(plane: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of all pairs of pixels that are `distance` apart in a row or column of [..., h, w].

    The result is two arrays [..., P], one with the first pixel of each pair and one with the second.
    """
    flat = (*plane.shape[:-2], -1)
    near = plane[..., :-distance, :].reshape(flat), plane[..., :-distance].reshape(flat)
    far = plane[..., distance:, :].reshape(flat), plane[..., distance:].reshape(flat)
    return np.concatenate(near, axis=-1), np.concatenate(far, axis=-1)


def rule_scores(image: np.ndarray, scene: Scene) -> np.ndarray:
    """Score candidates: images [..., h, w, 3] in [0, 1] -> (removal, background, smoothness) [..., 3] in [0, 1].

    The scores depend on the candidate p, the ground truth y, the source and the mask. Let e = p − y and o = source − y.
    Let g be the softened mask. In sums over "core", each mask pixel has the weight max(0, 2g − 1), which grows with its
    distance from the edge of the mask.

        removal     (1 − |α|) · (1 − ½ RMS_core(r) / RMS_core(o))
                    with α = ⟨e, o⟩_core / ⟨o, o⟩_core; r = e − α·o inside the mask and r = e outside.
                    The first factor decreases if part of the object is left. The second factor decreases if something
                    else replaces the object.
        background  1 − RMS_outside(e) / 0.2
        smoothness  (1 − RMS_across(Δr) / 0.3) · (1 − ½ |⟨Δr, Δy⟩_within / ⟨Δy, Δy⟩_within|)
                    The first factor decreases if there is a step at the edge of the mask. The second factor decreases
                    if texture inside the mask is lost or exaggerated. Δ is the difference in brightness between two
                    pixels at a distance of 1/16 of the image side. "across" is all pairs with one pixel inside the
                    mask, "within" is all pairs with both pixels inside the mask.

    Each factor, and the background score, is set to 0 if it is negative.

    The ground truth has the scores (1, 1, 1). A candidate that equals the source inside the mask has a removal score
    of 0. Each defect lowers one score as its |strength| grows from 0 to 1. Ghost lowers the removal score, cast lowers
    the background score, and seam and blur lower the smoothness score. Seam and blur also lower the removal score
    slightly.
    """
    inside = scene.mask[..., None].astype(np.float64)
    core = inside * np.clip(2 * _soft_mask(scene) - 1, 0, None)
    error = np.asarray(image, np.float64) - scene.truth
    ghost = inside * (scene.source - scene.truth)
    ghost_power = _mean(ghost**2, core)
    object_share = _mean(error * ghost, core) / ghost_power
    residual = error * inside - object_share[..., None, None, None] * ghost
    replacement = np.sqrt(_mean(residual**2, core) / ghost_power)
    outside_error = np.sqrt(_mean(error**2, 1 - inside))

    residual = residual + error * (1 - inside)  # outside the mask, r = e
    distance = max(1, round(inside.shape[-2] / 16))
    r_near, r_far = _pixel_pairs(residual.mean(-1), distance)
    y_near, y_far = _pixel_pairs(scene.truth.mean(-1), distance)
    m_near, m_far = _pixel_pairs(inside[..., 0], distance)
    change, texture = r_far - r_near, y_far - y_near
    across, within = np.abs(m_far - m_near), m_far * m_near
    step = np.sqrt((across * change**2).sum(-1) / across.sum(-1))
    texture_change = np.abs((within * change * texture).sum(-1) / (within * texture**2).sum(-1))

    removed, not_replaced, background, no_step, textured = np.clip(
        [
            1 - np.abs(object_share),
            1 - replacement / 2,
            1 - outside_error / 0.2,
            1 - step / 0.3,
            1 - texture_change / 2,
        ],
        0,
        1,
    )
    return np.stack([removed * not_replaced, background, no_step * textured], axis=-1)


def candidate_strengths(mix: str, seed: int, scene_number: int, candidates: int = 4) -> np.ndarray:
    """Return the defect strengths of a scene's candidates, [K, 4] in the order of `DEFECTS`.

    For no_clean, the strengths depend only on (seed, scene_number) and K. The mix is one of:

        one_clean  K = 5: one clean candidate, then one candidate per defect, which has only this defect, at strength
                   0.6. The mean strength of each defect is 0.12.
        no_clean   K = `candidates`: each has three or four defects with strengths uniform in [0.2, 1]. The mean
                   strength of each defect is 0.525 over all candidates, and 0.6 over candidates with this defect.

    Raises:
        ValueError: the mix is unknown, or `candidates` is below 2 for no_clean.
    """
    if mix not in MIXES:
        raise ValueError(f"unknown mix {mix!r}: expected one of {MIXES}")
    if mix == "one_clean":
        return np.concatenate([np.zeros((1, 4)), ONE_CLEAN_STRENGTH * np.eye(4)])
    if candidates < 2:
        raise ValueError(f"candidates={candidates}: expected at least 2, because scores are compared within a scene")
    rng = np.random.default_rng((seed, scene_number, 1))
    ranks = rng.permuted(np.tile(np.arange(4), (candidates, 1)), axis=1)
    present = ranks < rng.choice(NO_CLEAN_DEFECT_COUNTS, (candidates, 1))
    return np.where(present, rng.uniform(*NO_CLEAN_STRENGTH_RANGE, (candidates, 4)), 0.0)


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """Settings of a synthetic data set. They determine all bytes of its files.

    Attributes:
        scenes: number of scenes.
        size: width and height of each image in pixels.
        mix: kinds of candidates, one of `MIXES`; see `candidate_strengths`.
        seed: seed of scenes and candidates.
        first_scene: number of the first scene. The scenes have the numbers first_scene … first_scene + scenes − 1.
        candidates: number of results per scene for the mix "no_clean"; the mix "one_clean" always has five.
    """

    scenes: int
    size: int
    mix: str
    seed: int
    first_scene: int = 0
    candidates: int = 4

    @property
    def scene_numbers(self) -> range:
        """The numbers of the scenes [S]."""
        return range(self.first_scene, self.first_scene + self.scenes)

    @property
    def scene_names(self) -> list[str]:
        """The names of the scenes [S]. The name of an image file starts with the name of its scene."""
        return [f"scene_{number:05d}" for number in self.scene_numbers]

    @property
    def result_paths(self) -> list[list[str]]:
        """The file paths of the results [S][K]."""
        kinds = ("clean", *DEFECTS) if self.mix == "one_clean" else range(self.candidates)
        return [[f"{RESULT_FOLDER}/{name}_{kind}.png" for kind in kinds] for name in self.scene_names]

    def strengths(self) -> np.ndarray:
        """Return the defect strengths of every result, [S, K, 4]. Raises ValueError if a setting is out of range."""
        if self.scenes < 1:
            raise ValueError(f"scenes={self.scenes}: expected at least 1")
        check_size(self.size)
        return np.stack(
            [candidate_strengths(self.mix, self.seed, number, self.candidates) for number in self.scene_numbers]
        )


def write_dataset(folder: str | Path, settings: DatasetSettings) -> Path:
    """Write scenes and their scored candidates as a data set; returns the resolved folder of the data set.

        input/ mask/ gt/ ref/                    PNG, one per scene
        result/                                  PNG, one per candidate
        labeled_dict.json, labeled_tensor.json   the same scored records in the score formats "dict" and "tensor"
        triplets.json                            {"mapping": {gt: [inputs]}}, for training on the ground truth
        unscored.json                            one candidate per scene, without scores; most have a defect
        defects.json                             settings, and the true defect strengths of every result

    Paths are relative to the folder. `rule_scores` computes the scores from the written 8-bit images; they are rounded
    to four decimals. The bytes of all files depend only on the settings.

    The data set is written to FOLDER.partial, and this folder is renamed when the data set is complete. A data set that
    was written with the same settings is replaced. This restores files that have been deleted.

    Raises:
        OutputError: one of the following holds.

            * The folder contains files that do not belong to a data set with these settings.
            * The folder contains a data set with other settings.
            * A file of the data set has been edited.
            * FOLDER.partial exists and was not left by a stopped run.
        ValueError: a setting is out of range; see `DatasetSettings.strengths`.
    """
    strengths = settings.strengths()
    defects_json = _json(_defects_content(settings, strengths))
    folder = Path(folder).resolve()
    _check_replaceable(folder, defects_json, settings)
    records = []
    with replace_folder(folder) as partial:
        for name in (*SCENE_FOLDERS, RESULT_FOLDER):
            (partial / name).mkdir()
        rows = zip(settings.scene_numbers, settings.scene_names, settings.result_paths, strengths, strict=True)
        for number, name, files, scene_strengths in rows:
            scene = make_scene(np.random.SeedSequence((settings.seed, number)), settings.size)
            scores = _write_scene(partial, name, scene, files, scene_strengths)
            paths = {"ref": f"ref/{name}.png", "src": f"input/{name}.png", "mask": f"mask/{name}.png"}
            records += [{**paths, "result": f, "scores": s} for f, s in zip(files, scores.tolist(), strict=True)]
        for file, text in zip(JSON_FILES, (*_json_texts(settings, records), defects_json), strict=True):
            (partial / file).write_text(text, encoding="utf-8")
        _check_not_edited(folder, partial, [*JSON_FILES, *sorted(_image_paths(settings))])
    return folder


def _defects_content(settings: DatasetSettings, strengths: np.ndarray) -> dict:
    """Return the content of defects.json: settings, mean strength of each defect, and strengths of every result.

    `strengths` is [S, K, 4].
    """
    setting_names = ("mix", "seed", "size", "scenes", "first_scene")
    files = np.ravel(settings.result_paths).tolist()
    return {
        "settings": {name: getattr(settings, name) for name in setting_names},
        "mean_strength": dict(zip(DEFECTS, strengths.mean((0, 1)).tolist(), strict=True)),
        "records": [
            {"result": file, **dict(zip(DEFECTS, values.tolist(), strict=True))}
            for file, values in zip(files, strengths.reshape(-1, len(DEFECTS)), strict=True)
        ],
    }


def _json_texts(settings: DatasetSettings, records: list[dict]) -> list[str]:
    """Return the content of all `JSON_FILES` except defects.json.

    `records` are the scored records, in the order of `DatasetSettings.result_paths`.
    """
    dict_scores = [{**record, "scores": dict(zip(SCORE_NAMES, record["scores"], strict=True))} for record in records]
    mapping = {f"{name}.png": [f"{name}.png"] for name in settings.scene_names}
    candidates = len(records) // settings.scenes
    # Scene i gives candidate i mod K, so that unscored.json has about equally many candidates of each kind.
    unscored = [{**records[candidates * i + i % candidates]} for i in range(settings.scenes)]
    for record in unscored:
        del record["scores"]
    return [_json(content) for content in (dict_scores, records, {"mapping": mapping}, unscored)]


def _write_scene(folder: Path, name: str, scene: Scene, files: list[str], strengths: np.ndarray) -> np.ndarray:
    """Write the four images of a scene and its results; returns the scores [K, 3] of the results.

    Args:
        folder: folder of the data set.
        name: name of the scene.
        scene: scene to write.
        files: file path of each result, relative to `folder`.
        strengths: [K, 4] defect strengths of each result.
    """
    results = quantize(apply_defects(scene, strengths))
    images = [quantize(image) for image in (scene.source, scene.mask, scene.truth, scene.reference)]
    for subfolder, image in zip(SCENE_FOLDERS, images, strict=True):
        Image.fromarray(image).save(folder / subfolder / f"{name}.png", compress_level=1)
    for file, image in zip(files, results, strict=True):
        Image.fromarray(image).save(folder / file, compress_level=1)
    source, _, truth, reference = (image / 255 for image in images)
    return rule_scores(results / 255, Scene(source, truth, reference, scene.mask)).round(4)


def _json(content: object) -> str:
    return json.dumps(content, indent=1) + "\n"


def _image_paths(settings: DatasetSettings) -> set[str]:
    """Return the paths of all images of a data set, relative to its folder."""
    scene_images = {f"{folder}/{name}.png" for folder in SCENE_FOLDERS for name in settings.scene_names}
    return scene_images.union(*settings.result_paths)


def _check_replaceable(folder: Path, defects_json: str, settings: DatasetSettings) -> None:
    """Raise OutputError unless `folder` is absent, empty, or holds a data set with the same settings."""
    advice = "choose another folder"
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: expected a folder, found a file; {advice}")
    files, folders = _image_paths(settings).union(JSON_FILES), {*SCENE_FOLDERS, RESULT_FOLDER}
    existing, foreign = set(), []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_symlink() and path.is_file() and name in files:
            existing.add(name)
        elif path.is_symlink() or not path.is_dir() or name not in folders:  # a link was not created by `write_dataset`
            foreign.append(name)
    if foreign:
        raise OutputError(
            f"{folder}: contains files or folders that do not belong to the data set ({len(foreign)}, for example "
            f"{foreign[0]}); {advice}"
        )
    if existing and "defects.json" not in existing:
        raise OutputError(f"{folder}: contains files of a data set, but no defects.json with its settings; {advice}")
    if existing and (folder / "defects.json").read_text(encoding="utf-8") != defects_json:
        raise OutputError(f"{folder}: contains a data set with other settings; {advice}, or delete this folder first")


def _check_not_edited(folder: Path, new: Path, files: Sequence[str]) -> None:
    """Raise OutputError if a file in `folder` exists and differs from the new file in `new`."""
    for name in files:
        if (folder / name).exists() and (folder / name).read_bytes() != (new / name).read_bytes():
            raise OutputError(
                f"{folder}: {name} differs from the file that would replace it, so nothing was replaced; choose "
                "another folder, or delete this folder first"
            )
