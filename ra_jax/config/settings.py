"""The configuration of `python -m ra_jax.train`: frozen groups of settings, one flat flag each.

A value comes from the command line, else from the TOML file of `--config`, else from the default written
here. Groups sort the settings in code and in `--help`; flags and TOML keys are flat, as no name occurs twice:

    config = parse(["--config", "configs/tiny.toml", "--learning_rate", "3e-4"])
    config.optimization.learning_rate

A numeric field carries its range (`ra_jax.config.ranges`); its comment, or the string below it, is its help text. The
field is all that a new flag needs here; checks, TOML, `--help` and checkpoints read it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from ra_jax.config.ranges import above, above_and_at_most, at_least, at_least_and_below, between
from ra_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on. Panel sizes are those of one panel of the diptych, in pixels."""

    train_json_path: str  # records: JSON or JSONL, a folder with input/ mask/ gt/, a pack, or tfds:NAME
    val_json_path: str | None = None  # records for previews (None: taken from the training data) and max_drift
    score_format: Literal["dict", "tensor"] = "dict"  # scores as {"removal_score": ...} or [removal, ...]
    aspect_ratio_buckets: str = "512,512;448,576;576,448"  # panel sizes "height,width;..." [pixels]
    mask_augmentation: bool = True  # enlarge masks at random in training: outlines, boxes, dilation
    data_workers: Annotated[int, at_least(0)] = 2  # threads that read and decode images ahead (0: none, when asked for)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base: FLUX-Fill and Redux in diffusers' layout."""

    pretrained_model_name_or_path: str = "black-forest-labs/FLUX.1-Fill-dev"  # diffusers folder or hub id
    pretrained_redux_model_name_or_path: str = "black-forest-labs/FLUX.1-Redux-dev"  # folder or hub id
    base_precision: Literal["auto", "int8"] = "auto"  # stored frozen kernels; auto: as mixed_precision computes
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"  # compute dtype; fp16 is refused: FLUX overflows
    gradient_checkpointing: Literal["none", "products", "blocks", "full", "points"] = "blocks"
    """What the backward pass finds kept beside each block's input: none everything, products all products and
    attention, blocks attention, full nothing; points: as full, and a log-probability's points in time one by one."""
    max_sequence_length: Annotated[int, at_least(0)] = 512
    """prompt tokens (zeros) before the reference image's [tokens]"""
    guidance_scale: Annotated[float, at_least(0)] = 30.0  # embedded guidance, the same in training and in previews


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """LoRA experts and the router that mixes them. Without --use_lora the whole transformer is trained."""

    use_lora: bool = False  # train LoRA experts on the frozen base
    num_experts: Annotated[int, at_least(1)] = 3  # E, experts in the mixture
    expert_names: tuple[str, ...] = ()  # one for each (E = 3: removal background smoothness)
    lora_rank: Annotated[int, at_least(1)] = 64  # r, rank of each expert
    lora_alpha: Annotated[float, above(0)] = 64.0  # alpha; experts are scaled by alpha / r
    lora_dropout: Annotated[float, at_least_and_below(0, 1)] = 0.0
    """dropout on the experts' input in the base loss [probability]"""
    target_modules: str | None = None  # regex on layer names (None: every linear layer of the blocks)
    routing: Literal["uniform", "fixed", "soft", "topk", "sample"] = "soft"  # sample: automatic rewards only
    routing_temperature: Annotated[float, above(0)] = 1.0  # the router's logits are divided by it
    router_floor: Annotated[float, at_least(0)] = 0.05  # f, smallest gate of an expert; E * f < 1
    fixed_expert_weights: Annotated[tuple[float, ...], at_least(0)] = ()
    """where routing starts (E = 3: 0.4 0.3 0.3; else 1/E)"""
    routing_specialization: Annotated[float, at_least(0)] = 0.5
    """lambda, weight of the gates' own entropy in the diversity loss"""
    routing_mean_decay: Annotated[float, at_least_and_below(0, 1)] = 0.9
    """beta, decay of the gates' running mean in the diversity loss"""

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names [E], given or default."""
        if self.expert_names:
            return self.expert_names
        if self.num_experts == 3:
            return ("removal", "background", "smoothness")
        return tuple(f"expert_{i}" for i in range(self.num_experts))

    @property
    def weights(self) -> tuple[float, ...]:
        """The gates [E] that `fixed` routing uses and `soft` and `topk` start from, given or default."""
        if self.fixed_expert_weights:
            return self.fixed_expert_weights
        return DEFAULT_REWARD_WEIGHTS if self.num_experts == 3 else (1 / self.num_experts,) * self.num_experts


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Learning from scores: where rewards come from and how the policy follows them."""

    use_grpo: bool = False  # train with GRPO; rewards are computed from generated images, or people's
    use_human_scores: bool = False  # rewards are the records' three scores
    enable_grpo_rewards: bool = False  # without it rewards and the policy loss are 0
    enable_grpo_loss: bool = False  # without it the loss is base + diversity
    policy_estimator: Literal["matching", "sde", "nft"] = "matching"  # sde: automatic rewards only
    clip_range: Annotated[float, between(0, 1)] = 0.2  # epsilon, the ratio is clipped to 1 +- epsilon
    sde_clip_range: Annotated[float, between(0, 1)] = 0.02
    """the same for the estimator sde, whose ratio has another scale"""
    nft_beta: Annotated[float, above(0)] = 1.0  # beta of the estimator nft, how firmly the old policy is held on to
    policy_temperature: Annotated[float | Literal["auto"], above(0)] = 0.1  # tau; auto adapts it to the clip fraction
    policy_sync_steps: Annotated[int, at_least(1)] = 8  # the old policy is renewed every so many steps
    num_policy_timesteps: Annotated[int, at_least(1)] = 4  # K, pairs of time and noise in a log-probability
    policy_timestep_fraction: Annotated[float, above_and_at_most(0, 1)] = 0.7
    """they are drawn from this noisiest part of the schedule"""
    kl_weight: Annotated[float, at_least(0)] = 0.0  # weight of the distance to the base's velocity
    removal_reward_weight: Annotated[float, at_least(0)] = 0.4  # weight of the removal score
    background_reward_weight: Annotated[float, at_least(0)] = 0.3  # weight of the background score
    smoothness_reward_weight: Annotated[float, at_least(0)] = 0.3  # weight of the smoothness score

    @property
    def reward_weights(self) -> tuple[float, float, float]:
        """Weights of the scores, in the order removal, background, smoothness."""
        return (self.removal_reward_weight, self.background_reward_weight, self.smoothness_reward_weight)


