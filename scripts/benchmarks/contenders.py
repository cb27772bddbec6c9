"""Run one contender of against_diffusers.py: a process that takes training steps of ra_jax or of diffusers on request.

    python scripts/benchmarks/contenders.py NAME GEOMETRY OPTIONS     as against_diffusers.py starts it

NAME is a key of `WORKERS`. GEOMETRY is JSON with the fields of `Geometry`. OPTIONS is JSON with gradient_checkpointing
and trace. The process first prints its facts. Then it takes a step for each line on stdin, and prints the seconds and
the memory of the step. All output is JSON, one object per line.

This file and against_diffusers.py share only this command line, because --our_python runs them in different
environments. A process of this file imports JAX or PyTorch, never both.
"""

import gc
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

EXPERTS = 3
# Part of a device's name -> peak of dense bfloat16 FLOP/s, from NVIDIA's data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Geometry:
    """Sizes of a transformer and of a batch."""

    heads: int  # attention heads
    head_dim: int  # features per head
    double: int  # double blocks
    single: int  # single blocks
    grid: tuple[int, int]  # rows and columns of the image tokens of a diptych
    context: int  # context tokens
    batch: int  # records
    joint_dim: int = 256  # features of a context token
    pooled_dim: int = 64  # features of the pooled text embedding
    rank: int = 16  # rank of each expert

    @property
    def tokens(self) -> int:
        """Number of image tokens of a diptych."""
        return self.grid[0] * self.grid[1]

    @property
    def axes(self) -> tuple[int, int, int]:
        """Number of features per head that each of the three axes of the rotary embedding rotates."""
        eighth = self.head_dim // 8
        return (eighth, (self.head_dim - eighth) // 2, (self.head_dim - eighth) // 2)

    def flux(self) -> dict:
        """Return config.json of the transformer, for latents with 16 channels and a VAE of factor 8."""
        return {
            "in_channels": 384,
            "out_channels": 64,
            "num_layers": self.double,
            "num_single_layers": self.single,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.joint_dim,
            "pooled_projection_dim": self.pooled_dim,
            "guidance_embeds": True,
            "axes_dims_rope": self.axes,
        }


@dataclass(frozen=True)
class Worker:
    """The training step of a contender.

    Attributes:
        step: takes one step and waits for its end.
        facts: compile time in seconds, number of trained parameters, FLOPs, versions.
        peak: returns the peak of memory in bytes since it was reset.
    """

    step: Callable[[], None]
    facts: dict
    peak: Callable[[], int]


def make_our_model(geometry: Geometry, experts: int, rank: int, remat: str):
    """Return model, trainable and frozen weights of ra_jax; all weights are random.

    Args:
        geometry: sizes.
        experts: number of experts.
        rank: rank of each expert.
        remat: --gradient_checkpointing on a GPU; on a CPU nothing is recomputed.
    """
    import jax
    import jax.numpy as jnp

    from ra_jax.config.settings import ExpertsConfig
    from ra_jax.models.attention import implementation_for
    from ra_jax.models.blocks import unstack_blocks
    from ra_jax.models.flux import FluxConfig
    from ra_jax.models.geometry import FillGeometry, abstract_fill_model, random_weights
    from ra_jax.models.options import ModelOptions, expert_configs
    from ra_jax.models.vae import VAEConfig

    on_gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    # A tiny VAE replaces FLUX's with its 84 M parameters, because a step that starts from latents does not use it.
    vae = VAEConfig(block_out_channels=(8,) * 4, latent_channels=16, norm_num_groups=4)
    mixture = ExpertsConfig(
        use_lora=True,
        num_experts=experts,
        lora_rank=rank,
        lora_alpha=float(rank),
        fixed_expert_weights=(1 / experts,) * experts,
    )
    model, *shapes = abstract_fill_model(
        FillGeometry(FluxConfig.from_dict(geometry.flux()), vae, None, None),
        ModelOptions(dtype, geometry.context, *expert_configs(mixture), remat=remat if on_gpu else "none"),
        attention=implementation_for(jax.default_backend(), dtype=dtype, head_dim=geometry.head_dim),
    )
    trainable, frozen = random_weights(shapes, jax.random.key(0))
    if not on_gpu:
        frozen["flux"] = unstack_blocks(frozen["flux"])  # as training does on a CPU
    return model, trainable, frozen


def make_our_experience(model, geometry: Geometry):
    """Return the experience of a standard step: one microbatch [1, B, ...] of random latents."""
    import jax
    import jax.numpy as jnp

    from ra_jax.models.conditioning import Condition
    from ra_jax.training.step.encode import EncodedBatch
    from ra_jax.training.step.experience import Experience

    rng = np.random.default_rng(0)
    b, n = geometry.batch, geometry.tokens

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    context = normal(b, geometry.context, geometry.joint_dim)
    masked = np.repeat(rng.random((b, n, 1)) < 0.3, 256, axis=-1)  # each token is masked as a whole
    fill = jnp.concatenate([normal(b, n, 64), jnp.asarray(masked, jnp.float32)], axis=-1)
    condition = Condition(fill, context, normal(b, geometry.pooled_dim), geometry.grid)
    region = jnp.full((b, n, 4), 1 / (4 * n), jnp.float32)
    encoded = EncodedBatch(condition, normal(b, n, 64), region)
    batch = {"record_id": jnp.arange(b), "mask": jnp.zeros((b, 1, 1), jnp.uint8)}
    batch |= {name: jnp.ones(b) for name in ("sample_weight", "condition_weight")}
    return jax.tree.map(lambda x: x[None], Experience(encoded, model.router_features(condition), batch))


def count_our_flops(geometry: Geometry, trainable: dict) -> float:
    """Compute the FLOPs of the model in a step, without recomputation."""
    from ra_jax.models.flops import ForwardCost, StepPasses, attention_flops, expert_flops, forward_flops, step_flops
    from ra_jax.models.flux import FluxConfig
    from ra_jax.parallel.partitioning import named_leaves

    flux, sizes = FluxConfig.from_dict(geometry.flux()), (geometry.tokens, geometry.context)
    shapes = {name: x.shape for name, x in named_leaves(trainable).items()}
    cost = ForwardCost(forward_flops(flux, *sizes), attention_flops(flux, *sizes), expert_flops(shapes, *sizes))
    return step_flops(cost, StepPasses(records=geometry.batch, policy_passes=0))


def make_our_step(geometry: Geometry, experts: int, rank: int, remat: str):
    """Return the step of ra_jax.train and its arguments: state, frozen weights, experience.

    Args:
        geometry: sizes.
        experts: number of experts.
        rank: rank of each expert.
        remat: --gradient_checkpointing on a GPU.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from ra_jax.config.parse import from_flat_dict
    from ra_jax.flow.schedule import FlowSchedule
    from ra_jax.training.build import objective_settings, step_settings
    from ra_jax.training.step.objective import Objective
    from ra_jax.training.step.state import init_state
    from ra_jax.training.step.train_step import StepDefinition, learn

    model, trainable, frozen = make_our_model(geometry, experts, rank, remat)
    config = from_flat_dict({"train_json_path": "none is read", "output_dir": "none is written"})  # a standard step
    objective = Objective(model, FlowSchedule(), objective_settings(config))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    options = {"seed": 0, "num_experts": experts, "temperature": 0.1}
    options |= {"with_old_params": False, "with_ema": False}
    state = jax.jit(lambda trainable: init_state(trainable, optimizer, **options))(trainable)
    program = StepDefinition(objective, optimizer, step_settings(config, ()))

    def learn_step(state, frozen, experience):
        return learn(program, state, frozen, experience, on_policy=jnp.asarray(True))

    return learn_step, (state, frozen, make_our_experience(model, geometry))


def make_our_worker(geometry: Geometry, experts: int, rank: int, options: dict) -> Worker:
    """Compile the step of ra_jax as ra_jax.train compiles it."""
    import jax

    from ra_jax.parallel.compilation import clear_jit_caches, compile_lowered

    learn_step, arguments = make_our_step(geometry, experts, rank, options["gradient_checkpointing"])
    start = time.perf_counter()
    lowered = jax.jit(learn_step, donate_argnums=0).lower(*arguments)
    compiled_step = compile_lowered(lowered, jax.default_backend())
    seconds = time.perf_counter() - start
    clear_jit_caches(jax.default_backend())  # as training does
    kind = jax.devices()[0].device_kind
    trainable = arguments[0].trainable["flux"]
    facts = {
        "versions": f"JAX {jax.__version__}",
        "compile": seconds,
        "trained": sum(x.size for x in jax.tree.leaves(trainable)),
        "flops": count_our_flops(geometry, trainable),
        "peak_flops": next((peak for name, peak in PEAKS.items() if name in kind), None),
    }
    state, *constants = arguments
    del arguments, trainable  # the step donates its state; another reference would keep a second copy

    def step() -> None:
        nonlocal state
        state, metrics = compiled_step(state, *constants)
        jax.block_until_ready(state)
        check_finite(float(metrics["base_loss"][-1]))

    def device_peak() -> int:
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]

    if options["trace"]:
        for _ in range(2):
            step()
        with jax.profiler.trace(options["trace"]):
            step()
    return Worker(step, facts, device_peak if jax.default_backend() == "gpu" else host_peak)


def make_their_model(geometry: Geometry, device: str, dtype):
    """Return diffusers' transformer with an active adapter for each expert, and the adapters' float32 parameters."""
    import torch
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = FluxTransformer2DModel(**geometry.flux()).requires_grad_(requires_grad=False)
    torch.set_default_dtype(torch.float32)
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name
    ]
    names = [f"expert_{i}" for i in range(EXPERTS)]
    for name in names:
        config = LoraConfig(r=geometry.rank, lora_alpha=geometry.rank, target_modules=layers)
        model.add_adapter(config, adapter_name=name)
    model.set_adapters(names, [1 / EXPERTS] * EXPERTS)
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in trained:
        parameter.requires_grad_(requires_grad=True)
        parameter.data = parameter.data.float()
    if device == "cuda":
        model.compile_repeated_blocks()  # torch.compile, as diffusers recommends
    return model.train(), trained


def make_their_inputs(geometry: Geometry, device: str):
    """Return random latents [B, N, 64], Fill channels [B, N, 320], and the other inputs of the transformer by name."""
    import torch

    b, n = geometry.batch, geometry.tokens

    def normal(*shape: int) -> "torch.Tensor":
        return torch.randn(*shape, device=device)

    clean, fill, context = normal(b, n, 64), normal(b, n, 320), normal(b, geometry.context, geometry.joint_dim)
    rows, columns = geometry.grid
    image_ids = torch.zeros(n, 3, device=device)
    image_ids[:, 1] = torch.arange(rows, device=device).repeat_interleave(columns)
    image_ids[:, 2] = torch.arange(columns, device=device).repeat(rows)
    named = {
        "encoder_hidden_states": context,
        "pooled_projections": normal(b, geometry.pooled_dim),
        "guidance": torch.full((b,), 30.0, device=device),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(geometry.context, 3, device=device),
    }
    return clean, fill, named


def make_their_worker(geometry: Geometry, options: dict) -> Worker:
    """Return the step of diffusers and PEFT; on a GPU it is compiled."""
    import torch

    device, on_gpu = ("cuda", True) if torch.cuda.is_available() else ("cpu", False)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model, trained = make_their_model(geometry, device, dtype)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=on_gpu)
    clean, fill, named = make_their_inputs(geometry, device)

    def step() -> None:
        noise, t = torch.randn_like(clean), torch.rand(len(clean), device=device)
        x = (1 - t)[:, None, None] * clean + t[:, None, None] * noise
        with torch.autocast(device, dtype, enabled=on_gpu):
            predicted = model(hidden_states=torch.cat([x, fill], -1), timestep=t, return_dict=False, **named)[0]
        loss = ((predicted.float() - (noise - clean)) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        check_finite(loss.item())

    facts = {"versions": f"PyTorch {torch.__version__}", "trained": sum(parameter.numel() for parameter in trained)}
    if on_gpu:
        facts |= compile_their_step(step, model, optimizer)
    return Worker(step, facts, torch.cuda.max_memory_allocated if on_gpu else host_peak)


def compile_their_step(step: Callable[[], None], model, optimizer) -> dict:
    """Take a first step on a GPU, which compiles; if memory runs out, recompute blocks and take it again.

    Returns:
        facts: the seconds of the step (`compile`), and whether blocks are recomputed (`recomputes`).
    """
    import torch

    start, fits = time.perf_counter(), True
    try:
        step()
    except torch.cuda.OutOfMemoryError:
        fits = False
    if not fits:  # after the except clause, because the exception holds memory
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        model.enable_gradient_checkpointing()
        start = time.perf_counter()
        step()
    torch.cuda.reset_peak_memory_stats()
    return {"compile": time.perf_counter() - start, "recomputes": model.is_gradient_checkpointing}


def check_finite(loss: float) -> None:
    """Exit if the loss is not finite: products with NaN or infinity take less time, so the step would be too fast."""
    if not math.isfinite(loss):
        sys.exit(f"loss = {loss}: expected a finite number; times with NaN or infinity are too low")


def host_peak() -> int:
    """Return the peak of this process's memory in bytes since it was reset."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


WORKERS = {  # the keys are the names that against_diffusers.py passes
    "ra_jax": lambda geometry, options: make_our_worker(geometry, EXPERTS, geometry.rank, options),
    "diffusers + PEFT": make_their_worker,
    "ra_jax, one LoRA": lambda geometry, options: make_our_worker(geometry, 1, EXPERTS * geometry.rank, options),
}


def serve_steps(contender: str, geometry: Geometry, options: dict) -> None:
    """Print a contender's facts; then take a step for each line on stdin and print its time and memory."""
    worker = WORKERS[contender](geometry, options)
    for _ in range(2):
        worker.step()
    facts = worker.facts | {"peak_before": host_peak() if worker.peak is host_peak else 0}
    facts["versions"] = f"Python {platform.python_version()}, {facts['versions']}"
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        worker.step()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak": worker.peak()}), flush=True)


def parse_geometry(text: str) -> Geometry:
    """Read a `Geometry` from its fields as JSON."""
    sizes = json.loads(text)
    return Geometry(**sizes | {"grid": tuple(sizes["grid"])})


if __name__ == "__main__":
    serve_steps(sys.argv[1], parse_geometry(sys.argv[2]), json.loads(sys.argv[3]))
