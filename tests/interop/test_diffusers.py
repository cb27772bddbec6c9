"""Folders in diffusers' layout: what diffusers writes we read, what we write diffusers reads, bit for bit."""

import json
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

from ra_jax.errors import WeightError
from ra_jax.interop import safetensors_io as weight_files
from ra_jax.interop.diffusers import (
    load_flux,
    load_redux,
    load_vae,
    save_fill_pipeline_config,
    save_flux,
    save_redux,
    save_vae,
)
from ra_jax.interop.diffusers_tables import Rule, Table
from ra_jax.interop.hub import fingerprint, resolve
from ra_jax.interop.safetensors_io import StoredTensor
from ra_jax.interop.transfer import fill
from ra_jax.models.flux import Flux, FluxConfig
from ra_jax.models.lora import LoRAConfig
from ra_jax.models.siglip import Redux, ReduxConfig, SiglipConfig, preprocess
from ra_jax.models.vae import AutoencoderKL, VAEConfig
from ra_jax.parallel.partitioning import AXES, Placement

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

FLUX = FluxConfig(
    in_channels=28,
    out_channels=12,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=6,
    guidance_embeds=True,
    axes_dims_rope=(2, 2, 4),
)
VAE = VAEConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3, shift_factor=0.25)
VISION = SiglipConfig(
    hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
EMBEDDER = ReduxConfig(redux_dim=16, txt_in_features=24)
NO_TEXT = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A Fill and a Redux folder in one, written by diffusers and transformers with random float32 weights."""
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    models = {
        "transformer": diffusers.FluxTransformer2DModel.from_config(FLUX.to_dict()),
        "vae": diffusers.AutoencoderKL.from_config(VAE.to_dict()),
        "image_encoder": transformers.SiglipVisionModel(transformers.SiglipVisionConfig.from_dict(VISION.to_dict())),
        "image_embedder": diffusers.pipelines.flux.modeling_flux.ReduxImageEncoder(16, 24),
    }
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    return folder


def read_with_diffusers(folder, dtype=torch.float32):
    """State of every component in `folder`, through from_pretrained."""
    redux = diffusers.pipelines.flux.modeling_flux.ReduxImageEncoder
    models = {
        "transformer": diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype),
        "image_encoder": transformers.SiglipVisionModel.from_pretrained(folder / "image_encoder", dtype=dtype),
        "image_embedder": redux.from_pretrained(folder / "image_embedder", torch_dtype=dtype),
    }
    return {f"{name}.{key}": value for name, model in models.items() for key, value in model.state_dict().items()}


def assert_same(ours: dict, expected: dict):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name


def copy_with(theirs, folder, component, change):
    """`theirs` in `folder`, with `change` made to the tensors of one component."""
    shutil.copytree(theirs, folder, dirs_exist_ok=True)
    file = next((folder / component).glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_diffusers_to_us_to_diffusers_is_bit_equal(theirs, tmp_path, dtype):
    save_flux(load_flux(theirs, param_dtype=dtype), tmp_path)
    save_vae(load_vae(theirs, param_dtype=dtype), tmp_path)
    save_redux(load_redux(theirs, param_dtype=dtype), tmp_path)
    expected = read_with_diffusers(theirs, TORCH_DTYPES[dtype])
    assert_same(read_with_diffusers(tmp_path, TORCH_DTYPES[dtype]), expected)
    files = [load_file(file) for file in tmp_path.glob("*/*.safetensors")]
    assert {value.dtype for file in files for value in file.values()} == {jnp.dtype(dtype)}


def test_we_to_diffusers_to_us_is_bit_equal(tmp_path):
    made = {
        "transformer": (Flux(FLUX, rngs=nnx.Rngs(0)), save_flux, diffusers.FluxTransformer2DModel, load_flux),
        "vae": (AutoencoderKL(VAE, rngs=nnx.Rngs(1)), save_vae, diffusers.AutoencoderKL, load_vae),
    }
    for component, (ours, save, their_class, load) in made.items():
        save(ours, tmp_path / "ours")
        their_class.from_pretrained(tmp_path / "ours" / component).save_pretrained(tmp_path / "theirs" / component)
        back = load(tmp_path / "theirs")
        assert back.config == ours.config
        jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(ours))


def test_bfloat16_files_fill_float32_parameters(theirs, tmp_path):
    redux = load_redux(theirs, param_dtype=jnp.bfloat16)
    save_redux(redux, tmp_path)
    wide = load_redux(tmp_path)
    assert wide.embedder.redux_up.kernel.dtype == jnp.float32
    np.testing.assert_array_equal(wide.embedder.redux_up.kernel[...], redux.embedder.redux_up.kernel[...])


def test_shards_of_diffusers_are_read(theirs, tmp_path):
    model = diffusers.FluxTransformer2DModel.from_pretrained(theirs / "transformer")
    model.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_flux(tmp_path)), nnx.state(load_flux(theirs)))


def test_our_shards_are_read_by_diffusers_and_replace_earlier_files(theirs, tmp_path, monkeypatch):
    flux, redux = load_flux(theirs), load_redux(theirs)
    save_flux(flux, tmp_path)
    monkeypatch.setattr(weight_files, "SHARD_BYTES", 20_000)
    save_flux(flux, tmp_path)
    save_redux(redux, tmp_path)
    shutil.copytree(theirs / "vae", tmp_path / "vae")
    shards = list((tmp_path / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(file.stat().st_size < 25_000 for file in shards)
    assert len(list((tmp_path / "image_encoder").glob("model-*.safetensors"))) > 1
    assert_same(read_with_diffusers(tmp_path), read_with_diffusers(theirs))
    load_flux(tmp_path)


def test_folders_are_whole_pipelines(tmp_path):
    save_flux(Flux(FLUX, rngs=nnx.Rngs(0)), tmp_path / "fill")
    save_vae(AutoencoderKL(VAE, rngs=nnx.Rngs(0)), tmp_path / "fill")
    save_fill_pipeline_config(tmp_path / "fill", {"max_shift": 0.9})
    redux = Redux(VISION, EMBEDDER, rngs=nnx.Rngs(0))
    save_redux(redux, tmp_path / "redux")

    fill_pipe = diffusers.FluxFillPipeline.from_pretrained(tmp_path / "fill", **NO_TEXT)
    assert fill_pipe.vae.config.shift_factor == 0.25
    assert fill_pipe.scheduler.config.max_shift == 0.9
    assert fill_pipe.scheduler.config.use_dynamic_shifting
    redux_pipe = diffusers.FluxPriorReduxPipeline.from_pretrained(tmp_path / "redux")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8))
    theirs = redux_pipe.image_embedder(redux_pipe.encode_image(image, "cpu", 1)).image_embeds.detach().numpy()
    ours = redux(preprocess(tmp_path / "redux")(image)[None])
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_experts_are_fresh_and_are_not_saved(theirs, tmp_path):
    lora = LoRAConfig(num_experts=2, rank=3, target_modules=r"attn\.to_q$")
    flux = load_flux(theirs, lora=lora, rngs=nnx.Rngs(0))
    experts = nnx.to_flat_state(nnx.state(flux, nnx.LoRAParam))
    assert [path[-1] for path, _ in experts] == ["lora_a", "lora_b"] * 2
    for path, expert in experts:
        assert bool(jnp.any(expert[...])) == (path[-1] == "lora_a")
    save_flux(flux, tmp_path)
    base = nnx.state(load_flux(theirs))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_flux(tmp_path)), base)
    with pytest.raises(ValueError, match=r"rngs is None: expected nnx.Rngs"):
        load_flux(theirs, lora=lora)


def test_parameters_are_placed_one_by_one_and_tensors_read_once(theirs, monkeypatch):
    read = StoredTensor.read
    reads, placed = [], {}
    mesh = jax.make_mesh((1, 1, 1), AXES)

    def counted(self):
        reads.append(self.name)
        return read(self)

    class Watched(Placement):
        def put(self, name, value):
            placed[name.removeprefix("flux/").replace("/", ".")] = len(reads)
            return super().put(name, value)

    monkeypatch.setattr(StoredTensor, "read", counted)
    load_flux(theirs, placement=Watched(mesh))
    assert set(Counter(reads).values()) == {1}
    assert set(reads) == set(load_file(theirs / "transformer" / "diffusion_pytorch_model.safetensors"))
    # Between two placements only the blocks of one parameter are read.
    steps = dict(zip(placed, np.diff([0, *placed.values()]), strict=True))
    assert steps["x_embedder.kernel"] == 1
    assert steps["transformer_blocks.attn.to_q.kernel"] == FLUX.num_layers
    assert steps["single_transformer_blocks.proj_mlp.bias"] == FLUX.num_single_layers


def test_the_report_has_every_fault(theirs, tmp_path):
    def change(tensors):
        del tensors["x_embedder.bias"], tensors["transformer_blocks.1.attn.to_q.weight"]
        tensors["controlnet.weight"] = np.zeros((2, 3), np.float32)
        tensors["single_transformer_blocks.2.proj_mlp.bias"] = np.zeros(9, np.float32)

    with pytest.raises(WeightError) as error:
        load_flux(copy_with(theirs, tmp_path, "transformer", change))
    report = str(error.value)
    assert f"the tensors in {tmp_path / 'transformer'} are not those" in report
    assert "2 missing (the model needs them):\n  transformer_blocks.1.attn.to_q.weight [16, 16]\n" in report
    assert "  x_embedder.bias [16]\n" in report
    assert "1 left over (the model has no place for them):\n  controlnet.weight [2, 3]\n" in report
    assert "1 misshapen:\n  single_transformer_blocks.2.proj_mlp.bias [9], expected [64]\n" in report


def test_a_long_report_is_cut_and_counted(theirs, tmp_path):
    shutil.copytree(theirs, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(content | {"num_layers": 3}))
    with pytest.raises(WeightError) as error:
        load_flux(tmp_path)
    missing = [line for line in str(error.value).splitlines() if "  transformer_blocks.2." in line]
    assert "32 missing" in str(error.value)
    assert "  and 12 more" in str(error.value)
    assert len(missing) == 20


def test_a_tensor_beside_its_prefixed_name_is_left_over(theirs, tmp_path):
    def change(tensors):
        tensors.update({f"vision_model.{name}": tensors.pop(name) for name in list(tensors)})
        tensors["post_layernorm.bias"] = np.zeros(16, np.float32)

    with pytest.raises(WeightError, match=r"1 left over .*\n  post_layernorm.bias \[16\]"):
        load_redux(copy_with(theirs, tmp_path, "image_encoder", change))


def test_a_table_that_uses_a_tensor_twice_is_refused(theirs):
    abstract = nnx.eval_shape(lambda: AutoencoderKL(VAE, rngs=nnx.Rngs(0)))
    table = Table((Rule(r"(.+)\.(?:scale|bias)", r"\1.bias"), Rule(r"(.+)\.kernel", r"\1.weight")))
    with pytest.raises(WeightError, match=r"claimed by more than one parameter:\n  decoder.conv_norm_out.bias"):
        fill(abstract, theirs / "vae", table)
    with pytest.raises(KeyError, match="no rule for the parameter"):
        Table(()).tensor("encoder.conv_in.kernel")


def write_quantised(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.bias"] = np.zeros(tensors["decoder.conv_in.bias"].shape, np.int8)
    save_file(tensors, file)


def write_index_of_absent_shard(folder):
    index = {"weight_map": {"a": "part-1.safetensors"}}
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def write_broken_index(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")


def write_shards_that_overlap(folder):
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "vae" / "b.safetensors")
    index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "b.safetensors"}}
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def cut_file(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def change_config(key, value):
    def change(folder):
        file = folder / "vae" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write_quantised, r"1 of a type other than BF16, F16, F32, F64 .*\n  decoder.conv_in.bias I8\n"),
        (write_index_of_absent_shard, r"index.json names shards that are not there: part-1.safetensors; the download"),
        (
            write_shards_that_overlap,
            r"diffusion_pytorch_model.safetensors holds .*, as b.safetensors does: expected it once",
        ),
        (write_broken_index, r"index.json cannot be read \(KeyError\('weight_map'\)\): expected JSON with weight_map"),
        (cut_file, r"diffusion_pytorch_model.safetensors cannot be read \(.*\): download or write it again"),
        (lambda folder: next((folder / "vae").glob("*.safetensors")).unlink(), r"vae has no safetensors: expected one"),
        (
            lambda folder: (folder / "vae" / "config.json").unlink(),
            r"vae.config.json does not exist: expected the fold",
        ),
        (lambda folder: (folder / "vae" / "config.json").write_text("{"), r"vae.config.json: Expecting property name"),
        (change_config("_class_name", "VQModel"), r"config.json: it is of a VQModel, expected AutoencoderKL"),
        (change_config("norm_type", "spatial"), r"config.json: vae config: unknown key 'norm_type'"),
    ],
)
def test_damaged_folders_are_told(theirs, tmp_path, damage, message):
    shutil.copytree(theirs / "vae", tmp_path / "vae")
    damage(tmp_path)
    with pytest.raises(WeightError, match=message):
        load_vae(tmp_path)


def test_encoder_and_embedder_of_different_models_are_told(theirs, tmp_path):
    shutil.copytree(theirs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "image_embedder" / "config.json").write_text(json.dumps(ReduxConfig().to_dict()))
    with pytest.raises(WeightError, match=r"redux_dim is 1152: expected the image encoder's hidden_size, 16"):
        load_redux(tmp_path)


def test_resolve_takes_a_local_folder_as_it_is(theirs):
    assert resolve(str(theirs), ("transformer", "vae")) == theirs
    with pytest.raises(WeightError, match=r"has no scheduler/: expected a model in diffusers' layout with vae/, sched"):
        resolve(theirs, ("vae", "scheduler"))


def test_resolve_downloads_only_what_is_needed(theirs, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(theirs)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("someone/FLUX", ("transformer", "vae")) == theirs
    assert asked["repo_id"] == "someone/FLUX"
    assert asked["allow_patterns"] == ["transformer/*", "vae/*"]


def test_resolve_tells_a_missing_folder_from_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightError, match=r"there is no such folder here.*`python -m ra_jax.demo` makes"):
        resolve("output/demo/tiny_flux_fill", ("transformer", "vae"))


def test_resolve_says_how_to_get_access(tmp_path, monkeypatch):
    name = "black-forest-labs/FLUX.1-Fill-dev"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightError) as error:
        resolve(name, ("transformer", "vae"))
    message = str(error.value)
    assert f"pretrained model '{name}' cannot be had" in message
    assert "transformer/, vae/" in message
    assert f"accept the licence at https://huggingface.co/{name} and run `hf auth login`" in message
    assert "`python -m ra_jax.demo`" in message and "--config configs/tiny.toml`" in message


def test_fingerprint_follows_weights_and_config_only(theirs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(theirs, copy)
    (copy / "tokenizer").mkdir()
    (copy / "tokenizer" / "vocab.json").write_text("{}")
    (copy / "README.md").write_text("a model")
    original = fingerprint(theirs)
    assert len(original) == 16
    assert fingerprint(copy) == original

    def nudge(tensors):
        tensors["proj_out.weight"][-1, -1] += 1e-3

    assert fingerprint(copy_with(theirs, tmp_path / "nudged", "transformer", nudge)) != original
    change_config("scaling_factor", 0.5)(copy)
    assert fingerprint(copy) != original
    with pytest.raises(WeightError, match="has no safetensors in any of transformer/, vae/"):
        fingerprint(tmp_path)


def test_unknown_scheduler_values_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"scheduler has unknown keys \['shfit'\]: expected some of"):
        save_fill_pipeline_config(tmp_path, {"shfit": 1.0})
