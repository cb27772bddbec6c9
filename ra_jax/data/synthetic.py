"""Generate synthetic data sets: scenes with exact ground truth, and candidate results with known defects and scores.

A candidate is the ground truth plus a linear combination of four defects B_d with strengths s_d. The signed strength of
each defect can be measured in any image of the scene, including generated images, by least squares:

    candidate = truth + Σ_d s_d · B_d        ŝ = argmin_s ‖image − truth − Σ_d s_d · B_d‖²

A fixed rule (`rule_scores`) scores the candidates. Every function accepts one scene or a stack of scenes (`stack`);
leading axes of images and scenes broadcast.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ra_jax.data.scenes import Scene, check_size, make_scene, scenes, stack
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
    "make_scene",
    "measure_defects",
    "quantize",
    "rule_scores",
    "scenes",
    "stack",
    "write_dataset",
]

DEFECTS = ("ghost", "cast", "seam", "blur")
MIXES = ("one_clean", "no_clean")
SCENE_FOLDERS = ("input", "mask", "gt", "ref")  # one image per scene in each
RESULT_FOLDER = "result"
JSON_FILES = ("labeled_dict.json", "labeled_tensor.json", "triplets.json", "unscored.json", "defects.json")

# A warm tint whose mean over the channels is 0. It changes no brightness, while a seam changes nothing else.
CAST = np.array([0.22, 0.0, -0.22], np.float32)
SEAM = 0.25
EDGE_WIDTH = 0.05  # σ of the softened mask. All lengths are fractions of the image side.
BLUR_WIDTH = 0.09  # σ of the blur: a third of the period of textures, so that textures vanish

ONE_CLEAN_STRENGTH = 0.6
NO_CLEAN_RANGE = (0.2, 1.0)
NO_CLEAN_DEFECTS = (3, 4)

_IMAGE_AXES = (-3, -2, -1)  # axes of rows, columns and channels of an image


@lru_cache(maxsize=32)
def _gaussian_matrix(size: int, sigma: float) -> np.ndarray:
    """Return the [size, size] matrix of a Gaussian blur with σ = `sigma` pixels, renormalized at the ends."""
    positions = np.arange(size)
    kernel = np.exp(-0.5 * ((positions[:, None] - positions) / sigma) ** 2)
    return (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)


def _smooth(image: np.ndarray, width: float) -> np.ndarray:
    """Blur square images [..., h, h, c] by a Gaussian with σ = `width` · h pixels."""
    kernel = _gaussian_matrix(image.shape[-2], width * image.shape[-2])
    rows = kernel @ image.reshape(*image.shape[:-2], -1)
    return kernel @ rows.reshape(image.shape)


def _soft_mask(scene: Scene) -> np.ndarray:
    """Return the softened mask [..., h, w, 1]: ½ at the edge of the mask, up to 1 inside and down to 0 outside."""
    return _smooth(scene.mask[..., None].astype(np.float32), EDGE_WIDTH)


def defect_basis(scene: Scene) -> np.ndarray:
    """Return the four defects at strength 1, [..., 4, h, w, 3] float32 in the order of `DEFECTS`.

    m is the mask, and g is the softened mask (½ at its edge):

        ghost  m · (source − truth)                   the object, and the part of its shadow inside the mask
        cast   (1 − m) · (0.22, 0, −0.22)             warmer colors outside the mask
        seam   m · 0.25 · min(1, 2(1 − g))            a bright rim inside the mask, strongest at its edge
        blur   min(1, 2g) · (blurred truth − truth)   loss of texture inside the mask and just around it
    """
    inside = scene.mask[..., None].astype(np.float32)
    soft = _soft_mask(scene)
    ghost = inside * (scene.source - scene.truth)
    cast = (1 - inside) * CAST
    seam = np.broadcast_to(inside * SEAM * np.minimum(1, 2 * (1 - soft)), ghost.shape)
    blur = np.minimum(1, 2 * soft) * (_smooth(scene.truth, BLUR_WIDTH) - scene.truth)
    return np.stack([ghost, cast, seam, blur], axis=-4).astype(np.float32)


def apply_defects(scene: Scene, strengths: Mapping[str, float] | np.ndarray) -> np.ndarray:
    """Add defects to the ground truth; returns [..., h, w, 3] float32, not clipped.

    Args:
        scene: scene or stack of scenes.
        strengths: signed strengths, either by defect name (missing ones are 0) or as an array [..., 4] in the order of
            `DEFECTS`.

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