# Of the scores removal, background, smoothness; the gates of three experts, one for each, start from the same.
DEFAULT_REWARD_WEIGHTS = GRPOConfig().reward_weights


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Automatic rewards (--use_grpo without human scores): what is generated for each condition, how it is judged."""

    num_generations: Annotated[int, at_least(1)] = 8  # G, rollouts a condition, which are compared with each other
    rollout_steps: Annotated[int, at_least(1)] = 8  # sampling steps of a rollout
    num_iterations: Annotated[int, at_least(1)] = 2  # updates from the same rollouts
    reward_functions: tuple[str, ...] = ()  # NAME, NAME=WEIGHT or MODULE:FUNCTION=WEIGHT (none: the three scores)
    negative_advantages: Literal["auto", "keep", "drop"] = "auto"
    """drop: only rollouts better than their group's mean teach anything (auto: the estimator matching drops)."""
    reward_interval: Annotated[int, at_least(1)] = 1
    """rollouts and rewards every so many steps, base loss alone between"""
    decode_batch_size: Annotated[int, at_least(1)] = 4  # images the VAE decodes at once
    sde_window: Annotated[int, at_least(1)] = 2  # noisy steps in a rollout for the estimator sde
    sde_noise_level: Annotated[float, above(0)] = 0.7  # eta, the noise of those steps

    def drops_negative(self, estimator: str) -> bool:
        """Whether rollouts that are worse than their group's mean are left out of the policy's loss."""
        return self.negative_advantages == "drop" or (self.negative_advantages == "auto" and estimator == "matching")

    def due(self, step: int) -> bool:
        """Whether step number `step` (from 0) generates and rewards."""
        return step % self.reward_interval == 0


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """total = base_loss_weight * base + policy_loss_weight * policy + diversity_loss_weight * diversity."""

    base_loss_weight: Annotated[float, at_least(0)] = 1.0  # weight of the flow-matching loss
    policy_loss_weight: Annotated[float, at_least(0)] = 0.1  # weight of the clipped policy loss
    diversity_loss_weight: Annotated[float, at_least(0)] = 0.05  # weight of the loss that keeps experts in use
    loss_region: Literal["balanced", "panel", "mask", "all"] = "balanced"  # balanced: half mask, half rest
    base_loss_weighting: Literal["auto", "none", "score", "softmax", "best"] = "auto"
    """How records count in the base loss; auto: score with human scores, else none."""
    base_loss_softmax_temperature: Annotated[float, above(0)] = 0.05
    """softmax: weights softmax(reward / temperature) in a group"""


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """The optimizer and its schedule. All counts steps, of one update each (num_iterations in automatic mode)."""

    optimizer: Literal["adamw", "adafactor", "muon", "prodigy"] = "adamw"  # from optax
    learning_rate: Annotated[float, above(0)] = 1e-4  # peak; for prodigy 1.0 is usual
    router_learning_rate: Annotated[float | None, above(0)] = None  # peak for the router (None: learning_rate)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant"
    """Shape of the learning rate over the run; all but constant begin with a linear warm-up."""
    lr_warmup_steps: Annotated[int, at_least(0)] = 0  # length of the warm-up [steps]
    lr_power: Annotated[float, at_least(0)] = 1.0  # exponent of the polynomial schedule
    adam_beta1: Annotated[float, at_least_and_below(0, 1)] = 0.9  # decay of the gradient's mean (adamw, muon, prodigy)
    adam_beta2: Annotated[float, at_least_and_below(0, 1)] = 0.999  # decay of the gradient's square
    adam_weight_decay: Annotated[float, at_least(0)] = 1e-2
    """decoupled weight decay, of matrices (prodigy: of every weight)"""
    adam_epsilon: Annotated[float, above(0)] = 1e-8  # added to the root of the gradient's square
    max_grad_norm: Annotated[float, above(0)] = 1.0  # gradients are scaled down to this global norm
    ema_decay: Annotated[float, at_least_and_below(0, 1)] = 0.0
    """decay of the averaged weights that previews and removal use (0: off)"""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, place and reproducibility of the run."""

    output_dir: str  # checkpoints, metrics.jsonl, previews and config.toml are written here
    seed: Annotated[int, at_least(0)] = 0  # of everything random; the same seed gives the same run
    train_batch_size: Annotated[int, at_least(1)] = 4
    """records (automatic mode: conditions) a microbatch, over all devices"""
    gradient_accumulation_steps: Annotated[int, at_least(1)] = 1  # microbatches a step
    num_train_epochs: Annotated[int, at_least(1)] = 1  # passes over the data, unless max_train_steps is given
    max_train_steps: Annotated[int | None, at_least(1)] = None  # length of the run [steps]; wins over num_train_epochs
    checkpointing_steps: Annotated[int, at_least(0)] = 500  # a checkpoint every so many steps (0: only at the end)
    checkpoints_total_limit: Annotated[int | None, at_least(1)] = None
    """oldest checkpoints beyond it are deleted (None: keep all)"""
    resume_from_checkpoint: str | None = None  # "latest", or a checkpoint's folder
    init_experts_from: str | None = None  # begin with another run's experts: its output_dir, or a checkpoint's folder
    overwrite_output_dir: bool = False  # delete the run that output_dir already holds
    max_drift: Annotated[float | None, above(0)] = None
    """stop when the flow loss on val_json_path, or the velocity, grew by this fraction"""
    drift_steps: Annotated[int, at_least(1)] = 10  # with max_drift, look every so many steps
    jax_compilation_cache_dir: str = "auto"
    """Folder of compiled programs; auto: $JAX_COMPILATION_CACHE_DIR, else ~/.cache/ra_jax/compiled; none: not kept."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is shared out over devices and processes."""

    parallelism: Literal["mesh", "pmap"] = "mesh"  # mesh: jax.jit, weights shared out; pmap: a copy on every device
    mesh_data: Annotated[int, at_least(1, or_exactly=-1)] = -1
    """devices that share out the batch and repeat the weights (-1: all that are left)"""
    mesh_fsdp: Annotated[int, at_least(1)] = 1  # devices that share out the batch and the weights
    mesh_tensor: Annotated[int, at_least(1)] = 1  # devices that share out attention heads and MLP features
    coordinator_address: str | None = None  # "host:port" of process 0 (None: from the environment, if it says)
    num_processes: Annotated[int | None, at_least(1)] = None  # of the whole run; with coordinator_address
    process_id: Annotated[int | None, at_least(0)] = None  # this one's number, from 0; with coordinator_address


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Metrics and previews."""

    report_to: tuple[Literal["tensorboard", "wandb", "none"], ...] = ("tensorboard",)
    """Trackers beside metrics.jsonl and the progress bar, separated by spaces."""
    log_freq: Annotated[int, at_least(1)] = 10  # metrics every so many steps
    validation_steps: Annotated[int, at_least(0)] = 500  # previews at step 0 and every so many steps (0: no previews)
    num_validation_images: Annotated[int, at_least(1)] = 4  # scenes in a preview
    num_inference_steps: Annotated[int, at_least(1)] = 28  # sampling steps of a preview


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tunes FLUX.1-Fill to remove objects: LoRA experts with a router, from pairs, from human scores
    or from rewards of what it generates.

    Any flag below may also stand in a TOML file, by its name: --config FILE.toml. The command line wins over
    the file. Flags take underscores or hyphens.
    """

    data: DataConfig
    model: ModelConfig = ModelConfig()
    experts: ExpertsConfig = ExpertsConfig()
    grpo: GRPOConfig = GRPOConfig()
    rollouts: RolloutConfig = RolloutConfig()
    losses: LossConfig = LossConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    run: RunConfig
    parallel: ParallelConfig = ParallelConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def mode(self) -> Literal["standard", "human", "automatic"]:
        """Training mode: `standard` imitates every result; `human` also learns from the records' scores, `automatic`
        from rewards of what it generates."""
        if self.grpo.use_human_scores:
            return "human"
        return "automatic" if self.grpo.use_grpo and self.grpo.enable_grpo_rewards else "standard"

    @property
    def updates(self) -> int:
        """Updates of the weights in a step."""
        return self.rollouts.num_iterations if self.mode == "automatic" else 1

    @property
    def uses_policy(self) -> bool:
        """Whether the total loss has a policy term."""
        return self.grpo.use_grpo and self.grpo.enable_grpo_rewards and self.grpo.enable_grpo_loss

    @property
    def base_loss_weighting(self) -> Literal["none", "score", "softmax", "best"]:
        """How the base loss weighs records, with `auto` resolved by the mode."""
        if self.losses.base_loss_weighting != "auto":
            return self.losses.base_loss_weighting
        return "score" if self.mode == "human" else "none"

    def total_steps(self, batches_per_epoch: int) -> int:
        """Steps of the run: `max_train_steps`, else as many as the microbatches of `num_train_epochs` make.

        Raises ConfigError where the warm-up is longer than that.
        """
        microbatches = self.run.num_train_epochs * batches_per_epoch
        steps = self.run.max_train_steps or -(-microbatches // self.run.gradient_accumulation_steps)
        if self.optimization.lr_warmup_steps > steps:
            raise ConfigError(
                f"lr_warmup_steps = {self.optimization.lr_warmup_steps}: longer than the run's {steps} steps "
                f"(num_train_epochs = {self.run.num_train_epochs} of {batches_per_epoch} batches each); "
                "lower it, or train longer"
            )
        return steps
