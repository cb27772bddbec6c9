"""How the folder of a model is found or downloaded, and the fingerprint of its weights and configs."""

import json

import pytest

from ra_jax.errors import WeightError
from ra_jax.interop.hub import fingerprint, resolve_folder


def test_a_local_folder_is_returned_if_it_has_all_components(model_folder):
    assert resolve_folder(str(model_folder), ("transformer", "vae")) == model_folder
    with pytest.raises(WeightError, match=r"has no scheduler/: expected a model in diffusers' layout with vae/, sched"):
        resolve_folder(model_folder, ("vae", "scheduler"))


def test_only_the_required_components_are_downloaded(model_folder, monkeypatch):
    request = {}

    def snapshot_download(repo_id, **options):
        request.update(options, repo_id=repo_id)
        return str(model_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_folder("someone/FLUX", ("transformer", "vae")) == model_folder
    assert request["repo_id"] == "someone/FLUX"
    assert request["allow_patterns"] == ["transformer/*", "vae/*"]


def test_a_missing_local_folder_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightError, match=r"this folder does not exist.*`python -m ra_jax.demo` creates"):
        resolve_folder("output/demo/tiny_flux_fill", ("transformer", "vae"))


def test_the_message_for_a_failed_download_says_how_to_get_access(tmp_path, monkeypatch):
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


def test_the_fingerprint_ignores_files_that_are_neither_weights_nor_configs(model_folder, copied_folder):
    (copied_folder / "tokenizer").mkdir()
    (copied_folder / "tokenizer" / "vocab.json").write_text("{}")
    (copied_folder / "README.md").write_text("a model")
    assert len(fingerprint(model_folder)) == 16
    assert fingerprint(copied_folder) == fingerprint(model_folder)


def test_the_fingerprint_depends_on_the_weights(model_folder, copied_folder, change_tensors):
    def nudge(tensors):
        tensors["proj_out.weight"][-1, -1] += 1e-3

    change_tensors(copied_folder, "transformer", nudge)
    assert fingerprint(copied_folder) != fingerprint(model_folder)


def test_the_fingerprint_depends_on_the_config_and_requires_weights(model_folder, copied_folder, tmp_path):
    file = copied_folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.5}))
    assert fingerprint(copied_folder) != fingerprint(model_folder)
    with pytest.raises(WeightError, match=r"has no \.safetensors files: .* of transformer/, vae/"):
        fingerprint(tmp_path)
