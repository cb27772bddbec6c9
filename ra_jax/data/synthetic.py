"""Synthetic scored removals: exact ground truth, candidate results with known defects, scores by a rule.

A candidate is the truth plus a linear mixture of four defects, so that the signed strength of each defect can
be measured in any image of the scene, a generated one as well:

    candidate = truth + Σ_d s_d · B_d        ŝ = argmin_s ‖image − truth − Σ_d s_d · B_d‖²

Every function takes one scene or a stack of them (`stack`); leading axes of images and scenes broadcast.
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
ROOMS = ("input", "mask", "gt", "ref")
DOCUMENTS = ("labeled_dict.json", "labeled_tensor.json", "triplets.json", "unscored.json", "defects.json")

CAST = np.array([0.22, 0.0, -0.22], np.float32)  # warm, and of no brightness of its own: seams have nothing else
SEAM = 0.25
EDGE_WIDTH = 0.05  # σ of the softened mask, as a fraction of the picture, like all lengths here
BLUR_WIDTH = 0.09  # σ of the blur: a third of the textures' period, so that they vanish

ONE_CLEAN_STRENGTH = 0.6
NO_CLEAN_RANGE = (0.2, 1.0)
NO_CLEAN_DEFECTS = (3, 4)

_PIXELS = (-3, -2, -1)  # rows, columns and channels of an image


@lru_cache(maxsize=32)
def _gaussian_matrix(size: int, sigma: float) -> np.ndarray:
    """[size, size] float32: convolution with a Gaussian of σ pixels, renormalised at the ends."""
    at = np.arange(size)
    kernel = np.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2)
    return (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)


def _smooth(image: np.ndarray, width: float) -> np.ndarray:
    """Gaussian blur of square images [..., h, h, c] with σ = `width` of their side."""
    kernel = _gaussian_matrix(image.shape[-2], width * image.shape[-2])
    rows = kernel @ image.reshape(*image.shape[:-2], -1)
    return kernel @ rows.reshape(image.shape)


def _soft_mask(scene: Scene) -> np.ndarray:
    """[..., h, w, 1]: ½ at the mask's edge, rising to 1 inside and falling to 0 outside."""
    return _smooth(scene.mask[..., None].astype(np.float32), EDGE_WIDTH)


def defect_basis(scene: Scene) -> np.ndarray:
    """The four defects at strength 1, [..., 4, h, w, 3] float32 in the order of `DEFECTS`.

    With the mask m and the softened mask g (½ at its edge):

        ghost  m · (source − truth): the object, and what the mask holds of its shadow
        cast   (1 − m) · (0.22, 0, −0.22): everything around the mask turns warm
        seam   m · 0.25 · min(1, 2(1 − g)): a bright rim, strongest at the mask's edge
        blur   min(1, 2g) · (blurred truth − truth): texture is lost in the mask and just around it
    """
    inside = scene.mask[..., None].astype(np.float32)
    soft = _soft_mask(scene)
    ghost = inside * (scene.source - scene.truth)
    cast = (1 - inside) * CAST
    seam = np.broadcast_to(inside * SEAM * np.minimum(1, 2 * (1 - soft)), ghost.shape)
    blur = np.minimum(1, 2 * soft) * (_smooth(scene.truth, BLUR_WIDTH) - scene.truth)
    return np.stack([ghost, cast, seam, blur], axis=-4).astype(np.float32)


def apply_defects(scene: Scene, strengths: Mapping[str, float] | np.ndarray) -> np.ndarray:
    """The truth with defects of the given signed strengths, [..., h, w, 3] float32, not clipped.

    `strengths` names some of `DEFECTS` (the others are 0) or is an array [..., 4] in their order.

    Raises:
        ValueError: a name that is no defect.
    """
    if isinstance(strengths, Mapping):
        if unknown := sorted(set(strengths) - set(DEFECTS)):
            raise ValueError(f"unknown defects {unknown}: expected some of {DEFECTS}")
        strengths = np.array([strengths.get(name, 0.0) for name in DEFECTS])
    strengths = np.asarray(strengths, np.float32)
    return scene.truth + np.einsum("...d,...dhwc->...hwc", strengths, defect_basis(scene))