def _pairs(plane: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both values [..., P] of all horizontal and vertical pixel pairs at `distance` in [..., h, w]."""
    flat = (*plane.shape[:-2], -1)
    near = plane[..., :-distance, :].reshape(flat), plane[..., :-distance].reshape(flat)
    far = plane[..., distance:, :].reshape(flat), plane[..., distance:].reshape(flat)
    return np.concatenate(near, axis=-1), np.concatenate(far, axis=-1)


def rule_scores(image: np.ndarray, scene: Scene) -> np.ndarray:
    """Score candidates: images [..., h, w, 3] in [0, 1] -> (removal, background, smoothness) [..., 3] in [0, 1].

    The scores depend on the candidate p, the ground truth y, the source and the mask. Let e = p − y and o = source − y.
    "core" weights each mask pixel by its depth inside the mask, 2g − 1, where g is the softened mask. Negative factors
    are replaced by 0.

        removal     (1 − |α|) · (1 − ½ RMS_core(r) / RMS_core(o))
                    with α = ⟨e, o⟩_core / ⟨o, o⟩_core; r = e − α·o inside the mask and r = e outside.
                    The first factor drops if part of the object is left, the second if something else replaces it.
        background  1 − RMS_outside(e) / 0.2
        smoothness  (1 − RMS_across(Δr) / 0.3) · (1 − ½ |⟨Δr, Δy⟩_within / ⟨Δy, Δy⟩_within|)
                    The first factor drops with a step at the edge of the mask, the second if texture inside it is
                    lost or exaggerated. Δ is the difference in brightness of two pixels at a distance of 1/16 of the
                    image side. "across" pairs have one pixel inside the mask, "within" pairs have both.

    The ground truth scores (1, 1, 1). A candidate that equals the source inside the mask has a removal score of 0. Each
    score decreases as the |strength| of its defect grows from 0 to 1, for positive and negative strengths: removal with
    ghost (and slightly with blur and seam), background with cast, smoothness with seam and blur.
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

    residual = residual + error * (1 - inside)  # outside the mask, the whole error counts as residual
    distance = max(1, round(inside.shape[-2] / 16))
    r_near, r_far = _pairs(residual.mean(-1), distance)
    y_near, y_far = _pairs(scene.truth.mean(-1), distance)
    m_near, m_far = _pairs(inside[..., 0], distance)
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


def candidate_strengths(mix: str, seed: int, number: int, candidates: int = 4) -> np.ndarray:
    """Return the defect strengths [K, 4] of the candidates of scene `number` of `seed`, in the order of `DEFECTS`.

        one_clean  K = 5: one clean candidate, then each defect alone at strength 0.6. The mean strength of each
                   defect is 0.12.
        no_clean   K = `candidates`: each has three or four defects with strengths uniform in [0.2, 1]. The mean
                   strength of each defect is 0.525 over all candidates, and 0.6 over those that have it.

    Raises:
        ValueError: the mix is unknown, or `candidates` is below 2 for no_clean.
    """
    if mix not in MIXES:
        raise ValueError(f"unknown mix {mix!r}: expected one of {MIXES}")
    if mix == "one_clean":
        return np.concatenate([np.zeros((1, 4)), ONE_CLEAN_STRENGTH * np.eye(4)])
    if candidates < 2:
        raise ValueError(f"candidates={candidates}: expected at least 2, because scores are compared within a scene")
    rng = np.random.default_rng((seed, number, 1))
    ranks = rng.permuted(np.tile(np.arange(4), (candidates, 1)), axis=1)
    present = ranks < rng.choice(NO_CLEAN_DEFECTS, (candidates, 1))
    return np.where(present, rng.uniform(*NO_CLEAN_RANGE, (candidates, 4)), 0.0)


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """Settings of a data set; they determine every byte of it.

    Attributes:
        scenes: number of scenes.
        size: width and height of each image in pixels.
        mix: kind of candidates, one of `MIXES`; see `candidate_strengths`.
        seed: seed of scenes and candidates.
        first_scene: number of the first scene; the scenes are first_scene … first_scene + scenes − 1 of `seed`.
        candidates: results per scene of the mix "no_clean"; "one_clean" always has five.
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
        """The names of the scenes [S]; names of their files start with them."""
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
    """Write scenes and their scored candidates as a data set; returns its resolved folder.

        input/ mask/ gt/ ref/                    PNG, one per scene
        result/                                  PNG, one per candidate
        labeled_dict.json, labeled_tensor.json   scored records, in the score formats "dict" and "tensor"
        triplets.json                            {"mapping": {gt: [inputs]}}, for training on the ground truth
        unscored.json                            one candidate per scene, without scores; most have a defect
        defects.json                             settings, and the true defect strengths of every result

    Paths are relative to the folder. Scores are those of `rule_scores` for the written 8-bit images. The bytes depend
    on the settings alone. The data set is written to FOLDER.partial, which is renamed when it is complete. A data set
    that was written with the same settings is replaced, so files that were deleted from it are restored.

    Raises:
        OutputError: the folder contains other files, a data set with other settings, or a file that was edited; or
            FOLDER.partial exists and was not left by a stopped run.
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
        for file, text in zip(JSON_FILES, (*_record_files(settings, records), defects_json), strict=True):
            (partial / file).write_text(text, encoding="utf-8")
        _check_not_edited(folder, partial, [*JSON_FILES, *sorted(_image_paths(settings))])
    return folder


def _defects_content(settings: DatasetSettings, strengths: np.ndarray) -> dict:
    """Return the content of defects.json: settings, and the true strengths [S, K, 4] of every result."""
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


def _record_files(settings: DatasetSettings, records: list[dict]) -> list[str]:
    """Return the texts of all `JSON_FILES` except defects.json, from the scored records in the order of the results."""
    dict_scores = [{**record, "scores": dict(zip(SCORE_NAMES, record["scores"], strict=True))} for record in records]
    mapping = {f"{name}.png": [f"{name}.png"] for name in settings.scene_names}
    candidates = len(records) // settings.scenes
    # The candidates take turns, so that the file has equally many of each kind.
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
        files: file paths of the results, one for each row of `strengths`.
        strengths: [K, 4] defect strengths of the results.
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
        elif path.is_symlink() or not path.is_dir() or name not in folders:  # `write_dataset` creates no links
            foreign.append(name)
    if foreign:
        raise OutputError(
            f"{folder}: contains files or folders that do not belong to the data set ({len(foreign)}, for example "
            f"{foreign[0]}); {advice}"
        )
    if existing and "defects.json" not in existing:
        raise OutputError(f"{folder}: contains files of a data set, but no defects.json with its settings; {advice}")
    if existing and (folder / "defects.json").read_text(encoding="utf-8") != defects_json:
        raise OutputError(f"{folder}: contains a data set with other settings; {advice}, or delete this one first")


def _check_not_edited(folder: Path, new: Path, files: Sequence[str]) -> None:
    """Raise OutputError if a file in `folder` differs from the file in `new` that would replace it."""
    for name in files:
        if (folder / name).exists() and (folder / name).read_bytes() != (new / name).read_bytes():
            raise OutputError(
                f"{folder}: {name} differs from the file that would replace it, and is kept; choose another folder, or "
                "delete this one first"
            )
