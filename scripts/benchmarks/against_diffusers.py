"""Is a training step faster than diffusers' with PEFT on the same machine?

    python scripts/benchmarks/against_diffusers.py [--rounds 7] [--geometries tiny small wide]
    python scripts/benchmarks/against_diffusers.py --geometries flux flux_6
        on a GPU: FLUX.1-Fill's own sizes, 512 x 1024, with four and with six photos

LoRA of three experts on the linear layers of all blocks, the standard step from latents on: interpolate, predict the
velocity, flow-matching loss, gradient of the experts, AdamW. Ours is the step that trains, router and diversity loss
included; theirs is FluxTransformer2DModel with three active adapters, each weighted by a third. Both compute in
float32 on a CPU, in bfloat16 on a GPU: there their blocks are compiled (torch.compile), and recomputed only where
memory runs out; ours keep what --gradient_checkpointing says. Each contender is a process of its own; they take
turns, one step each, so that both see the same machine; at FLUX's own sizes, where two do not fit a GPU, one after
the other. A third is ours with one LoRA of the same total rank.

It prints medians, ratios, peak memory of the steps (the process's, and in all, compiling included; on a GPU the
device's), on a GPU that it knows the share of its peak that model FLOPs make (MFU: forward, gradient with respect to
activations and to the experts, no recomputation), and how compile time grows with the number of blocks.
"""

import gc
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tyro

EXPERTS = 3
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16 FLOP/s without sparsity, by their data sheets


