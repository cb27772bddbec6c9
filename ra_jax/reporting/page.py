"""`report.html`: a self-contained page about a run, made from the files in the run's folder."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from ra_jax.config.parse import from_checkpoint, to_flat_dict
from ra_jax.config.settings import TrainConfig
from ra_jax.outputs import write_file
from ra_jax.reporting.charts import Chart, Rows, area_chart, color, line_chart, number
from ra_jax.reporting.curves import DRIFT, GATES, USAGE, recorded_panels
from ra_jax.reporting.preview_strip import preview_strip
from ra_jax.reporting.trackers import METRICS_FILE, read_rows
from ra_jax.version import __version__

REPORT = "report.html"
LIMIT = 8_000_000  # bytes: largest size of the page; the previews may use what its other parts leave
MARKUP = 10_000  # bytes reserved for the parts of the page that `write_report` does not count, such as the <head>
HERE = Path(__file__).parent
MODES = {
    "standard": "standard: imitates results",
    "human": "human: learns from the records' scores",
    "automatic": "automatic: learns from computed rewards",
}
KEY_FIGURES = {
    "train_loss": "Total loss",
    "base_loss": "Base loss",
    "policy_loss": "Policy loss",
    "mean_reward": "Mean reward",
    "held_out_flow_loss": "Held-out flow loss",
    "mean_ratio": "Mean ratio ρ",
    "clip_fraction_at_sync": "Clipped before a renewal",
    "velocity_norm_ratio": "Velocity norm, to the base",
    "kl_to_base": "KL to the base",
    "reward_fallbacks": "Reward fallbacks",
    "grad_norm": "Gradient norm",
    "step_time": "Seconds a step",
    "images_per_second": "Records a second",
}
NOTES = {
    "Ratio": "1 where the old policy has just been renewed",
    "Velocity norm, to the base": "starts at 1; a steady climb means drift",
    "KL to the base": "squared distance to the base's velocity",
    DRIFT: "growth of the held-out flow loss over the base's",
    "Gradient norm": "before clipping",
    "Seconds a step": "the first includes compilation",
    USAGE: "fraction of scenes whose largest gate it is",
    GATES: "mean gates",
}
OF_THE_DATA = "of the data's records, not the model's results"
REFERENCES = {"Ratio": 1.0, "Velocity norm, to the base": 1.0}
# Charts with a logarithmic value axis, if their values span more than a factor of 20.
LOGARITHMIC = ("Gradient norm", "Seconds a step")


def write_report(
    output_dir: Path, config: TrainConfig | Mapping[str, Any], expert_names: Sequence[str], ending: str
) -> Path:
    """Writes `report.html` into a run's folder; returns its path.

    Args:
        output_dir: the run's folder with metrics.jsonl, previews/step_<n>.png and config.toml; each may be missing.
        config: the run's settings, or the result of `to_flat_dict` for them.
        expert_names: the names of experts 0, 1, ... in the metrics.
        ending: how the run ended, such as "completed" or "stopped by SIGTERM".
    """
    if not isinstance(config, TrainConfig):
        config = from_checkpoint(config)
    metrics = output_dir / METRICS_FILE
    rows = read_rows(metrics) if metrics.exists() else []
    name = output_dir.resolve().name
    charts, curves = curve_sections(rows, expert_names, config)
    head = [
        f'<header><p class="kind">Training run</p><h1>{escape(name)}</h1>',
        f'<p class="ending">{escape(ending)}</p>{facts(rows, config)}</header>',
        key_figures(rows),
    ]
    tail = [settings(config), reproduction(output_dir, config), foot()]
    style, script = ((HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    data = json.dumps([chart.data for chart in charts], separators=(",", ":")).replace("<", "\\u003c")
    frame = len("".join([*head, curves, *tail, style, script, data]).encode())
    previews = section("Previews", preview_strip(output_dir / "previews", LIMIT - frame - MARKUP))
    path = output_dir / REPORT
    write_file(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f"<title>{escape(name)}: training run</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join([*head, previews, curves, *tail])
        + '\n</main>\n<dialog id="viewer"><figure><img alt=""><figcaption></figcaption></figure></dialog>\n'
        f'<script type="application/json" id="curves">{data}</script>\n<script>\n{script}</script>\n</body>\n</html>\n',
    )
    return path


def facts(rows: Rows, config: TrainConfig) -> str:
    """Returns a list of mode, recorded steps and time in steps; the time is left out if it is not known."""
    found = {"Mode": MODES.get(config.mode, config.mode)}
    done = rows[-1]["step"] if rows else 0
    total = config.run.max_train_steps
    found["Steps recorded"] = f"{done} of {total}" if total else f"{done}"
    if (seconds := time_in_steps(rows)) is not None:
        since = "" if rows[0]["step"] == 1 else f" from step {rows[0]['step']} on"
        found["Time in steps"] = f"{duration(seconds)}{since}, without loading and previews"
    items = (f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in found.items())
    return f'<dl class="facts">{"".join(items)}</dl>'


def time_in_steps(rows: Rows) -> float | None:
    """Returns the total duration of the steps [s]; None if there are no rows or a row has no `step_time`.

    The `step_time` of a row is the mean over the steps since the row before. The first row is that of a single step,
    the first of the run.
    """
    if not rows or any("step_time" not in row for row in rows):
        return None
    before = [rows[0]["step"] - 1, *(row["step"] for row in rows)]
    return sum((row["step"] - last) * row["step_time"] for row, last in zip(rows, before, strict=False))


def duration(seconds: float) -> str:
    """Formats a duration in two units, such as 3 h 20 min or 11 min 40 s; below a minute as 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def key_figures(rows: Rows) -> str:
    """Returns the section with the last and the first value of each metric in `KEY_FIGURES`."""
    tiles = []
    for name, label in KEY_FIGURES.items():
        recorded = [row for row in rows if name in row]
        if not recorded:
            continue
        first, last = recorded[0], recorded[-1]
        late = "" if last is rows[-1] else f" (step {last['step']})"
        beside = f"{exactly(first[name])} at step {first['step']}" if first is not last else f"step {first['step']}"
        tiles.append(
            f'<div class="tile"><dt>{escape(label)}<code>{name.replace("_", "_<wbr>")}</code></dt>'
            f'<dd class="last">{exactly(last[name])}{late}</dd><dd class="first">{beside}</dd></div>'
        )
    if not tiles:
        return section("Key figures", '<p class="note">No metrics were recorded.</p>')
    note = (
        f'<p class="note">Last recorded, and below it the first. The last row is that of step {rows[-1]["step"]}.</p>'
    )
    return section("Key figures", f'<dl class="tiles">{"".join(tiles)}</dl>{note}')


