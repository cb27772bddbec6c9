"""Where weights are found, on disk or on the hub, and the fingerprint of what is in them."""

import json

import pytest

from ra_jax.errors import WeightError
from ra_jax.interop.hub import fingerprint, resolve_folder


def test_resolve_takes_a_local_folder_as_it_is(folder):
    assert resolve_folder(str(folder), ("transformer", "vae")) == folder
    with pytest.raises(WeightError, match=r"has no scheduler/: expected a model in diffusers' layout with vae/, sched"):
        resolve_folder(folder, ("vae", "scheduler"))


def test_resolve_downloads_only_what_is_needed(folder, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_folder("someone/FLUX", ("transformer", "vae")) == folder
    assert asked["repo_id"] == "someone/FLUX"
    assert asked["allow_patterns"] == ["transformer/*", "vae/*"]


def test_resolve_tells_a_missing_folder_from_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightError, match=r"this folder does not exist.*`python -m ra_jax.demo` creates"):
        resolve_folder("output/demo/tiny_flux_fill", ("transformer", "vae"))


def test_resolve_says_how_to_get_access(tmp_path, monkeypatch):
    name = "black-forest-labs/FLUX.1-Fill-dev"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightError) as error:
        resolve_folder(name, ("transformer", "vae"))
    message = str(error.value)
    assert f"pretrained model '{name}' could not be loaded" in message
    assert "transformer/, vae/" in message
    assert f"accept the license at https://huggingface.co/{name} and run `hf auth login`" in message
    assert "`python -m ra_jax.demo`" in message and "--config configs/tiny.toml`" in message


def test_fingerprint_does_not_see_what_is_no_weight(folder, copied_folder):
    (copied_folder / "tokenizer").mkdir()
    (copied_folder / "tokenizer" / "vocab.json").write_text("{}")
    (copied_folder / "README.md").write_text("a model")
    assert len(fingerprint(folder)) == 16
    assert fingerprint(copied_folder) == fingerprint(folder)


def test_fingerprint_follows_weights(folder, copied_folder, change_tensors):
    def nudge(tensors):
        tensors["proj_out.weight"][-1, -1] += 1e-3

    change_tensors(copied_folder, "transformer", nudge)
    assert fingerprint(copied_folder) != fingerprint(folder)


def test_fingerprint_follows_the_config(folder, copied_folder, tmp_path):
    file = copied_folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.5}))
    assert fingerprint(copied_folder) != fingerprint(folder)
    with pytest.raises(WeightError, match=r"has no \.safetensors files: .* of transformer/, vae/"):
        fingerprint(tmp_path)