def measure_defects(image: np.ndarray, scene: Scene) -> np.ndarray:
    """Signed strengths [..., 4] (float64) of the defects in images [..., h, w, 3]: joint least squares."""
    error = np.asarray(image, np.float64) - scene.truth
    basis = defect_basis(scene).astype(np.float64)
    basis = basis.reshape(*basis.shape[:-3], -1)
    projection = basis @ error.reshape(*error.shape[:-3], -1, 1)
    return np.linalg.solve(basis @ basis.mT, projection)[..., 0]


def quantize(image: np.ndarray) -> np.ndarray:
    """[0, 1] to uint8, clipped and rounded."""
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _mean(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted mean over the pixels and channels of [..., h, w, c]; weight [..., h, w, 1]."""
    return (weight * values).sum(_PIXELS) / (weight.sum(_PIXELS) * values.shape[-1])


def _pairs(plane: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Both ends [..., P] of all horizontal and vertical pixel pairs `distance` apart in [..., h, w]."""
    flat = (*plane.shape[:-2], -1)
    near = plane[..., :-distance, :].reshape(flat), plane[..., :-distance].reshape(flat)
    far = plane[..., distance:, :].reshape(flat), plane[..., distance:].reshape(flat)
    return np.concatenate(near, axis=-1), np.concatenate(far, axis=-1)


def rule_scores(image: np.ndarray, scene: Scene) -> np.ndarray:
    """Scores (removal, background, smoothness) of candidates [..., h, w, 3] in [0, 1]: [..., 3] in [0, 1].

    From the candidate p, the truth y, the source and the mask alone; e = p − y, o = source − y. "core"
    weighs the mask's pixels by how deep inside they lie, 2g − 1 with g the softened mask. Negative factors
    count as 0.

        removal     (1 − |α|) · (1 − ½ RMS_core(r) / RMS_core(o))
                    with α = ⟨e, o⟩_core / ⟨o, o⟩_core and r = e − α·o (in the mask; r = e around it):
                    how much of the object is left, and whether something else stands in its place
        background  1 − RMS_outside(e) / 0.2
        smoothness  (1 − RMS_across(Δr) / 0.3) · (1 − ½ |⟨Δr, Δy⟩_within / ⟨Δy, Δy⟩_within|)
                    a step at the mask's edge, and texture lost or overdone inside; Δ is the difference in
                    brightness of two pixels 1/16 of the picture apart, on either side or both within

    The truth scores (1, 1, 1), the source inside the mask scores removal 0. A score falls with the |strength|
    of its own defect, on both sides of 0 and all the way to 1: removal with ghost (and a little with blur and
    seam), background with cast, smoothness with seam and blur.
    """
    inside = scene.mask[..., None].astype(np.float64)
    core = inside * np.clip(2 * _soft_mask(scene) - 1, 0, None)
    error = np.asarray(image, np.float64) - scene.truth
    ghost = inside * (scene.source - scene.truth)
    ghost_power = _mean(ghost**2, core)
    left = _mean(error * ghost, core) / ghost_power
    rest = error * inside - left[..., None, None, None] * ghost
    other = np.sqrt(_mean(rest**2, core) / ghost_power)
    around = np.sqrt(_mean(error**2, 1 - inside))

    rest = rest + error * (1 - inside)  # outside the mask nothing is put down to the object
    distance = max(1, round(inside.shape[-2] / 16))
    r_near, r_far = _pairs(rest.mean(-1), distance)
    y_near, y_far = _pairs(scene.truth.mean(-1), distance)
    m_near, m_far = _pairs(inside[..., 0], distance)
    change, texture = r_far - r_near, y_far - y_near
    across, within = np.abs(m_far - m_near), m_far * m_near
    step = np.sqrt((across * change**2).sum(-1) / across.sum(-1))
    lost = np.abs((within * change * texture).sum(-1) / (within * texture**2).sum(-1))

    factors = [1 - np.abs(left), 1 - other / 2, 1 - around / 0.2, 1 - step / 0.3, 1 - lost / 2]
    gone, clear, background, even, detailed = np.clip(factors, 0, 1)
    return np.stack([gone * clear, background, even * detailed], axis=-1)


def candidate_strengths(mix: str, seed: int, number: int, candidates: int = 4) -> np.ndarray:
    """Strengths [K, 4] of the candidates of scene `number` of `seed`, in the order of `DEFECTS`.

        one_clean  K = 5: a clean one, then each defect alone at 0.6; each defect's mean strength is 0.12
        no_clean   K = `candidates`, each with three or four defects of strengths uniform in [0.2, 1]; each
                   defect's mean strength is 0.525, or 0.6 where it is present

    Raises:
        ValueError: an unknown mix, or fewer than two candidates.
    """
    if mix not in MIXES:
        raise ValueError(f"unknown mix {mix!r}: expected one of {MIXES}")
    if mix == "one_clean":
        return np.concatenate([np.zeros((1, 4)), ONE_CLEAN_STRENGTH * np.eye(4)])
    if candidates < 2:
        raise ValueError(f"candidates={candidates}: expected at least 2, scores are compared within a scene")
    rng = np.random.default_rng((seed, number, 1))
    order = rng.permuted(np.tile(np.arange(4), (candidates, 1)), axis=1)
    present = order < rng.choice(NO_CLEAN_DEFECTS, (candidates, 1))
    return np.where(present, rng.uniform(*NO_CLEAN_RANGE, (candidates, 4)), 0.0)


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """What decides every byte of a data set: scenes first_scene … first_scene + scenes − 1 of `seed`, of one `mix`.

    scenes: how many; size: side of a picture, in pixels; candidates: results a scene, for the mix "no_clean" alone.
    """

    scenes: int
    size: int
    mix: str
    seed: int
    first_scene: int = 0
    candidates: int = 4

    @property
    def numbers(self) -> range:
        """The scenes' numbers [S]."""
        return range(self.first_scene, self.first_scene + self.scenes)

    @property
    def names(self) -> list[str]:
        """The scenes' names [S], which their files begin with."""
        return [f"scene_{number:05d}" for number in self.numbers]

    @property
    def results(self) -> list[list[str]]:
        """The results' files [S][K]."""
        kinds = ("clean", *DEFECTS) if self.mix == "one_clean" else range(self.candidates)
        return [[f"result/{name}_{kind}.png" for kind in kinds] for name in self.names]

    def strengths(self) -> np.ndarray:
        """Strengths of the defects in every result, [S, K, 4]. Raises ValueError for values out of range."""
        if self.scenes < 1:
            raise ValueError(f"scenes={self.scenes}: expected at least 1")
        check_size(self.size)
        return np.stack([candidate_strengths(self.mix, self.seed, number, self.candidates) for number in self.numbers])


def write_dataset(folder: str | Path, settings: DatasetSettings) -> Path:
    """Write scored candidates of the scenes; returns the folder.

        input/ mask/ gt/ ref/  result/           PNG: one each a scene, one a candidate
        labeled_dict.json, labeled_tensor.json   scored records, in the guide's two formats
        triplets.json                            {"mapping": {gt: [inputs]}}, for standard training
        unscored.json                            one of its candidates a scene, without scores: flawed pairs
        defects.json                             settings, and the true strengths of every result

    Paths are relative to the folder; scores are those of `rule_scores` on the written 8-bit images. The bytes depend on
    the settings alone. The folder appears when it is complete; one that the same settings wrote before is replaced,
    and what is missing of it is there again.

    Raises:
        OutputError: the folder holds anything else, or a file that was changed since; or FOLDER.partial, which is
            written first, was left by no run of this.
        ValueError: an unknown mix; too few candidates or scenes, or too small a size.
    """
    strengths = settings.strengths()
    known = _json(_known(settings, strengths))
    folder = Path(folder).resolve()
    _refuse_foreign(folder, known, settings)
    records = []
    with replace_folder(folder) as partial:
        for room in (*ROOMS, "result"):
            (partial / room).mkdir()
        rows = zip(settings.numbers, settings.names, settings.results, strengths, strict=True)
        for number, name, files, values in rows:
            scene = make_scene(np.random.SeedSequence((settings.seed, number)), settings.size)
            scores = _write_scene(partial, name, scene, files, values)
            paths = {"ref": f"ref/{name}.png", "src": f"input/{name}.png", "mask": f"mask/{name}.png"}
            records += [{**paths, "result": f, "scores": s} for f, s in zip(files, scores.tolist(), strict=True)]
        for file, text in zip(DOCUMENTS, (*_documents(settings, records), known), strict=True):
            (partial / file).write_text(text, encoding="utf-8")
        _refuse_edited(folder, partial, [*DOCUMENTS, *sorted(_pictures(settings))])
    return folder


def _known(settings: DatasetSettings, strengths: np.ndarray) -> dict:
    """The content of defects.json: settings, and the true strengths [S, K, 4] of every result."""
    told = ("mix", "seed", "size", "scenes", "first_scene")
    files = np.ravel(settings.results).tolist()
    return {
        "settings": {name: getattr(settings, name) for name in told},
        "mean_strength": dict(zip(DEFECTS, strengths.mean((0, 1)).tolist(), strict=True)),
        "records": [
            {"result": file, **dict(zip(DEFECTS, values.tolist(), strict=True))}
            for file, values in zip(files, strengths.reshape(-1, len(DEFECTS)), strict=True)
        ],
    }


def _documents(settings: DatasetSettings, records: list[dict]) -> list[str]:
    """The texts of `DOCUMENTS` but the last, from the scored records in the order of the results."""
    named = [{**record, "scores": dict(zip(SCORE_NAMES, record["scores"], strict=True))} for record in records]
    mapping = {f"{name}.png": [f"{name}.png"] for name in settings.names}
    kinds = len(records) // settings.scenes
    unscored = [{**records[kinds * i + i % kinds]} for i in range(settings.scenes)]  # of every kind alike
    for record in unscored:
        del record["scores"]
    return [_json(content) for content in (named, records, {"mapping": mapping}, unscored)]


def _write_scene(folder: Path, name: str, scene: Scene, files: list[str], strengths: np.ndarray) -> np.ndarray:
    """Write a scene's four pictures and its results, one of `files` a row of strengths; returns their scores."""
    results = quantize(apply_defects(scene, strengths))
    pictures = [quantize(picture) for picture in (scene.source, scene.mask, scene.truth, scene.reference)]
    for room, picture in zip(ROOMS, pictures, strict=True):
        Image.fromarray(picture).save(folder / room / f"{name}.png", compress_level=1)
    for file, picture in zip(files, results, strict=True):
        Image.fromarray(picture).save(folder / file, compress_level=1)
    source, _, truth, reference = (picture / 255 for picture in pictures)
    return rule_scores(results / 255, Scene(source, truth, reference, scene.mask)).round(4)


def _json(content: object) -> str:
    return json.dumps(content, indent=1) + "\n"


def _pictures(settings: DatasetSettings) -> set[str]:
    """The pictures of a data set, by their paths in its folder."""
    return {f"{room}/{name}.png" for room in ROOMS for name in settings.names}.union(*settings.results)


def _refuse_foreign(folder: Path, known: str, settings: DatasetSettings) -> None:
    """Raise OutputError unless `folder` is absent, empty or an earlier copy of the very data set to write."""
    advice = "choose another folder"
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: expected a folder, found a file; {advice}")
    files, folders = _pictures(settings).union(DOCUMENTS), {*ROOMS, "result"}
    found, foreign = set(), []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_symlink() and path.is_file() and name in files:
            found.add(name)
        elif path.is_symlink() or not path.is_dir() or name not in folders:  # this command writes no links
            foreign.append(name)
    if foreign:
        raise OutputError(f"{folder}: holds {len(foreign)} other files or folders, {foreign[0]} for one; {advice}")
    if found and "defects.json" not in found:
        raise OutputError(f"{folder}: holds a data set without defects.json, which no run of this wrote; {advice}")
    if found and (folder / "defects.json").read_text(encoding="utf-8") != known:
        raise OutputError(f"{folder}: holds a data set of other settings; {advice}, or delete this one first")


def _refuse_edited(folder: Path, new: Path, files: Sequence[str]) -> None:
    """Raise OutputError where a file in `folder` is not, byte for byte, the one in `new` that would replace it."""
    for name in files:
        if (folder / name).exists() and (folder / name).read_bytes() != (new / name).read_bytes():
            raise OutputError(
                f"{folder}: {name} is not as these settings write it, and is not replaced; choose another folder, or "
                "delete this one first"
            )