def curve_sections(rows: Rows, expert_names: Sequence[str], config: TrainConfig) -> tuple[list[Chart], str]:
    """Returns all charts of the run, and the section that shows them in the same order."""
    charts, figures = [], []
    references = REFERENCES | {DRIFT: config.run.max_drift}
    for title, names in recorded_panels(rows, expert_names).items():
        if title == GATES:
            if not any(all(name in row for name in names) for row in rows):
                continue
            chart = area_chart(rows, names)
        else:
            chart = line_chart(rows, names, log=title in LOGARITHMIC, reference=references.get(title))
        notes = [NOTES[title]] if title in NOTES else []
        if config.mode == "human" and title in ("Reward", "Scores"):
            notes.append(OF_THE_DATA)
        if title == DRIFT and config.run.max_drift is not None:
            notes.append("dashed: max_drift")
        if chart.data["y"][-1]:
            notes.append("logarithmic")
        charts.append(chart)
        figures.append(panel(title, "; ".join(notes), list(names.values()), chart))
    if not figures:
        return [], ""
    hint = '<p class="note">Point at a curve, or tap it, to read all of them at that step; arrow keys move on.</p>'
    return charts, section("Curves", f'{hint}<div class="panels">{"".join(figures)}</div>')


def panel(title: str, note: str, labels: Sequence[str], chart: Chart) -> str:
    """Returns a chart with its title, note and legend.

    The legend shows the last values. The page's script replaces them by the values at the pointer.
    """
    entries = []
    for i, (label, values) in enumerate(zip(labels, chart.data["values"], strict=True)):
        last = next((value for value in reversed(values) if value is not None), None)
        shown = "" if last is None else exactly(last)
        entries.append(f'<li class="{color(i)}"><span>{escape(label)}</span> <b>{shown}</b></li>')
    aside = f"<small>{escape(note)}</small>" if note else ""
    return (
        f'<figure class="panel"><figcaption>{escape(title)} <span class="at"></span>{aside}</figcaption>'
        f'{chart.svg}<ul class="legend">{"".join(entries)}</ul></figure>'
    )


