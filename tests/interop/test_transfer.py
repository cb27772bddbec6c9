"""Loading of tensors into parameters, one parameter after another, and the report of all mismatches."""

import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from ra_jax.errors import WeightError
from ra_jax.interop.diffusers import load_flux, load_redux, load_vae, save_redux
from ra_jax.interop.diffusers_tables import Rule, Table
from ra_jax.interop.safetensors_io import StoredTensor
from ra_jax.interop.transfer import load_parameters
from ra_jax.models.vae import AutoencoderKL
from ra_jax.parallel.partitioning import AXES, Placement


def test_bfloat16_files_can_be_loaded_into_float32_parameters(model_folder, tmp_path):
    redux = load_redux(model_folder, param_dtype=jnp.bfloat16)
    save_redux(redux, tmp_path)
    float32_redux = load_redux(tmp_path)
    assert float32_redux.embedder.redux_up.kernel.dtype == jnp.float32
    np.testing.assert_array_equal(float32_redux.embedder.redux_up.kernel[...], redux.embedder.redux_up.kernel[...])


def test_parameters_are_placed_one_by_one_and_each_tensor_is_read_once(models, model_folder, monkeypatch):
    original_read = StoredTensor.read
    read_names, reads_before = [], {}
    mesh = jax.make_mesh((1, 1, 1), AXES)

    def count_read(self):
        read_names.append(self.name)
        return original_read(self)

    class CountingPlacement(Placement):
        def put(self, name, value):
            reads_before[name.removeprefix("flux/").replace("/", ".")] = len(read_names)
            return super().put(name, value)

    monkeypatch.setattr(StoredTensor, "read", count_read)
    load_flux(model_folder, placement=CountingPlacement(mesh))
    assert set(Counter(read_names).values()) == {1}
    assert set(read_names) == set(load_file(model_folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    # Only the tensors of one parameter are read between two placements.
    reads_of = dict(zip(reads_before, np.diff([0, *reads_before.values()]), strict=True))
    config = models.flux.config
    assert reads_of["x_embedder.kernel"] == 1
    assert reads_of["transformer_blocks.attn.to_q.kernel"] == config.num_layers
    assert reads_of["single_transformer_blocks.proj_mlp.bias"] == config.num_single_layers


def test_the_report_lists_every_mismatch(copied_folder, change_tensors):
    def change(tensors):
        del tensors["x_embedder.bias"], tensors["transformer_blocks.1.attn.to_q.weight"]
        tensors["controlnet.weight"] = np.zeros((2, 3), np.float32)
        tensors["single_transformer_blocks.2.proj_mlp.bias"] = np.zeros(9, np.float32)

    change_tensors(copied_folder, "transformer", change)
    with pytest.raises(WeightError) as error:
        load_flux(copied_folder)
    report = str(error.value)
    assert f"the tensors in {copied_folder / 'transformer'} do not match the config.json there" in report
    assert "2 missing (the model needs them):\n  transformer_blocks.1.attn.to_q.weight [16, 16]\n" in report
    assert "  x_embedder.bias [16]\n" in report
    assert "1 unexpected (the model has no parameters for them):\n  controlnet.weight [2, 3]\n" in report
    assert "1 of the wrong shape:\n  single_transformer_blocks.2.proj_mlp.bias [9], expected [64]\n" in report


def test_a_long_report_lists_twenty_tensors_and_counts_the_others(copied_folder):
    file = copied_folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": 3}))
    with pytest.raises(WeightError) as error:
        load_flux(copied_folder)
    missing = [line for line in str(error.value).splitlines() if "  transformer_blocks.2." in line]
    assert "32 missing" in str(error.value)
    assert "  and 12 more" in str(error.value)
    assert len(missing) == 20


def test_quantized_files_are_refused(copied_folder, change_tensors):
    def quantize(tensors):
        tensors["decoder.conv_in.bias"] = np.zeros(tensors["decoder.conv_in.bias"].shape, np.int8)

    change_tensors(copied_folder, "vae", quantize)
    message = r"1 of a dtype other than BF16, F16, F32, F64 .*\n  decoder.conv_in.bias I8\n"
    with pytest.raises(WeightError, match=message):
        load_vae(copied_folder)


def test_tensor_names_may_lack_their_common_prefix(model_folder, copied_folder, change_tensors):
    def without_prefix(tensors):
        tensors.update({name.removeprefix("vision_model."): tensors.pop(name) for name in list(tensors)})

    change_tensors(copied_folder, "image_encoder", without_prefix)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(load_redux(copied_folder)), nnx.state(load_redux(model_folder))
    )


def test_a_name_without_prefix_is_unexpected_if_other_names_have_it(copied_folder, change_tensors):
    def change(tensors):
        tensors["post_layernorm.bias"] = np.zeros(16, np.float32)

    change_tensors(copied_folder, "image_encoder", change)
    with pytest.raises(WeightError, match=r"1 unexpected .*\n  post_layernorm.bias \[16\]"):
        load_redux(copied_folder)


def test_a_table_must_map_each_parameter_to_its_own_tensor(models, model_folder):
    abstract = nnx.eval_shape(lambda: AutoencoderKL(models.vae.config, rngs=nnx.Rngs(0)))
    table = Table((Rule(r"(.+)\.(?:scale|bias)", r"\1.bias"), Rule(r"(.+)\.kernel", r"\1.weight")))
    with pytest.raises(WeightError, match=r"used by more than one parameter:\n  decoder.conv_norm_out.bias"):
        load_parameters(abstract, model_folder / "vae", table)
    with pytest.raises(KeyError, match=r"no rule matches the parameter .*: add one in ra_jax/interop/diffusers_tables"):
        Table(()).find_tensor("encoder.conv_in.kernel")
