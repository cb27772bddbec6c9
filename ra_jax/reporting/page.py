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
from ra_jax.reporting.charts import Chart, Rows, area_chart, color_class, format_number, line_chart
from ra_jax.reporting.curves import DRIFT_TITLE, GATES_TITLE, HELD_OUT_TITLE, USAGE_TITLE, recorded_charts
from ra_jax.reporting.preview_strip import preview_strip
from ra_jax.reporting.trackers import METRICS_FILE, read_rows
from ra_jax.version import __version__

REPORT_FILE = "report.html"
MAX_PAGE_BYTES = 8_000_000  # maximum size of the page; the previews get what the other parts of the page leave
RESERVED_BYTES = 10_000  # for the parts of the page that `write_report` does not count, such as the <head>
ASSETS_DIR = Path(__file__).parent  # with report.css and report.js
MODE_DESCRIPTIONS = {
    "standard": "standard: imitates the records' results",
    "human": "human: learns from the records' scores",
    "automatic": "automatic: learns from rewards of generated images",
}
KEY_FIGURES = {
    "held_out_reward": "Held-out reward",
    "train_loss": "Total loss",
    "base_loss": "Base loss",
    "policy_loss": "Policy loss",
    "mean_reward": "Mean reward",
    "held_out_flow_loss": "Held-out flow loss",
    "mean_ratio": "Mean ratio ρ",
    "clip_fraction_at_sync": "Clip fraction before a sync",
    "velocity_norm_ratio": "Velocity norm relative to the base",
    "kl_to_base": "KL to the base",
    "reward_fallbacks": "Reward fallbacks",
    "grad_norm": "Gradient norm",
    "step_time": "Seconds per step",
    "images_per_second": "Records per second",
}
CHART_NOTES = {
    "Ratio": "1 right after a sync of the old policy",
    "Velocity norm relative to the base": "starts at 1; a steady increase means drift",
    "KL to the base": "mean squared difference from the base's velocity",
    HELD_OUT_TITLE: "of removals of held-out scenes; the checkpoint of the highest is in best/",
    "Distance from the reference": "levels off where the policy comes to rest",
    DRIFT_TITLE: "relative increase of the held-out flow loss over its lowest value so far",
    "Gradient norm": "before clipping",
    "Seconds per step": "the first step includes compilation",
    USAGE_TITLE: "fraction of conditions for which the expert has the largest gate",
    GATES_TITLE: "mean gate of each expert",
}
DATA_SCORES_NOTE = "of the records in the data, not of generated images"
REFERENCE_VALUES = {"Ratio": 1.0, "Velocity norm relative to the base": 1.0}
# Charts with a logarithmic value axis, if their values span more than a factor of 20.
LOG_CHARTS = ("Gradient norm", "Seconds per step")