def settings(config: TrainConfig) -> str:
    """Returns the section with all settings by group; those that differ from their defaults are marked."""
    flat, standard = to_flat_dict(config), defaults()
    changed = [name for name in standard if flat[name] != standard[name]]
    bodies = []
    for group in dataclasses.fields(TrainConfig):
        lines = [f'<tr class="group"><th colspan="3" scope="rowgroup">{escape(group.name)}</th></tr>']
        for field in dataclasses.fields(getattr(config, group.name)):
            name, mark = field.name, ' class="changed"' if field.name in changed else ""
            default = (
                f"<td>{shown_setting(standard[name])}</td>" if name in standard else "<td><i>has to be given</i></td>"
            )
            lines.append(
                f'<tr{mark}><th scope="row"><code>{name}</code></th><td>{shown_setting(flat[name])}</td>{default}</tr>'
            )
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    return section(
        "Settings",
        f"<details><summary>{len(flat)} settings, {len(changed)} of them other than the default</summary>"
        '<label class="only"><input type="checkbox"> only those</label><div class="wide"><table class="settings">'
        '<thead><tr><th scope="col">Setting</th><th scope="col">Value</th><th scope="col">Default</th></tr></thead>'
        f"{''.join(bodies)}</table></div></details>",
    )


def defaults() -> dict[str, Any]:
    """Returns the default of every setting that has one, by the names of `to_flat_dict`."""
    groups = TrainConfig.__dataclass_fields__.values()
    fields = (field for group in groups for field in dataclasses.fields(group.type))
    given = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def shown_setting(value: Any) -> str:
    """Formats a setting's value as HTML: "on", "off", "not set", or the value itself."""
    if value is None or value == []:
        return "<i>not set</i>"
    if isinstance(value, bool):
        return "on" if value else "off"
    return escape(" ".join(map(str, value)) if isinstance(value, list) else str(value))


def reproduction(output_dir: Path, config: TrainConfig) -> str:
    """Returns the section with the command that repeats the run, if the folder has the run's config.toml."""
    file = output_dir / "config.toml"
    if not file.exists():
        return section(
            "To run it again",
            '<p class="note">The folder has no config.toml; the settings above are those of the run.</p>',
        )
    command = f"python -m ra_jax.train --config {shlex.quote(str(file))} --output_dir NEW_FOLDER"
    note = (
        f'<p class="note">The same data, random numbers and order: seed {config.run.seed}. To go on with this run '
        "instead, replace <code>--output_dir NEW_FOLDER</code> by <code>--resume_from_checkpoint latest</code>.</p>"
    )
    return section("To run it again", f"<pre><code>{escape(command)}</code></pre>{note}")


def section(title: str, content: str) -> str:
    """Returns a section of the page; `content` is HTML."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def exactly(value: float) -> str:
    """Returns `value` as a `<data>` element: rounded for readers, exact in the attribute `value` for programs."""
    return f'<data value="{value!r}">{number(value)}</data>'


def foot() -> str:
    """Returns the footer with the time of writing and the version of ra_jax."""
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return f"<footer>Written {written} by ra_jax {escape(__version__)}</footer>"
