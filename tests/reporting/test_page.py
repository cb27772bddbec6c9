"""`report.html`: it is well-formed and self-contained, and shows the values in the run's files."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ra_jax.config.parse import from_checkpoint, to_flat_dict, to_toml
from ra_jax.reporting import page as report_page
from ra_jax.reporting.charts import MAX_POINTS, format_number, line_chart, thin_rows
from ra_jax.reporting.contact_sheet import contact_sheet
from ra_jax.reporting.page import format_duration, time_in_steps, write_report
from ra_jax.reporting.preview_strip import preview_strip

VOID = {"meta", "img", "br", "wbr", "input"}
EXPERTS = ("fast", "careful")


class Page(HTMLParser):
    """The elements, text and script of a page. Fails if a tag is not closed, or is closed by another tag."""

    def __init__(self, text):
        super().__init__()
        self.text, self.elements, self.words, self.script, self._open = text, [], [], "", []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.script += data
        elif self._open and self._open[-1] != "style":
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def shown(self):
        return " ".join(" ".join(self.words).split())

    @property
    def curves(self):
        return json.loads(re.search(r'<script type="application/json" id="curves">(.*?)</script>', self.text)[1])


def rows_of(steps):
    """Makes rows as a run in human mode writes them; only every second row has `velocity_norm_ratio`."""
    noise = np.random.default_rng(0)
    rows = []
    for i, step in enumerate(steps):
        row = {"step": step, "train_loss": 1 / step, "base_loss": 2 / step, "mean_reward": float(noise.normal())}
        row |= {
            "removal_score": 0.5,
            "lpips_score": 0.25,
            "kl_to_base": 1e-5 * step,
            "step_time": 60.0 if i == 0 else 2.0,
        }
        row |= {f"routing_expert_{k}_usage": float(k == 0) for k in range(2)}
        row |= {"routing_expert_0_weight": 0.6, "routing_expert_1_weight": 0.4}
        rows.append(row | ({"velocity_norm_ratio": 1.0 + 0.001 * i} if i % 2 else {}))
    return rows


def write_rows(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_sheet(folder, step, sizes, color=(200, 100, 50)):
    """Writes a sheet with a scene for each (height, width): black masks, results of one color, the rest noise."""
    noise = np.random.default_rng(1)
    scenes = []
    for size in sizes:
        source, truth = noise.integers(0, 255, (2, *size, 3), np.uint8)
        scenes.append((source, np.zeros((*size, 3), np.uint8), np.full((*size, 3), color, np.uint8), truth))
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(scenes).save(folder / f"step_{step:06d}.png")


def config_of(folder, **changed):
    return from_checkpoint({"train_json_path": "data.json", "output_dir": str(folder), **changed})


def page_of(folder, config=None, experts=EXPERTS, ending="finished"):
    path = write_report(folder, config or config_of(folder), experts, ending)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def pictures(html):
    """Decodes the embedded images."""
    uris = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB") for uri in uris]


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run: rows, previews of two scenes, settings."""
    folder = tmp_path / "street"
    write_rows(folder, rows_of([1, *range(10, 210, 10)]))
    for step in (0, 100, 200):
        write_sheet(folder / "previews", step, [(96, 96), (96, 96)], color=(step, 50, 50))
    (folder / "config.toml").write_text(to_toml(config_of(folder)))
    return folder


def test_the_page_needs_nothing_else(run):
    page = page_of(run)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "base", "a")
        assert "href" not in attributes
        assert attributes.get("src", "data:").startswith("data:")
    assert "http://" not in page.text and "https://" not in page.text
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", page.text)
    assert page.shown.startswith("street: training run Training run street finished")