def write_report(
    output_dir: Path, config: TrainConfig | Mapping[str, Any], expert_names: Sequence[str], ending: str
) -> Path:
    """Write `report.html` into a run's folder, and return the path of the page.

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
    charts, curves_section = render_curves(rows, expert_names, config)
    top = [
        f'<header><p class="kind">Training run</p><h1>{escape(name)}</h1>',
        f'<p class="ending">{escape(ending)}</p>{render_facts(rows, config)}</header>',
        render_key_figures(rows),
    ]
    bottom = [render_settings(config), render_command(output_dir, config), render_footer()]
    style, script = ((ASSETS_DIR / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    data = json.dumps([chart.data for chart in charts], separators=(",", ":")).replace("<", "\\u003c")
    size = len("".join([*top, curves_section, *bottom, style, script, data]).encode())
    strip = preview_strip(output_dir / "previews", MAX_PAGE_BYTES - size - RESERVED_BYTES)
    previews_section = render_section("Previews", strip)
    path = output_dir / REPORT_FILE
    write_file(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f"<title>{escape(name)}: training run</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join([*top, previews_section, curves_section, *bottom])
        + '\n</main>\n<dialog id="viewer"><figure><img alt=""><figcaption></figcaption></figure></dialog>\n'
        f'<script type="application/json" id="curves">{data}</script>\n<script>\n{script}</script>\n</body>\n</html>\n',
    )
    return path


def render_facts(rows: Rows, config: TrainConfig) -> str:
    """Return the HTML list of mode, recorded steps and time in steps. The time is left out if it is not known."""
    facts = {"Mode": MODE_DESCRIPTIONS.get(config.mode, config.mode)}
    last_step = rows[-1]["step"] if rows else 0
    total = config.run.max_train_steps
    facts["Steps recorded"] = f"{last_step} of {total}" if total else f"{last_step}"
    if (seconds := time_in_steps(rows)) is not None:
        first_step = min(row["step"] for row in rows if row["step"] > 0)
        since = "" if first_step == 1 else f" from step {first_step} on"
        excluded = "model loading, looks and drift measurements"
        facts["Time in steps"] = f"{format_duration(seconds)}{since}, excluding {excluded}"
    items = (f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())
    return f'<dl class="facts">{"".join(items)}</dl>'


def time_in_steps(rows: Rows) -> float | None:
    """Return the total duration of the steps [s]; None if there are no rows or a row has no `step_time`.

    The `step_time` of a row is the mean over the steps since the previous row. The first row covers a single step, the
    first step of the run. Rows with nothing but held-out measurements do not count: a run writes them before its first
    step, and when it is resumed.
    """
    rows = [row for row in rows if "train_loss" in row or not any(name.startswith("held_out_") for name in row)]
    if not rows or any("step_time" not in row for row in rows):
        return None
    previous_steps = [rows[0]["step"] - 1, *(row["step"] for row in rows)]
    return sum((row["step"] - previous) * row["step_time"] for row, previous in zip(rows, previous_steps, strict=False))


def format_duration(seconds: float) -> str:
    """Format a duration in two units, such as 3 h 20 min or 11 min 40 s; below a minute as 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def render_key_figures(rows: Rows) -> str:
    """Return the section with the last and the first value of each metric in `KEY_FIGURES`."""
    tiles = []
    for name, label in KEY_FIGURES.items():
        recorded = [row for row in rows if name in row]
        if not recorded:
            continue
        first, last = recorded[0], recorded[-1]
        last_step = "" if last is rows[-1] else f" (step {last['step']})"
        first_step = f"step {first['step']}"
        first_value = first_step if first is last else f"{render_value(first[name])} at {first_step}"
        tiles.append(
            f'<div class="tile"><dt>{escape(label)}<code>{name.replace("_", "_<wbr>")}</code></dt>'
            f'<dd class="last">{render_value(last[name])}{last_step}</dd><dd class="first">{first_value}</dd></div>'
        )
    if not tiles:
        return render_section("Key figures", '<p class="note">No metrics were recorded.</p>')
    note = (
        '<p class="note">Each tile shows the last recorded value of a metric and, below it, the first. The last row '
        f"is from step {rows[-1]['step']}.</p>"
    )
    return render_section("Key figures", f'<dl class="tiles">{"".join(tiles)}</dl>{note}')


def render_curves(rows: Rows, expert_names: Sequence[str], config: TrainConfig) -> tuple[list[Chart], str]:
    """Return all charts of the run, and the section of the page that shows them in the same order."""
    charts, figures = [], []
    references = REFERENCE_VALUES | {DRIFT_TITLE: config.run.max_drift}
    for title, labels in recorded_charts(rows, expert_names).items():
        if title == GATES_TITLE:
            if not any(all(metric in row for metric in labels) for row in rows):
                continue
            chart = area_chart(rows, labels)
        else:
            chart = line_chart(rows, labels, log=title in LOG_CHARTS, reference=references.get(title))
        notes = [CHART_NOTES[title]] if title in CHART_NOTES else []
        if config.mode == "human" and title in ("Reward", "Scores"):
            notes.append(DATA_SCORES_NOTE)
        if title == DRIFT_TITLE and config.run.max_drift is not None:
            notes.append("dashed line: max_drift")
        if chart.data["y"][-1]:
            notes.append("logarithmic axis")
        charts.append(chart)
        figures.append(render_chart(title, "; ".join(notes), list(labels.values()), chart))
    if not figures:
        return [], ""
    hint = (
        '<p class="note">Point at a chart, or tap it, to show the values of all charts at that step. The arrow keys '
        "move to other steps.</p>"
    )
    return charts, render_section("Curves", f'{hint}<div class="panels">{"".join(figures)}</div>')


