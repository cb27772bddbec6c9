"""`python -m ra_jax.evaluate`: measures removals against their ground truth, per image and in total."""

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from ra_jax.config.ranges import at_least, finite, out_of_range
from ra_jax.config.settings import GRPOConfig
from ra_jax.data.formats import RECORDS_FILE
from ra_jax.data.images import read_mask, read_photo
from ra_jax.data.inputs import flag_inputs
from ra_jax.errors import DataError, UserError
from ra_jax.evaluation.measure import Evaluation, Fid, Networks
from ra_jax.evaluation.pairs import Pair, find_pairs
from ra_jax.evaluation.perceptual import LpipsNet, load_inception, load_lpips, load_transformer
from ra_jax.evaluation.table import COLUMN_BY_NAME, COLUMNS, Row, csv_text, summarize, table_text, worst_first
from ra_jax.outputs import Outputs, check_outputs, replace_file, write_file
from ra_jax.reporting.contact_sheet import captioned_sheet, thumbnail

METRICS_FILE, SUMMARY_FILE, SHEET_FILE = "metrics.csv", "summary.json", "contact_sheet.png"
REWARDS_WITHOUT_TRUTH = ("removal_without_target", "background_without_target")
ALWAYS_COMPUTED = ("total_reward", "smoothness", "mask_area", "psnr_source_outside")
CAPTION_METRICS = ("removal", "background", *REWARDS_WITHOUT_TRUTH, "smoothness")
CAPTION_METRICS += ("psnr", "psnr_mask", "ssim_mask", "lpips")
MAX_ID_LINE = 34  # characters of an id in one line of a caption


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measures removals against their ground truth, per image and in total.

    A flag that names weights takes an existing file or folder; nothing is downloaded.
    """

    results: str  # data set, folder written by ra_jax.infer, or folder of images with the names of --truth's photos
    truth: str | None = None  # triplets, or folder of images with the photos' names (None: records of source gt)
    only: str | None = None  # measure only results whose file name matches this glob, such as "*_model*"
    output_dir: str  # metrics.csv, summary.json and contact_sheet.png are written here
    removal_reward_weight: Annotated[float, finite()] = GRPOConfig.removal_reward_weight
    """weight of the removal reward in total_reward"""
    background_reward_weight: Annotated[float, finite()] = GRPOConfig.background_reward_weight
    """weight of the background reward in total_reward"""
    smoothness_reward_weight: Annotated[float, finite()] = GRPOConfig.smoothness_reward_weight
    """weight of the smoothness reward in total_reward"""
    lpips: LpipsNet | None = None  # compute LPIPS with this network (extra: metrics)
    inception_weights: str | None = None  # compute FID with this TorchScript file (extra: torch)
    clip_model: str | None = None  # compute CLIP similarity with the model in this transformers folder (extra: torch)
    dino_model: str | None = None  # compute DINO similarity with the model in this transformers folder (extra: torch)
    sort_by: str = "total_reward"  # metric that orders the contact sheet, worst result first
    sheet_rows: Annotated[int, at_least(0)] = 24  # number of results on the contact sheet (0: no sheet)
    thumbnail: Annotated[int, at_least(16)] = 192  # largest side of an image on the contact sheet [pixels]
    overwrite: bool = False  # replace the three files of an earlier evaluation


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the evaluation. On a `UserError`, print it and exit with status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    config = tyro.cli(EvaluateConfig, args=argv, prog="python -m ra_jax.evaluate", use_underscores=True)
    try:
        run(config)
    except UserError as error:
        sys.exit(f"error: {error}")


def run(config: EvaluateConfig) -> None:
    """Measure the results and write the files. All settings and files are checked before anything is computed."""
    _check_ranges(config)
    output = _check_output_folder(config)
    pairs = find_pairs(config.results, config.truth, config.only)
    has_truth = pairs[0].truth is not None
    not_computed = _find_not_computed(config, has_truth)
    _check_sort_by(config.sort_by, has_truth, not_computed)
    networks = load_networks(config) if has_truth else Networks()

    weights = (config.removal_reward_weight, config.background_reward_weight, config.smoothness_reward_weight)
    evaluation = Evaluation(pairs, weights, networks)
    for _ in tqdm(evaluation.measure(), total=len(pairs), unit="image"):
        pass
    rows, fid = evaluation.rows, evaluation.fid()
    if networks.inception is not None and fid is None:
        not_computed["fid"] = "fewer than two results or fewer than two ground truths"
    not_computed |= _count_missing(rows)
    summary = {
        "settings": dataclasses.asdict(config),
        "pictures": len(pairs),
        "metrics": summarize(rows),
        "fid": None if fid is None else dataclasses.asdict(fid),
        "not_computed": not_computed,
        "warnings": _fid_warnings(fid),
    }
    output.mkdir(parents=True, exist_ok=True)
    # The summary is written first. It shows that the files are from an evaluation, even if the program is killed before
    # the last file: then --overwrite may still replace them.
    write_file(output / SUMMARY_FILE, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_file(output / METRICS_FILE, csv_text(rows))
    if config.sheet_rows:
        sheet = draw_sheet(pairs, rows, config)
        with replace_file(output / SHEET_FILE) as draft:
            sheet.save(draft, "PNG")
    else:
        (output / SHEET_FILE).unlink(missing_ok=True)  # an earlier evaluation's sheet would not match the new rows
    for warning in summary["warnings"]:
        logging.warning(warning)
    _print_summary(summary["metrics"], fid, not_computed, len(pairs), has_truth)
    print(f"\n{output / METRICS_FILE}\n{output / SUMMARY_FILE}")
    if config.sheet_rows:
        print(output / SHEET_FILE)


def load_networks(config: EvaluateConfig) -> Networks:
    """Load the networks that the flags name.

    Raises:
        DataError: an extra is not installed, or weights do not exist or are of another kind.
    """

    def load_if_named(load, name, *arguments):
        return None if name is None else load(name, *arguments)

    return Networks(
        lpips=load_if_named(load_lpips, config.lpips),
        inception=load_if_named(load_inception, config.inception_weights),
        clip=load_if_named(load_transformer, config.clip_model, "--clip_model"),
        dino=load_if_named(load_transformer, config.dino_model, "--dino_model"),
    )


def draw_sheet(pairs: Sequence[Pair], rows: Sequence[Row], config: EvaluateConfig) -> Image.Image:
    """Draw the worst `sheet_rows` results, with one row for each: main metrics | source | mask | result | truth."""
    worst_indices = worst_first(rows, config.sort_by)[: config.sheet_rows]
    titles = ("source", "mask", "result", *(("truth",) if pairs[0].truth is not None else ()))

    def thumbnails(pair: Pair) -> list[np.ndarray]:
        mask = Image.fromarray(read_mask(pair.mask))
        photos = [read_photo(path) for path in (pair.src, pair.result, pair.truth) if path is not None]
        return [thumbnail(image, config.thumbnail) for image in (photos[0], mask, *photos[1:])]

    names = list(dict.fromkeys((config.sort_by, "total_reward", *CAPTION_METRICS)))
    captions = [_format_caption(rows[i], names) for i in worst_indices]
    return captioned_sheet(captions, [thumbnails(pairs[i]) for i in worst_indices], titles)


def _format_caption(row: Row, names: Sequence[str]) -> list[str]:
    record_id = str(row["id"])
    lines = [record_id[start : start + MAX_ID_LINE] for start in range(0, len(record_id), MAX_ID_LINE)]
    values = [(COLUMN_BY_NAME[name], row[name]) for name in names if row.get(name) is not None]
    return lines + [f"{column.name} {value:.{column.digits}f} {column.unit}".rstrip() for column, value in values]


def _check_ranges(config: EvaluateConfig) -> None:
    if errors := list(out_of_range(config)):
        raise DataError("\n".join(errors))


def _check_output_folder(config: EvaluateConfig) -> Path:
    """Return the output folder, if its three files do not exist or --overwrite may replace them.

    Raises:
        OutputError: an output file or folder is an input, contains an input or lies in an input.
        DataError: one of the files already exists, and either --overwrite is not given or no evaluation wrote the file.
    """
    output = Path(config.output_dir)
    files = [output / name for name in (METRICS_FILE, SUMMARY_FILE, SHEET_FILE)]
    records = Path(config.results) / RECORDS_FILE  # exists in a folder that ra_jax.infer wrote
    weights = {name: getattr(config, name) for name in ("inception_weights", "clip_model", "dino_model")}
    inputs, nested = flag_inputs(
        {
            "--results": config.results,
            f"--results ({RECORDS_FILE})": records if records.is_file() else None,
            "--truth": config.truth,
        }
    )
    nested |= {f"--{name}": [Path(path)] for name, path in weights.items() if path is not None}
    check_outputs(Outputs("--output_dir", output, files), inputs, nested)
    existing = [file for file in files if file.exists() or file.is_symlink()]
    if existing and not _is_summary(output / SUMMARY_FILE):
        raise DataError(
            f"{existing[0]}: already exists, and {output} holds no {SUMMARY_FILE} of an earlier evaluation; move it, "
            "or choose another --output_dir"
        )
    if existing and not config.overwrite:
        raise DataError(f"{existing[0]}: already exists; choose another --output_dir, or add --overwrite")
    return output


def _is_summary(file: Path) -> bool:
    """Return whether an evaluation wrote the file: whether the file is a JSON object with settings and metrics."""
    if not file.is_file():
        return False
    try:
        summary = json.loads(file.read_bytes())
    except ValueError:  # not JSON, or not text
        return False
    return isinstance(summary, dict) and {"settings", "metrics"} <= summary.keys()


def _find_not_computed(config: EvaluateConfig, has_truth: bool) -> dict[str, str]:
    """Return the metrics that will not be computed, each with the reason."""
    if not has_truth:
        computed = (*ALWAYS_COMPUTED, *REWARDS_WITHOUT_TRUTH)
        names = [*(column.name for column in COLUMNS if column.name not in computed), "fid"]
        return dict.fromkeys(names, "no ground truth; give --truth, or records of source gt")
    flags = {
        "lpips": (config.lpips, "--lpips alexnet or --lpips vgg16 (extra: metrics)"),
        "clip_similarity": (config.clip_model, "--clip_model FOLDER, a CLIP model of transformers (extra: torch)"),
        "dino_similarity": (config.dino_model, "--dino_model FOLDER, a DINO model of transformers (extra: torch)"),
        "fid": (config.inception_weights, "--inception_weights FILE, a TorchScript Inception (extra: torch)"),
    }
    return {name: f"not requested; give {flag}" for name, (value, flag) in flags.items() if value is None}


def _check_sort_by(name: str, has_truth: bool, not_computed: Mapping[str, str]) -> None:
    excluded = {*not_computed, *(REWARDS_WITHOUT_TRUTH if has_truth else ())}
    names = [column.name for column in COLUMNS if column.name not in excluded]
    if name not in names:
        problem = f"not computed ({not_computed[name]})" if name in not_computed else "not a metric of this evaluation"
        raise DataError(f"--sort_by {name}: {problem}; expected one of {', '.join(names)}")


def _count_missing(rows: Sequence[Row]) -> dict[str, str]:
    """Return a message for each metric that some results lack: how many results lack it, and why."""
    reasons = {}
    for column in COLUMNS:
        count = sum(column.name in row and row[column.name] is None for row in rows)
        if count:
            reason = column.why_missing or "the value is not finite"
            reasons[column.name] = f"{count} of {len(rows)} results have no value: {reason}"
    return reasons


def _fid_warnings(fid: Fid | None) -> list[str]:
    if fid is None or min(fid.results, fid.truths) > fid.dimensions:
        return []
    return [
        f"fid: the FID is biased, because {fid.results} results and {fid.truths} ground truths are too few for "
        f"{fid.dimensions} feature dimensions; compare it only with an FID of equally many images"
    ]


def _print_summary(
    metrics: Mapping, fid: Fid | None, not_computed: Mapping[str, str], count: int, has_truth: bool
) -> None:
    with_truth = "with ground truth" if has_truth else "without ground truth: only metrics that do not need it"
    print(f"{count} results {with_truth}\n\n{table_text(metrics)}")
    if fid is not None:
        print(f"\nfid {fid.value:.3f} ({fid.results} results, {fid.truths} ground truths, lower is better)")
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in not_computed.items():
        names_by_reason.setdefault(reason, []).append(name)
    if names_by_reason:
        print("\nnot computed:")
    for reason, names in names_by_reason.items():
        print(f"  {', '.join(names)}: {reason}")


if __name__ == "__main__":
    main()