@dataclass(frozen=True)
class Geometry:
    """Sizes of a transformer and of a batch."""

    heads: int
    head_dim: int
    double: int
    single: int
    grid: tuple[int, int]
    context: int
    batch: int
    joint_dim: int = 256
    pooled_dim: int = 64
    rank: int = 16  # of each expert
    alone: bool = False  # contenders do not fit the device together

    @property
    def axes(self) -> tuple[int, int, int]:
        eighth = self.head_dim // 8
        return (eighth, (self.head_dim - eighth) // 2, (self.head_dim - eighth) // 2)

    def flux(self) -> dict:
        """config.json of the transformer: latents of 16 channels, a VAE of factor 8."""
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


GEOMETRIES = {
    "tiny": Geometry(heads=4, head_dim=64, double=2, single=4, grid=(16, 16), context=64, batch=2),
    "small": Geometry(heads=8, head_dim=64, double=3, single=6, grid=(16, 32), context=128, batch=1),
    "wide": Geometry(heads=8, head_dim=128, double=2, single=4, grid=(16, 32), context=128, batch=1),
}
FLUX = Geometry(
    heads=24,
    head_dim=128,
    double=19,
    single=38,
    grid=(32, 64),
    context=512 + 729,  # prompt and Redux tokens
    batch=4,
    joint_dim=4096,
    pooled_dim=768,
    rank=64,
    alone=True,
)
LARGE = {"flux": FLUX, "flux_6": replace(FLUX, batch=6)}


@dataclass(frozen=True)
class Bench:
    """rounds: timed steps of each contender, after two that are not; geometries: of `GEOMETRIES` and `LARGE`;
    contenders: all, or some of them, ours among them; gradient_checkpointing: ours, on a GPU; compile_blocks: numbers
    of blocks whose compile times are compared, or none; json: also write the figures there; trace: a folder for a
    profile of one step of ours."""

    rounds: int = 7
    geometries: tuple[str, ...] = tuple(GEOMETRIES)
    contenders: tuple[str, ...] = ("ra_jax", "diffusers + PEFT", "ra_jax, one LoRA")
    gradient_checkpointing: str = "products"
    compile_blocks: tuple[int, ...] = (8, 57)
    json: Path | None = None
    trace: Path | None = None


def ours(geometry: Geometry, experts: int, rank: int, options: dict):
    """A function that takes one step and waits for it."""
    import jax
    import jax.numpy as jnp
    import optax

    from ra_jax.checkpoints import named_leaves
    from ra_jax.flow.schedule import FlowSchedule
    from ra_jax.models.attention import implementation_for
    from ra_jax.models.blocks import blocks_apart
    from ra_jax.models.conditioning import Condition
    from ra_jax.models.flux import FluxConfig
    from ra_jax.models.geometry import FillGeometry, abstract_fill_model, random_weights
    from ra_jax.models.lora import LoRAConfig
    from ra_jax.models.router import RouterConfig
    from ra_jax.models.vae import VAEConfig
    from ra_jax.parallel.compilation import compiled, forget_traces
    from ra_jax.training.flops import attention_flops, expert_flops, forward_flops, step_flops
    from ra_jax.training.step.encode import Encoded
    from ra_jax.training.step.experience import Experience
    from ra_jax.training.step.objective import Objective
    from ra_jax.training.step.state import init_state
    from ra_jax.training.step.train_step import StepSettings, learn

    on_gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    flux = FluxConfig.from_dict(geometry.flux())
    # The transformer's own VAE would have 84 M parameters that no step from latents on touches.
    vae = VAEConfig(block_out_channels=(8,) * 4, latent_channels=16, norm_num_groups=4)
    model, *shapes = abstract_fill_model(
        FillGeometry(flux, vae, None, None),
        lora=LoRAConfig(experts, rank, float(rank)),
        router=RouterConfig(num_experts=experts, fixed_weights=(1 / experts,) * experts),
        dtype=dtype,
        attention=implementation_for(jax.default_backend(), dtype=dtype, head_dim=geometry.head_dim),
        remat=options["gradient_checkpointing"] if on_gpu else "none",
        text_tokens=geometry.context,
    )
    trainable, frozen = random_weights(shapes, jax.random.key(0))
    if not on_gpu:
        frozen["flux"] = blocks_apart(frozen["flux"])  # as training does on a CPU
    objective = Objective(model, FlowSchedule())
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    begin = {"seed": 0, "num_experts": experts, "temperature": 0.1, "with_snapshot": False, "with_ema": False}
    state = jax.jit(lambda trainable: init_state(trainable, optimizer, **begin))(trainable)
    rng = np.random.default_rng(0)
    b, n = geometry.batch, geometry.grid[0] * geometry.grid[1]

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    context = normal(b, geometry.context, geometry.joint_dim)
    masked = np.repeat(rng.random((b, n, 1)) < 0.3, 256, axis=-1)  # whole tokens
    fill = jnp.concatenate([normal(b, n, 64), jnp.asarray(masked, jnp.float32)], axis=-1)
    condition = Condition(fill, context, normal(b, geometry.pooled_dim), geometry.grid)
    region = jnp.full((b, n, 4), 1 / (4 * n), jnp.float32)
    encoded = Encoded(condition, normal(b, n, 64), region)
    features = model.router_features(condition)
    batch = {"record_id": jnp.arange(b), "mask": jnp.zeros((b, 1, 1), jnp.uint8)}
    batch |= {name: jnp.ones(b) for name in ("imitation_weight", "condition_weight")}
    batch, experience = jax.tree.map(lambda x: x[None], (batch, Experience(encoded, features)))
    settings = StepSettings()

    def step(state, frozen, batch, experience):
        return learn(objective, optimizer, settings, state, frozen, batch, experience, fresh=jnp.asarray(True))

    since = time.perf_counter()
    arguments = (state, frozen, batch, experience)
    program = compiled(jax.jit(step, donate_argnums=0).lower(*arguments), jax.default_backend())
    told = {"compile": time.perf_counter() - since}
    forget_traces(jax.default_backend())  # as training does
    told["trained"] = sum(x.size for x in jax.tree.leaves(trainable["flux"]))
    tokens = n, geometry.context
    shapes = {name: x.shape for name, x in named_leaves(trainable["flux"]).items()}
    told["flops"] = step_flops(
        forward_flops(flux, *tokens),
        attention=attention_flops(flux, *tokens),
        experts=expert_flops(shapes, *tokens),
        records=b,
        policy_points=0,
        kl=False,
        full_fine_tuning=False,
    )
    told["peak_flops"] = next((peak for kind, peak in PEAKS.items() if kind in jax.devices()[0].device_kind), None)
    holder = [state]

    def take() -> None:
        holder[0], metrics = program(holder[0], frozen, batch, experience)
        jax.block_until_ready(holder[0])
        check_finite(float(metrics["base_loss"][-1]))

    def peak() -> int:
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]

    if options["trace"]:
        for _ in range(2):
            take()
        with jax.profiler.trace(options["trace"]):
            take()
    return take, told, peak if on_gpu else host_peak