def test_it_shows_the_first_and_the_last_value_of_the_rows(run):
    page = page_of(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tiles = re.findall(r'<div class="tile">(.*?)</div>', page.text)
    shown = {}
    for tile in tiles:
        name = re.search(r"<code>(.*?)</code>", tile)[1].replace("<wbr>", "")
        shown[name] = [float(value) for value in re.findall(r'<data value="(.*?)">', tile)]
    for name in ("train_loss", "base_loss", "mean_reward", "kl_to_base", "step_time"):
        assert shown[name] == [rows[-1][name], rows[0][name]]
    assert shown["velocity_norm_ratio"] == [rows[-2]["velocity_norm_ratio"], rows[1]["velocity_norm_ratio"]]
    assert "1.019 (step 190)" in page.shown and "1.001 at step 10" in page.shown
    assert "policy_loss" not in shown


def test_curves_have_a_point_for_every_row_that_recorded_the_metric(run):
    page = page_of(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    titles = re.findall(r'<figure class="panel"><figcaption>(.*?) <span', page.text)
    drawn = [
        re.findall(r'<polyline class="[^"]+" points="(.*?)"', svg) for svg in re.findall(r"<svg.*?</svg>", page.text)
    ]
    points = {title: [len(line.split()) for line in lines] for title, lines in zip(titles, drawn, strict=True)}
    assert points["Loss"] == [21, 21]
    assert points["Scores"] == [21, 21]  # removal_score, and lpips_score by the pattern *_score
    assert points["Velocity norm relative to the base"] == [10]
    assert points["Expert usage"] == [21, 21]
    loss = page.curves[titles.index("Loss")]
    assert loss["steps"] == [row["step"] for row in rows]
    assert loss["values"] == [
        pytest.approx([row[name] for row in rows], rel=1e-5) for name in ("train_loss", "base_loss")
    ]
    gates = page.curves[titles.index("Expert weight")]
    assert gates["stacked"] and gates["values"] == [[0.6] * 21, [0.4] * 21]
    assert len(page.all("polygon")) == 2
    assert "fast 0.6 careful 0.4" in page.shown


def test_a_line_lies_where_its_values_are():
    chart = line_chart([{"step": 0, "a": 0.0}, {"step": 1, "a": 5.0}, {"step": 4, "a": 10.0}], {"a": "a"})
    (x0, y0), (x1, y1), (x2, y2) = (
        map(float, point.split(",")) for point in re.search(r'points="(.*?)"', chart.svg)[1].split()
    )
    assert (x1 - x0) / (x2 - x0) == pytest.approx(1 / 4, abs=1e-3)
    assert y0 > y1 > y2 and (y1 - y0) / (y2 - y0) == pytest.approx(1 / 2, abs=1e-2)


def test_drift_is_drawn_with_its_limit(tmp_path):
    write_rows(tmp_path, [{"step": step, "held_out_flow_drift": 0.001 * step} for step in (1, 10, 20)])
    free, limited = (page_of(tmp_path, config_of(tmp_path, max_drift=limit)) for limit in (None, 0.05))
    lines = [[line for line in page.all("line") if line["class"] == "reference"] for page in (free, limited)]
    assert [len(found) for found in lines] == [0, 1]
    low, high, start, end, _ = limited.curves[0]["y"]
    assert float(lines[1][0]["y1"]) == pytest.approx(start + (end - start) * (0.05 - low) / (high - low), abs=0.1)
    assert "dashed line: max_drift" in limited.shown and "dashed" not in free.shown


@pytest.mark.parametrize(
    "rows",
    [None, [], rows_of([1]), rows_of([1, 2]), [{"step": 5}], [{"step": 1, "train_loss": 1.0}, {"step": 2, "lr": 1e-4}]],
    ids=["no file", "no row", "one row", "two rows", "a row without metrics", "different metrics"],
)
@pytest.mark.parametrize("experts", [EXPERTS, ()])
def test_a_page_of_little_is_whole(tmp_path, rows, experts):
    if rows is not None:
        write_rows(tmp_path, rows)
    page = page_of(tmp_path, experts=experts, ending="stopped: drift")
    assert "stopped: drift" in page.shown
    assert "This run has no previews." in page.shown
    assert "The folder has no config.toml" in page.shown
    assert ("No metrics were recorded." in page.shown) == (not rows or rows == [{"step": 5}])
    assert "nan" not in page.text.lower().split("</style>")[1].split("<script")[0]


def test_a_line_that_was_cut_short_is_passed_over(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 210, "train_l')
    assert "Steps recorded 200" in page_of(run).shown


def test_what_users_name_is_escaped(tmp_path):
    nasty = '<img src="http://x"> & </script>'
    folder = tmp_path / "<b>a & b"
    write_rows(folder, rows_of([1, 2]))
    (folder / "config.toml").write_text("")
    page = page_of(folder, config_of(folder, train_json_path=nasty), (nasty, "'\""), ending=f"failed: {nasty}")
    assert len(page.all("img")) == 1  # only the viewer has one
    assert len(page.all("b")) == len(page.all("li"))  # only the legends' values are <b>
    assert page.shown.startswith("<b>a & b: training run Training run <b>a & b failed: " + nasty)
    assert page.shown.count(nasty) >= 4  # ending, two legends, the setting
    assert 'src="http' not in page.text


def test_settings_other_than_the_default_are_marked(tmp_path):
    config = config_of(tmp_path, learning_rate=3e-4, expert_names=["a", "b"], num_experts=2, use_human_scores=True)
    page = page_of(tmp_path, config)
    lines = re.findall(r'<tr( class="changed")?><th scope="row"><code>(\w+)</code></th><td>(.*?)</td>', page.text)
    assert [name for _, name, _ in lines] == list(to_flat_dict(config))
    changed = {name: value for mark, name, value in lines if mark}
    assert changed == {"learning_rate": "0.0003", "expert_names": "a b", "num_experts": "2", "use_human_scores": "on"}
    assert "Mode human: learns from the records' scores" in page.shown


def test_settings_may_come_as_a_flat_dict(run):
    config = config_of(run, max_train_steps=400)
    pages = [page_of(run, given).text.split("<footer>")[0] for given in (config, to_flat_dict(config))]
    assert pages[0] == pages[1]
    assert "200 of 400" in pages[0]


def test_the_command_repeats_the_run(tmp_path):
    folder = tmp_path / "two words"
    folder.mkdir()
    (folder / "config.toml").write_text("")
    shown = page_of(folder).shown
    assert f"python -m ra_jax.train --config '{folder / 'config.toml'}' --output_dir NEW_FOLDER" in shown


def test_previews_are_cut_into_a_row_a_scene(run):
    page = page_of(run)
    captions = ["source", "mask", "step 0", "step 100", "step 200", "ground truth"]
    assert re.findall(r'<th scope="col">([^<]+)</th>', page.text.split("</table>")[0]) == captions
    shown = pictures(page.text)
    assert len(shown) == 2 * len(captions)
    assert {image.size for image in shown} == {(96, 96)}
    for scene in range(2):
        row = shown[scene * len(captions) :]
        assert [row[i].getpixel((48, 48)) for i in (2, 3, 4)] == [(0, 50, 50), (100, 50, 50), (200, 50, 50)]
        assert np.asarray(row[1]).max() == 0


def test_scenes_of_different_shapes_are_cut_to_their_own(tmp_path):
    write_sheet(tmp_path, 0, [(96, 128), (128, 96), (112, 112)])
    shown = pictures(preview_strip(tmp_path, 10**7))
    assert [image.size for image in shown[::4]] == [(128, 96), (96, 128), (112, 112)]
    assert all(np.ptp(np.asarray(shown[i]).reshape(-1, 3), axis=0).max() == 0 for i in (2, 6, 10))


def test_pictures_of_another_make_are_shown_whole(tmp_path):
    Image.new("RGB", (301, 77), "red").save(tmp_path / "step_000003.png")
    html = preview_strip(tmp_path, 10**7)
    assert [image.size for image in pictures(html)] == [(301, 77)]
    assert ">step 3<" in html


def test_a_preview_that_was_cut_short_is_named(run):
    whole = (run / "previews" / "step_000200.png").read_bytes()
    (run / "previews" / "step_000200.png").write_bytes(whole[: len(whole) // 2])
    page = page_of(run)
    assert "step_000200.png could not be read." in page.shown
    assert "step 100" in page.shown and len(pictures(page.text)) == 10


def test_many_steps_are_thinned_and_that_is_said(tmp_path):
    for step in range(0, 300, 10):
        write_sheet(tmp_path, step, [(192, 192)])
    html = preview_strip(tmp_path, 10**7)
    assert "12 of 30 steps are shown" in html and ">step 0<" in html and ">step 290<" in html
    small = preview_strip(tmp_path, len(html) - 500)
    assert pictures(small) and len(small) < len(html)
    assert "too large for this page" in preview_strip(tmp_path, 1000)


def test_the_page_stays_below_its_limit(run, monkeypatch):
    for step in (0, 100, 200):
        write_sheet(run / "previews", step, [(512, 512)] * 2)
    assert (run / "previews" / "step_000000.png").stat().st_size > 2_000_000
    free = page_of(run)
    monkeypatch.setattr(report_page, "MAX_PAGE_BYTES", 300_000)
    bound = page_of(run)
    assert len(bound.text.encode()) <= 300_000 < len(free.text.encode()) < 8_000_000
    assert pictures(bound.text)


def test_of_many_rows_the_extremes_remain():
    rows = [{"step": i, "loss": 1.0, "other": 2.0} for i in range(10_000)]
    rows[777]["loss"], rows[4321]["other"] = 9.0, -3.0
    kept = thin_rows(rows, ("loss", "other"))
    assert len(kept) <= MAX_POINTS + 2
    assert [kept[0]["step"], kept[-1]["step"]] == [0, 9999]
    assert rows[777] in kept and rows[4321] in kept


def test_time_is_the_rows_means_by_their_steps():
    rows = rows_of([1, 10, 20])
    assert time_in_steps(rows) == 60.0 + 9 * 2.0 + 10 * 2.0
    assert time_in_steps(rows_of([501, 510])) == 60.0 + 9 * 2.0  # a run that starts at step 501
    assert time_in_steps([rows[0], {"step": 10}]) is None
    look = {"held_out_reward": 0.1, "look_seconds": 9.0}  # before the first step, and when the run was resumed
    assert time_in_steps([{"step": 0} | look, *rows[:2], {"step": 10} | look, rows[2]]) == time_in_steps(rows)
    assert time_in_steps([]) is None
    assert [format_duration(seconds) for seconds in (4.2, 59.99, 98, 12_040)] == [
        "4.2 s",
        "60.0 s",
        "1 min 38 s",
        "3 h 20 min",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.12239, "0.1224"), (1e-4, "1e−4"), (-2.5e-5, "−2.5e−5"), (1.5e7, "1.5e7"), (100.0, "100")],
)
def test_numbers_are_written_short(value, text):
    assert format_number(value) == text