def render_chart(title: str, note: str, labels: Sequence[str], chart: Chart) -> str:
    """Return a chart with its title, note and legend.

    The legend shows the last value of each metric. The page's script replaces it by the value at the pointer.
    """
    entries = []
    for i, (label, values) in enumerate(zip(labels, chart.data["values"], strict=True)):
        last = next((value for value in reversed(values) if value is not None), None)
        value = "" if last is None else render_value(last)
        entries.append(f'<li class="{color_class(i)}"><span>{escape(label)}</span> <b>{value}</b></li>')
    small_note = f"<small>{escape(note)}</small>" if note else ""
    return (
        f'<figure class="panel"><figcaption>{escape(title)} <span class="at"></span>{small_note}</figcaption>'
        f'{chart.svg}<ul class="legend">{"".join(entries)}</ul></figure>'
    )


def render_settings(config: TrainConfig) -> str:
    """Return the section with all settings by group; those that differ from their defaults are marked."""
    values, defaults = to_flat_dict(config), default_settings()
    changed = [name for name in defaults if values[name] != defaults[name]]
    bodies = []
    for group in dataclasses.fields(TrainConfig):
        lines = [f'<tr class="group"><th colspan="3" scope="rowgroup">{escape(group.name)}</th></tr>']
        for field in dataclasses.fields(getattr(config, group.name)):
            name, row_class = field.name, ' class="changed"' if field.name in changed else ""
            default = format_setting(defaults[name]) if name in defaults else "<i>required</i>"
            lines.append(
                f'<tr{row_class}><th scope="row"><code>{name}</code></th><td>{format_setting(values[name])}</td>'
                f"<td>{default}</td></tr>"
            )
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    return render_section(
        "Settings",
        f"<details><summary>{len(values)} settings, of which {len(changed)} differ from their defaults</summary>"
        '<label class="only"><input type="checkbox"> show only settings that differ from their defaults</label>'
        '<div class="wide"><table class="settings">'
        '<thead><tr><th scope="col">Setting</th><th scope="col">Value</th><th scope="col">Default</th></tr></thead>'
        f"{''.join(bodies)}</table></div></details>",
    )


def default_settings() -> dict[str, Any]:
    """Return the default of every setting that has one, by flat name (`to_flat_dict`)."""
    groups = TrainConfig.__dataclass_fields__.values()
    fields = (field for group in groups for field in dataclasses.fields(group.type))
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}


def format_setting(value: Any) -> str:
    """Format a setting's value as HTML: "on", "off", "not set", or the value itself."""
    if value is None or value == []:
        return "<i>not set</i>"
    if isinstance(value, bool):
        return "on" if value else "off"
    return escape(" ".join(map(str, value)) if isinstance(value, list) else str(value))


def render_command(output_dir: Path, config: TrainConfig) -> str:
    """Return the section with the command that repeats the run, if the folder has the run's config.toml."""
    title = "Repeat this run"
    config_file = output_dir / "config.toml"
    if not config_file.exists():
        return render_section(
            title, '<p class="note">The folder has no config.toml. The settings of the run are listed above.</p>'
        )
    command = f"python -m ra_jax.train --config {shlex.quote(str(config_file))} --output_dir NEW_FOLDER"
    note = (
        '<p class="note">The command uses the same data in the same order and the same random numbers (seed '
        f"{config.run.seed}). To continue this run instead, replace <code>--output_dir NEW_FOLDER</code> with "
        "<code>--resume_from_checkpoint latest</code>.</p>"
    )
    return render_section(title, f"<pre><code>{escape(command)}</code></pre>{note}")


def render_section(title: str, content: str) -> str:
    """Return a section of the page; `content` is HTML."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def render_value(value: float) -> str:
    """Return a `<data>` element: its text is the rounded value, and its attribute `value` has the exact value."""
    return f'<data value="{value!r}">{format_number(value)}</data>'


def render_footer() -> str:
    """Return the footer with the time of writing and the version of ra_jax."""
    time = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return f"<footer>Written on {time} by ra_jax {escape(__version__)}</footer>"
