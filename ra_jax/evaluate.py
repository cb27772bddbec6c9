"""`python -m ra_jax.evaluate`: metrics of removals against ground truth, per image and in total."""

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
from ra_jax.data.formats import RECORDS
from ra_jax.data.images import read_mask, read_photo
from ra_jax.data.inputs import flag_inputs
from ra_jax.errors import DataError, UserError
from ra_jax.evaluation.measure import Evaluation, Fid, Networks
from ra_jax.evaluation.pairs import Pair, find_pairs
from ra_jax.evaluation.perceptual import LpipsNet, load_inception, load_lpips, load_transformer
from ra_jax.evaluation.table import BY_NAME, COLUMNS, Row, csv_text, summarize, table_text, worst_first
from ra_jax.outputs import Outputs, check_outputs, replace_file, write_file
from ra_jax.reporting.contact_sheet import captioned, thumbnail

METRICS, SUMMARY, SHEET = "metrics.csv", "summary.json", "contact_sheet.png"
WITHOUT_TRUTH = ("removal_without_target", "background_without_target")
ALWAYS = ("total_reward", "smoothness", "mask_area", "psnr_source_outside")
MAIN = ("removal", "background", *WITHOUT_TRUTH, "smoothness", "psnr", "psnr_mask", "ssim_mask", "lpips")
ID_WIDTH = 34  # characters of an id in one line of a caption


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
    """Parses the command line and runs the evaluation; a `UserError` is printed and ends it with exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    config = tyro.cli(EvaluateConfig, args=argv, prog="python -m ra_jax.evaluate", use_underscores=True)
    try:
        run(config)
    except UserError as error:
        sys.exit(f"error: {error}")


def run(config: EvaluateConfig) -> None:
    """Measures the results and writes the files; all settings and files are checked before anything is computed."""
    _check_values(config)
    output = _output_folder(config)
    pairs = find_pairs(config.results, config.truth, config.only)
    has_truth = pairs[0].truth is not None
    left_out = _not_asked_for(config, has_truth)
    _check_sort_by(config.sort_by, has_truth, left_out)
    networks = load_networks(config) if has_truth else Networks()

    weights = (config.removal_reward_weight, config.background_reward_weight, config.smoothness_reward_weight)
    evaluation = Evaluation(pairs, weights, networks)
    for _ in tqdm(evaluation.measure(), total=len(pairs), unit="image"):
        pass
    rows, fid = evaluation.rows, evaluation.fid()
    if networks.inception is not None and fid is None:
        left_out["fid"] = "fewer than two results, or two ground truths"
    left_out |= _no_value(rows)
    summary = {
        "settings": dataclasses.asdict(config),
        "pictures": len(pairs),
        "metrics": summarize(rows),
        "fid": None if fid is None else dataclasses.asdict(fid),
        "not_computed": left_out,
        "warnings": _warnings(fid),
    }
    output.mkdir(parents=True, exist_ok=True)
    # The summary is written first. It shows that the files are from an evaluation, even if the program is killed before
    # the last file: then --overwrite may still replace them.
    write_file(output / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_file(output / METRICS, csv_text(rows))
    if config.sheet_rows:
        sheet = draw_sheet(pairs, rows, config)
        with replace_file(output / SHEET) as draft:
            sheet.save(draft, "PNG")
    else:
        (output / SHEET).unlink(missing_ok=True)  # one of an earlier evaluation would not match the new rows
    for warning in summary["warnings"]:
        logging.warning(warning)
    _print(summary["metrics"], fid, left_out, len(pairs), has_truth)
    print(f"\n{output / METRICS}\n{output / SUMMARY}" + (f"\n{output / SHEET}" if config.sheet_rows else ""))


def load_networks(config: EvaluateConfig) -> Networks:
    """Loads the networks that the flags name.

    Raises:
        DataError: an extra is not installed, or weights do not exist or are of another kind.
    """

    def loaded(load, *arguments):
        return None if arguments[0] is None else load(*arguments)

    return Networks(
        lpips=loaded(load_lpips, config.lpips),
        inception=loaded(load_inception, config.inception_weights),
        clip=loaded(load_transformer, config.clip_model, "--clip_model"),
        dino=loaded(load_transformer, config.dino_model, "--dino_model"),
    )


def draw_sheet(pairs: Sequence[Pair], rows: Sequence[Row], config: EvaluateConfig) -> Image.Image:
    """Draws the worst `sheet_rows` results, one in each row: main metrics | source | mask | result | truth."""
    worst = worst_first(rows, config.sort_by)[: config.sheet_rows]
    titles = ("source", "mask", "result", *(("truth",) if pairs[0].truth is not None else ()))

    def panels(pair: Pair) -> list[np.ndarray]:
        mask = Image.fromarray(read_mask(pair.mask))
        photos = [read_photo(path) for path in (pair.src, pair.result, pair.truth) if path is not None]
        return [thumbnail(image, config.thumbnail) for image in (photos[0], mask, *photos[1:])]

    shown = list(dict.fromkeys((config.sort_by, "total_reward", *MAIN)))
    captions = [_caption(rows[i], shown) for i in worst]
    return captioned(captions, [panels(pairs[i]) for i in worst], titles)


def _caption(row: Row, names: Sequence[str]) -> list[str]:
    identity = str(row["id"])
    lines = [identity[at : at + ID_WIDTH] for at in range(0, len(identity), ID_WIDTH)]
    figures = [(BY_NAME[name], row[name]) for name in names if row.get(name) is not None]
    return lines + [f"{column.name} {value:.{column.digits}f} {column.unit}".rstrip() for column, value in figures]


def _check_values(config: EvaluateConfig) -> None:
    if lines := list(out_of_range(config)):
        raise DataError("\n".join(lines))


def _output_folder(config: EvaluateConfig) -> Path:
    """Returns the output folder, if its three files can be written or --overwrite may replace them.

    Raises:
        OutputError: an output file or folder is an input, contains one or lies in one.
        DataError: one of the files already exists, and --overwrite is not given or no evaluation wrote the file.
    """
    output = Path(config.output_dir)
    files = [output / name for name in (METRICS, SUMMARY, SHEET)]
    records = Path(config.results) / RECORDS  # exists in a folder that ra_jax.infer wrote
    weights = {name: getattr(config, name) for name in ("inception_weights", "clip_model", "dino_model")}
    inputs, nested = flag_inputs(
        {
            "--results": config.results,
            f"--results ({RECORDS})": records if records.is_file() else None,
            "--truth": config.truth,
        }
    )
    nested |= {f"--{name}": [Path(path)] for name, path in weights.items() if path is not None}
    check_outputs(Outputs("--output_dir", output, files), inputs, nested)
    there = [file for file in files if file.exists() or file.is_symlink()]
    if there and not _is_summary(output / SUMMARY):
        raise DataError(
            f"{there[0]}: is there already, and {output} holds no {SUMMARY} of an earlier evaluation; move it, or "
            "choose another --output_dir"
        )
    if there and not config.overwrite:
        raise DataError(f"{there[0]}: is there already; choose another --output_dir, or add --overwrite")
    return output


def _is_summary(file: Path) -> bool:
    """Returns whether an evaluation wrote the file, that is, whether it is a JSON object with settings and metrics."""
    if not file.is_file():
        return False
    try:
        summary = json.loads(file.read_bytes())
    except ValueError:  # not JSON, or not text
        return False
    return isinstance(summary, dict) and {"settings", "metrics"} <= summary.keys()


def _not_asked_for(config: EvaluateConfig, has_truth: bool) -> dict[str, str]:
    """Returns the metrics that will not be computed, each with the reason."""
    if not has_truth:
        wanted = [column.name for column in COLUMNS if column.name not in (*ALWAYS, *WITHOUT_TRUTH)]
        return dict.fromkeys([*wanted, "fid"], "no ground truth: give --truth, or records of source gt")
    needs = {
        "lpips": (config.lpips, "--lpips alexnet or --lpips vgg16 (extra: metrics)"),
        "clip_similarity": (config.clip_model, "--clip_model FOLDER, a CLIP of transformers (extra: torch)"),
        "dino_similarity": (config.dino_model, "--dino_model FOLDER, a DINO of transformers (extra: torch)"),
        "fid": (config.inception_weights, "--inception_weights FILE, an Inception as TorchScript (extra: torch)"),
    }
    return {name: f"not asked for: give {flag}" for name, (given, flag) in needs.items() if given is None}


def _check_sort_by(name: str, has_truth: bool, left_out: Mapping[str, str]) -> None:
    names = [c.name for c in COLUMNS if c.name not in left_out and not (has_truth and c.name in WITHOUT_TRUTH)]
    if name not in names:
        why = f" ({left_out[name]})" if name in left_out else ""
        raise DataError(f"--sort_by {name}: not computed{why}; expected one of {', '.join(names)}")


def _no_value(rows: Sequence[Row]) -> dict[str, str]:
    """Returns, for each metric that some results lack, how many of them lack it and why."""
    told = {}
    for column in COLUMNS:
        missing = sum(column.name in row and row[column.name] is None for row in rows)
        if missing:
            told[column.name] = f"{missing} of {len(rows)} pictures have none: {column.absent or 'not finite'}"
    return told


def _warnings(fid: Fid | None) -> list[str]:
    if fid is None or min(fid.results, fid.truths) > fid.dimensions:
        return []
    return [
        f"fid: {fid.results} results and {fid.truths} ground truths, but {fid.dimensions} feature dimensions: such an "
        "FID is biased, and comparable only with one of as many pictures"
    ]


def _print(summary: Mapping, fid: Fid | None, left_out: Mapping[str, str], count: int, has_truth: bool) -> None:
    against = "against their ground truth" if has_truth else "without ground truth: rewards and masks only"
    print(f"{count} results {against}\n\n{table_text(summary)}")
    if fid is not None:
        print(f"\nfid {fid.value:.3f} ({fid.results} results, {fid.truths} ground truths, lower is better)")
    reasons: dict[str, list[str]] = {}
    for name, why in left_out.items():
        reasons.setdefault(why, []).append(name)
    if reasons:
        print("\nnot computed:")
    for why, names in reasons.items():
        print(f"  {', '.join(names)}: {why}")


if __name__ == "__main__":
    main()