def theirs(geometry: Geometry, options: dict):
    """The same by diffusers and PEFT."""
    import torch
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    device, on_gpu = ("cuda", True) if torch.cuda.is_available() else ("cpu", False)
    dtype = torch.bfloat16 if on_gpu else torch.float32
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
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=on_gpu)
    b, n = geometry.batch, geometry.grid[0] * geometry.grid[1]

    def normal(*shape: int) -> "torch.Tensor":
        return torch.randn(*shape, device=device)

    clean, fill, context = normal(b, n, 64), normal(b, n, 320), normal(b, geometry.context, geometry.joint_dim)
    pooled, text_ids = normal(b, geometry.pooled_dim), torch.zeros(geometry.context, 3, device=device)
    rows, columns = geometry.grid
    image_ids = torch.zeros(n, 3, device=device)
    image_ids[:, 1] = torch.arange(rows, device=device).repeat_interleave(columns)
    image_ids[:, 2] = torch.arange(columns, device=device).repeat(rows)
    if on_gpu:
        model.compile_repeated_blocks()  # diffusers' way to torch.compile
    model.train()

    def take() -> None:
        noise, t = torch.randn_like(clean), torch.rand(b, device=device)
        x = (1 - t)[:, None, None] * clean + t[:, None, None] * noise
        with torch.autocast(device, dtype, enabled=on_gpu):
            predicted = model(
                hidden_states=torch.cat([x, fill], -1),
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=t,
                guidance=torch.full((b,), 30.0, device=device),
                img_ids=image_ids,
                txt_ids=text_ids,
                return_dict=False,
            )[0]
        loss = ((predicted.float() - (noise - clean)) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        check_finite(loss.item())

    told = {"trained": sum(parameter.numel() for parameter in trained)}
    if on_gpu:
        since, fits = time.perf_counter(), True
        try:
            take()
        except torch.cuda.OutOfMemoryError:
            fits = False
        if not fits:  # what the exception held is free now
            optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
            model.enable_gradient_checkpointing()
            since = time.perf_counter()
            take()
        torch.cuda.reset_peak_memory_stats()
        told |= {"compile": time.perf_counter() - since, "recomputes": model.is_gradient_checkpointing}
    return take, told, torch.cuda.max_memory_allocated if on_gpu else host_peak


def check_finite(loss: float) -> None:
    """Products of what is not finite take less time."""
    if not math.isfinite(loss):
        sys.exit(f"the loss is {loss}")


def host_peak() -> int:
    """Most bytes of memory that this process has held since its peak was reset."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


CONTENDERS = {
    "ra_jax": lambda geometry, options: ours(geometry, EXPERTS, geometry.rank, options),
    "diffusers + PEFT": theirs,
    "ra_jax, one LoRA": lambda geometry, options: ours(geometry, 1, EXPERTS * geometry.rank, options),
}


def work(contender: str, geometry: Geometry, options: dict) -> None:
    """A contender's process: a step for every line on stdin, what it took to stdout."""
    take, told, peak = CONTENDERS[contender](geometry, options)
    for _ in range(2):
        take()
    told["peak_before"] = host_peak() if peak is host_peak else 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    print(json.dumps(told), flush=True)
    for _ in sys.stdin:
        since = time.perf_counter()
        take()
        seconds = time.perf_counter() - since
        print(json.dumps({"seconds": seconds, "peak": peak()}), flush=True)


class Contender:
    """A process that takes a step when asked to."""

    def __init__(self, name: str, geometry: Geometry, bench: "Bench"):
        trace = str(bench.trace) if bench.trace and name == "ra_jax" else None
        options = {"gradient_checkpointing": bench.gradient_checkpointing, "trace": trace}
        command = [sys.executable, __file__, "work", name, json.dumps(asdict(geometry)), json.dumps(options)]
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # they may share a GPU
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.told = self._answer()

    def _answer(self) -> dict:
        if not (line := self._process.stdout.readline()):
            sys.exit(f"{self._process.args[3]} came to an end: its error stands above")
        return json.loads(line)

    def step(self) -> dict[str, float]:
        print(file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._process.communicate()


def compare(bench: Bench, name: str, geometry: Geometry) -> dict[str, dict]:
    steps, told = {}, {}
    for together in [[who] for who in bench.contenders] if geometry.alone else [bench.contenders]:
        contenders = {who: Contender(who, geometry, bench) for who in together}
        rounds = [{who: contender.step() for who, contender in contenders.items()} for _ in range(bench.rounds)]
        for who, contender in contenders.items():
            contender.close()
            steps[who], told[who] = [step[who] for step in rounds], contender.told
    found = {}
    for who in bench.contenders:
        seconds = float(np.median([step["seconds"] for step in steps[who]]))
        found[who] = {"seconds": seconds, "peak": max(step["peak"] for step in steps[who]), **told[who]}
    if len({told["trained"] for told in found.values()}) > 1:
        sys.exit(f"{name}: the contenders train different numbers of parameters: {found}")
    mine = found["ra_jax"]
    for who, figures in found.items():
        ratio = figures["seconds"] / mine["seconds"]
        peaks = f"{figures['peak'] / 1e9:.2f} GB", f"{max(figures['peak'], figures['peak_before']) / 1e9:.2f} GB"
        row = [name, who, f"{figures['seconds']:.3f} s", f"{ratio:.3f}", *peaks]
        if mine["peak_flops"]:
            row.append(f"{mine['flops'] / figures['seconds'] / mine['peak_flops']:.1%}")
        if figures.get("recomputes"):
            row[1] += ", recomputing blocks"
        print("| " + " | ".join(row) + " |", flush=True)
    return found


def compile_seconds(blocks: int, bench: Bench) -> float:
    """Seconds to compile a step of so many blocks, a third of them double."""
    double = blocks // 3
    geometry = Geometry(2, 32, double, blocks - double, (8, 8), 8, 1)
    contender = Contender("ra_jax", geometry, replace(bench, trace=None))
    contender.close()
    return contender.told["compile"]


def main(bench: Bench) -> None:
    if "ra_jax" not in bench.contenders or not set(bench.contenders) <= set(CONTENDERS):
        sys.exit(
            f"--contenders {' '.join(bench.contenders)}: expected some of {', '.join(CONTENDERS)}, ra_jax among them"
        )
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs\n")
    heads = ["geometry", "contender", "a step", "of ours", "peak of steps", "in all", "MFU, where the peak is known"]
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    results = {name: compare(bench, name, (GEOMETRIES | LARGE)[name]) for name in bench.geometries}
    if "diffusers + PEFT" in bench.contenders:
        ratios = [found["diffusers + PEFT"]["seconds"] / found["ra_jax"]["seconds"] for found in results.values()]
        print(f"\ngeometric mean of theirs / ours: {float(np.exp(np.log(ratios).mean())):.2f}, least {min(ratios):.2f}")
    times = {blocks: compile_seconds(blocks, bench) for blocks in bench.compile_blocks}
    if len(times) > 1:
        print("compile time: " + ", ".join(f"{blocks} blocks {seconds:.1f} s" for blocks, seconds in times.items()))
        print(f"ratio {times[max(times)] / times[min(times)]:.2f}")
    if bench.json:
        bench.json.write_text(json.dumps({"results": results, "compile": times}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        given = json.loads(sys.argv[3])
        work(sys.argv[2], Geometry(**given | {"grid": tuple(given["grid"])}), json.loads(sys.argv[4]))
    else:
        main(tyro.cli(Bench, use_underscores=True))
