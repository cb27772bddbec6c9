"""The settings of `python -m ra_jax.train`: frozen dataclasses with one command-line flag for each field.

The value of a setting comes from the command line, else from the TOML file of `--config`, else from the default here.
The dataclasses group the settings in code and in `--help`. Flags and TOML keys have no group in their name, because
every name occurs only once:

    config = parse(["--config", "configs/tiny.toml", "--learning_rate", "3e-4"])
    config.optimization.learning_rate

The comment above a field is its help text. Continuation lines of a comment begin with a letter, because tyro joins only
such lines. A numeric field declares its range (`ra_jax.config.ranges`), and its help text repeats that range. A new
flag needs only a field here: `--help`, TOML, checkpoints and the check of ranges read the fields.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from ra_jax.config.ranges import above, above_and_at_most, at_least, at_least_and_below, between
from ra_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The records to train on, and the sizes of their images. A panel is one half of the model's input image: reference
    left, photo right."""

    # Records to train on: a JSON or JSONL file, a folder with input/ mask/ gt/, a pack that python -m ra_jax.data pack
    # wrote, or tfds:NAME.
    train_json_path: str
    # Held-out records: removals of their photos are scored during the run (held_out_reward) and shown as previews.
    # None: validation_split holds out photos of train_json_path.
    val_json_path: str | None = None
    # Fraction of the photos of train_json_path that are held out if there is no val_json_path (at least 0 and below 1).
    # Of fewer than 10 photos none is held out. The content of the photos decides which, in all runs alike.
    validation_split: Annotated[float, at_least_and_below(0, 1)] = 0.1
    # Format of the scores in the records. dict: {"removal_score": ...}; tensor: [removal, background, smoothness].
    score_format: Literal["dict", "tensor"] = "dict"
    # Panel sizes in pixels, "height,width;height,width;...". Each photo uses the size with the nearest aspect ratio.
    aspect_ratio_buckets: str = "512,512;448,576;576,448"
    # Enlarge masks at random in training: to a smooth outline, to a bounding box, or by dilation.
    mask_augmentation: bool = True
    # Threads that load batches ahead of time (at least 0). 0: a batch is loaded when the step needs it.
    data_workers: Annotated[int, at_least(0)] = 2


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model that training starts from, and how it computes."""

    # FLUX.1-Fill: a folder in diffusers' layout, or a Hugging Face hub id.
    pretrained_model_name_or_path: str = "black-forest-labs/FLUX.1-Fill-dev"
    # FLUX.1-Redux, which encodes the reference image: a folder in diffusers' layout, or a hub id.
    pretrained_redux_model_name_or_path: str = "black-forest-labs/FLUX.1-Redux-dev"
    # Storage of the frozen base. auto: in the dtype of mixed_precision; int8: kernels of the transformer's blocks in 8
    # bits.
    base_precision: Literal["auto", "int8"] = "auto"
    # Dtype of the computation. no: float32; bf16: bfloat16; fp16: not supported, because FLUX overflows in it.
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    # Activations of each block that are kept for the backward pass, in addition to the block's input; the others are
    # recomputed. none: keep all (no recomputation); products: keep matrix products and attention outputs; blocks: keep
    # attention outputs; full: keep nothing; points: like full, but the policy loss processes its timesteps one after
    # another.
    gradient_checkpointing: Literal["none", "products", "blocks", "full", "points"] = "blocks"
    # Number of prompt tokens, all zeros, in front of the tokens of the reference image (at least 0).
    max_sequence_length: Annotated[int, at_least(0)] = 512
    # Guidance value that the transformer gets as input, in training and in previews (at least 0).
    guidance_scale: Annotated[float, at_least(0)] = 30.0


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """LoRA experts, and the router that mixes them. The router gives each image one gate (mixing weight) per expert."""

    # Train LoRA experts and a router on the frozen base. Without this flag the whole transformer is trained.
    use_lora: bool = False
    # Number E of experts (at least 1).
    num_experts: Annotated[int, at_least(1)] = 3
    # Names of the experts, E in number. Not given: removal background smoothness for E = 3, else expert_0 expert_1 ...
    expert_names: tuple[str, ...] = ()
    # Rank of each expert (at least 1).
    lora_rank: Annotated[int, at_least(1)] = 64
    # Scale of the experts: their outputs are multiplied by lora_alpha / lora_rank (greater than 0).
    lora_alpha: Annotated[float, above(0)] = 64.0
    # Dropout probability of the experts' inputs in the base loss (at least 0 and below 1).
    lora_dropout: Annotated[float, at_least_and_below(0, 1)] = 0.0
    # Regular expression for the names of the layers that get experts. None: all linear layers of the transformer's
    # blocks.
    target_modules: str | None = None
    # How gates are computed. uniform: 1/E each; fixed: fixed_expert_weights; soft: by the router; topk: by the router,
    # but only the expert with the largest gate is used; sample: as soft, but each rollout uses one expert, drawn with
    # the gates as probabilities (automatic rewards only).
    routing: Literal["uniform", "fixed", "soft", "topk", "sample"] = "soft"
    # Temperature of the router: its logits are divided by this value before the softmax (greater than 0).
    routing_temperature: Annotated[float, above(0)] = 1.0
    # Smallest gate that the router can give to an expert (at least 0, and less than 1/E).
    router_floor: Annotated[float, at_least(0)] = 0.05
    # Gates of fixed routing, and the initial gates of the router: E numbers with sum 1 (each at least 0). Not
    # given: 0.4 0.3 0.3 for E = 3, else 1/E each.
    fixed_expert_weights: Annotated[tuple[float, ...], at_least(0)] = ()
    # Weight of the mean entropy of each image's gates in the diversity loss (at least 0). Larger values make the router
    # use fewer experts per image.
    routing_specialization: Annotated[float, at_least(0)] = 0.5
    # Decay per step of the running mean of the gates in the diversity loss (at least 0 and below 1).
    routing_mean_decay: Annotated[float, at_least_and_below(0, 1)] = 0.9

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts, E in number: `expert_names`, or the default names."""
        if self.expert_names:
            return self.expert_names
        if self.num_experts == 3:
            return ("removal", "background", "smoothness")
        return tuple(f"expert_{i}" for i in range(self.num_experts))

    @property
    def weights(self) -> tuple[float, ...]:
        """Gates [E] of `fixed` routing, and initial gates of `soft`, `topk` and `sample` routing:
        `fixed_expert_weights`, or the default gates."""
        if self.fixed_expert_weights:
            return self.fixed_expert_weights
        return DEFAULT_REWARD_WEIGHTS if self.num_experts == 3 else (1 / self.num_experts,) * self.num_experts


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """GRPO: training from rewards. The policy loss prefers results with a higher reward than others of the same
    group."""

    # Switch GRPO on. It also needs --enable_grpo_rewards for rewards, and --enable_grpo_loss for the policy loss.
    use_grpo: bool = False
    # Take rewards from the three human scores of each record (human mode), not from generated images (automatic mode).
    use_human_scores: bool = False
    # Compute rewards. Without this flag there are no rewards, and the policy loss is 0.
    enable_grpo_rewards: bool = False
    # Add the policy loss to the total loss. Without this flag the loss is base + diversity.
    enable_grpo_loss: bool = False
    # How the policy loss compares the trained weights with the old policy, an earlier copy of them. contrast: by the
    # flow-matching error of a result, to first order about the weights that the run starts with, which also hold the
    # policy; matching: by the flow-matching error, without anything that holds the policy; sde: by the probability of
    # the noisy sampling steps (automatic rewards only); nft: by the velocity, without a ratio; auto: contrast.
    policy_estimator: Literal["auto", "contrast", "matching", "sde", "nft"] = "auto"
    # How far the estimator contrast moves the model (between 1e-06 and 1000, both excluded): at rest, a score has moved
    # by about this number times its covariance with the advantage. auto: as far as the scores of the data suggest.
    policy_strength: Annotated[float | Literal["auto"], between(1e-6, 1000)] = "auto"
    # Clip range of the estimators contrast and matching: the policy ratio is clipped to 1 ± this value (between 0 and
    # 1, both excluded). The ratio is the probability of a result under the trained weights divided by its probability
    # under the old policy.
    clip_range: Annotated[float, between(0, 1)] = 0.2
    # Clip range of the estimator sde, in place of clip_range (between 0 and 1, both excluded).
    sde_clip_range: Annotated[float, between(0, 1)] = 0.02
    # How strongly the estimator nft pulls the weights back to the center of its loss (greater than 0).
    nft_beta: Annotated[float, above(0)] = 1.0
    # Center of the estimator nft. reference: the weights that the run starts with; old: the old policy, as published.
    nft_about: Literal["reference", "old"] = "reference"
    # Temperature of the estimators contrast and matching: log-probability = -(flow-matching error) / temperature
    # (greater than 0). It is only the unit in which clip_range is measured. auto: starts at 0.1 and adapts so that
    # about 15 % of the ratios are clipped. With matching, a number also changes the gradient, by its inverse.
    policy_temperature: Annotated[float | Literal["auto"], above(0)] = "auto"
    # Interval between copies of the trained weights to the old policy, in steps (at least 1). Only human mode uses it.
    policy_sync_steps: Annotated[int, at_least(1)] = 8
    # Number of (time, noise) pairs at which contrast, matching and nft evaluate each result (at least 1).
    num_policy_timesteps: Annotated[int, at_least(1)] = 4
    # Weight of a penalty on velocities that are longer than the reference's (at least 0). 0: off.
    norm_guard_weight: Annotated[float, at_least(0)] = 0.0
    # Fraction of the noise schedule, counted from its noisy end, from which the times of num_policy_timesteps are drawn
    # (greater than 0 and at most 1). With automatic rewards keep it below 1 for the estimator contrast: its pull feeds
    # on itself where generated images are nearly clean.
    policy_timestep_fraction: Annotated[float, above_and_at_most(0, 1)] = 0.7
    # Weight of the squared distance between the velocities of the trained model and of the weights that the run starts
    # with (at least 0). 0: off.
    kl_weight: Annotated[float, at_least(0)] = 0.0
    # Weight of the removal score in the reward (at least 0).
    removal_reward_weight: Annotated[float, at_least(0)] = 0.4
    # Weight of the background score in the reward (at least 0).
    background_reward_weight: Annotated[float, at_least(0)] = 0.3
    # Weight of the smoothness score in the reward (at least 0).
    smoothness_reward_weight: Annotated[float, at_least(0)] = 0.3

    @property
    def estimator(self) -> Literal["contrast", "matching", "sde", "nft"]:
        """The policy estimator: `policy_estimator`, with `auto` replaced by contrast."""
        return "contrast" if self.policy_estimator == "auto" else self.policy_estimator

    @property
    def reward_weights(self) -> tuple[float, float, float]:
        """Weights of the scores, in the order removal, background, smoothness."""
        return (self.removal_reward_weight, self.background_reward_weight, self.smoothness_reward_weight)


# Weights of the scores removal, background and smoothness. The gates of three experts, one per score, start with them.
DEFAULT_REWARD_WEIGHTS = GRPOConfig().reward_weights


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Automatic rewards (--use_grpo --enable_grpo_rewards without --use_human_scores): each step generates images,
    called rollouts, and scores them."""

    # Number of rollouts per condition (photo, mask and reference) in a step (at least 1; with automatic rewards at
    # least 2). The policy loss compares their rewards with each other.
    num_generations: Annotated[int, at_least(1)] = 8
    # Sampling steps of a rollout (at least 1).
    rollout_steps: Annotated[int, at_least(1)] = 8
    # Updates of the weights from the same rollouts (at least 1).
    num_iterations: Annotated[int, at_least(1)] = 2
    # Rewards: NAME, NAME=WEIGHT, MODULE:FUNCTION or MODULE:FUNCTION=WEIGHT, separated by spaces. Not given: removal,
    # background and smoothness, weighted by --removal_reward_weight and so on.
    reward_functions: tuple[str, ...] = ()
    # Whether the policy loss uses rollouts that are worse than the mean of their group (negative advantages). keep: it
    # uses them; drop: it leaves them out; auto: drop for the estimator matching, keep for sde and nft.
    negative_advantages: Literal["auto", "keep", "drop"] = "auto"
    # Interval between steps with rollouts and rewards, in steps (at least 1). The steps in between have no policy loss.
    reward_interval: Annotated[int, at_least(1)] = 1
    # Number of images that the VAE decodes at once on each device (at least 1). A smaller number needs less memory.
    decode_batch_size: Annotated[int, at_least(1)] = 4
    # Number of sampling steps of a rollout in which the estimator sde adds noise (at least 1).
    sde_window: Annotated[int, at_least(1)] = 2
    # Strength of the noise that the estimator sde adds in these sampling steps (greater than 0).
    sde_noise_level: Annotated[float, above(0)] = 0.7

    def drops_negative(self, estimator: str) -> bool:
        """Return whether the policy loss of `estimator` leaves out rollouts with negative advantages."""
        return self.negative_advantages == "drop" or (self.negative_advantages == "auto" and estimator == "matching")

    def due(self, step: int) -> bool:
        """Return whether step number `step`, counted from 0, generates and scores rollouts."""
        return step % self.reward_interval == 0


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """total = base_loss_weight * base + policy_loss_weight * policy + diversity_loss_weight * diversity + kl_weight *
    kl."""

    # Weight of the base loss, the flow-matching loss on the records' results (at least 0).
    base_loss_weight: Annotated[float, at_least(0)] = 1.0
    # Guidance value that the transformer gets as input in the base loss (at least 0). None: guidance_scale.
    base_guidance_scale: Annotated[float | None, at_least(0)] = None
    # Weight of the policy loss (at least 0).
    policy_loss_weight: Annotated[float, at_least(0)] = 0.1
    # Weight of the diversity loss, which keeps all experts in use (at least 0).
    diversity_loss_weight: Annotated[float, at_least(0)] = 0.05
    # Region that losses average over. balanced: mask and rest of the photo, half the weight on each; panel: the photo;
    # mask: the mask; all: photo and reference. The mask is first dilated by 2 latent cells.
    loss_region: Literal["balanced", "panel", "mask", "all"] = "balanced"
    # Weight of a record in the base loss. none: 1; score: its reward, mapped to [0, 1]; softmax: softmax of the rewards
    # in its scene; best: only the best record of each scene counts; auto: score in human mode, else none.
    base_loss_weighting: Literal["auto", "none", "score", "softmax", "best"] = "auto"
    # Temperature of base_loss_weighting softmax: softmax(reward / temperature) (greater than 0).
    base_loss_softmax_temperature: Annotated[float, above(0)] = 0.05


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """The optimizer and its learning-rate schedule. The schedule counts steps. A step makes one update of the weights,
    or with automatic rewards num_iterations updates."""

    # Optimizer, from the library Optax.
    optimizer: Literal["adamw", "adafactor", "muon", "prodigy"] = "adamw"
    # Peak learning rate (greater than 0). 1.0 is usual for prodigy.
    learning_rate: Annotated[float, above(0)] = 1e-4
    # Peak learning rate of the router (greater than 0). None: learning_rate.
    router_learning_rate: Annotated[float | None, above(0)] = None
    # Learning rate over the run. constant: always the peak; the others begin with a linear warm-up of lr_warmup_steps;
    # constant_with_warmup: then the peak; linear, cosine, polynomial: then a decay to 0 at the last step.
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant"
    # Length of the warm-up in steps (at least 0).
    lr_warmup_steps: Annotated[int, at_least(0)] = 0
    # Exponent of lr_scheduler polynomial (at least 0).
    lr_power: Annotated[float, at_least(0)] = 1.0
    # Decay of the running mean of gradients, for adamw, muon and prodigy (at least 0 and below 1).
    adam_beta1: Annotated[float, at_least_and_below(0, 1)] = 0.9
    # Decay of the running mean of squared gradients, for adamw, muon and prodigy (at least 0 and below 1).
    adam_beta2: Annotated[float, at_least_and_below(0, 1)] = 0.999
    # Decoupled weight decay, for matrices only; prodigy applies it to all weights (at least 0).
    adam_weight_decay: Annotated[float, at_least(0)] = 1e-2
    # Constant that is added to the denominator of an update, for adamw, muon and prodigy (greater than 0).
    adam_epsilon: Annotated[float, above(0)] = 1e-8
    # Largest global norm of the gradient; larger gradients are scaled down to it (greater than 0).
    max_grad_norm: Annotated[float, above(0)] = 1.0
    # Decay of the exponential moving average of the weights, which previews and infer use (at least 0 and below 1). 0:
    # no average.
    ema_decay: Annotated[float, at_least_and_below(0, 1)] = 0.0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, output and reproducibility of the run."""

    # Folder for checkpoints, metrics.jsonl, previews, reports and config.toml.
    output_dir: str
    # Seed of all random numbers (at least 0). The same seed gives the same run.
    seed: Annotated[int, at_least(0)] = 0
    # Records in a microbatch, over all devices (at least 1). With automatic rewards it counts conditions.
    train_batch_size: Annotated[int, at_least(1)] = 4
    # Microbatches in a step (at least 1).
    gradient_accumulation_steps: Annotated[int, at_least(1)] = 1
    # Length of the run in passes over the data, if max_train_steps is not given (at least 1).
    num_train_epochs: Annotated[int, at_least(1)] = 1
    # Length of the run in steps (at least 1). None: num_train_epochs sets the length.
    max_train_steps: Annotated[int | None, at_least(1)] = None
    # Interval between checkpoints, in steps (at least 0). 0: only one checkpoint, at the end.
    checkpointing_steps: Annotated[int, at_least(0)] = 500
    # Number of checkpoints to keep; the oldest ones are deleted (at least 0). The best checkpoint, in best/, is kept in
    # addition. 0: keep all.
    checkpoints_total_limit: Annotated[int, at_least(0)] = 3
    # Continue a run from a checkpoint: "latest" for the latest one in output_dir, perhaps the one in best/, or the
    # folder of a checkpoint.
    resume_from_checkpoint: str | None = None
    # Start a new run with the experts and router of another run: its output_dir, or the folder of one of its
    # checkpoints. With resume_from_checkpoint latest it counts only if there is no checkpoint yet.
    init_experts_from: str | None = None
    # Delete the run that output_dir already holds, and start a new one.
    overwrite_output_dir: bool = False
    # End the run after this number of looks (validation_steps) without a better held_out_reward (at least 1). None:
    # never.
    patience: Annotated[int | None, at_least(1)] = None
    # Stop the run when the flow loss on val_json_path is greater than the lowest so far, or the velocity norm greater
    # than the base's, by more than this fraction (greater than 0). None: never.
    max_drift: Annotated[float | None, above(0)] = None
    # Interval between measurements for max_drift, in steps (at least 1).
    drift_steps: Annotated[int, at_least(1)] = 10
    # Folder that stores compiled programs for later runs. auto: $JAX_COMPILATION_CACHE_DIR,
    # else ~/.cache/ra_jax/compiled; none: keep no programs.
    jax_compilation_cache_dir: str = "auto"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Division of the work over devices and processes."""

    # mesh: jax.jit over a mesh of devices, which can shard the weights; pmap: jax.pmap with a copy of all weights on
    # each device.
    parallelism: Literal["mesh", "pmap"] = "mesh"
    # Devices along the mesh axis data, which shards the batch and replicates the weights (-1 or at least 1). -1: number
    # of devices / (mesh_fsdp * mesh_tensor).
    mesh_data: Annotated[int, at_least(1, or_exactly=-1)] = -1
    # Devices along the mesh axis fsdp, which shards the batch and the weights (at least 1).
    mesh_fsdp: Annotated[int, at_least(1)] = 1
    # Devices along the mesh axis tensor, which shards attention heads and MLP features (at least 1).
    mesh_tensor: Annotated[int, at_least(1)] = 1
    # HOST:PORT of process 0, in a run of several processes. None: read from Slurm, Open MPI or the TPU machine; without
    # them the run has one process.
    coordinator_address: str | None = None
    # Number of processes in the run (at least 1). Required with coordinator_address.
    num_processes: Annotated[int | None, at_least(1)] = None
    # Number of this process, counted from 0 (at least 0). Required with coordinator_address.
    process_id: Annotated[int | None, at_least(0)] = None


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Metrics and previews."""

    # Trackers that get the metrics, in addition to metrics.jsonl and the progress bar; separated by spaces. none: no
    # tracker.
    report_to: tuple[Literal["tensorboard", "wandb", "none"], ...] = ("tensorboard",)
    # Interval between rows of metrics, in steps (at least 1).
    log_freq: Annotated[int, at_least(1)] = 10
    # Interval between looks, in steps (at least 0). A look removes the objects of held-out scenes, scores the results
    # (held_out_reward), draws a preview, and keeps the checkpoint in best/ if the reward is the highest so far. The
    # first look is at step 0. 0: no looks.
    validation_steps: Annotated[int, at_least(0)] = 500
    # Number of held-out scenes in a look, at most (at least 1).
    validation_scenes: Annotated[int, at_least(1)] = 32
    # Number of these scenes in a preview, at most (at least 1).
    num_validation_images: Annotated[int, at_least(1)] = 4
    # Sampling steps of the removals in a look (at least 1).
    num_inference_steps: Annotated[int, at_least(1)] = 28


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tunes FLUX.1-Fill to remove objects from photos. It trains LoRA experts and a router from pairs of photos,
    from human scores, or from rewards of images that the model generates.

    Settings can also be read from a TOML file with the flags' names as keys: --config FILE.toml. A flag on the command
    line overrides the file. Flags can be written with underscores or hyphens.
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
        """Training mode: `standard` has no rewards, `human` takes them from the records' scores, `automatic` from
        generated images."""
        if self.grpo.use_human_scores:
            return "human"
        return "automatic" if self.grpo.use_grpo and self.grpo.enable_grpo_rewards else "standard"

    @property
    def updates(self) -> int:
        """Number of updates of the weights in a step."""
        return self.rollouts.num_iterations if self.mode == "automatic" else 1

    @property
    def uses_policy(self) -> bool:
        """Whether the total loss has a policy term."""
        return self.grpo.use_grpo and self.grpo.enable_grpo_rewards and self.grpo.enable_grpo_loss

    @property
    def adapts_temperature(self) -> bool:
        """Whether the policy's temperature adapts to the fraction of clipped ratios.

        If the old policy is renewed before every update, no ratio is ever clipped, and the temperature stays.
        """
        updates = self.updates if self.mode == "automatic" else self.grpo.policy_sync_steps
        return (
            self.grpo.policy_temperature == "auto" and self.grpo.estimator in ("contrast", "matching") and updates > 1
        )

    @property
    def base_loss_weighting(self) -> Literal["none", "score", "softmax", "best"]:
        """How the base loss weighs records: `losses.base_loss_weighting`, with `auto` replaced by the mode's choice."""
        if self.losses.base_loss_weighting != "auto":
            return self.losses.base_loss_weighting
        return "score" if self.mode == "human" else "none"

    def total_steps(self, batches_per_epoch: int) -> int:
        """Return the number of steps of the run: `max_train_steps`, else the steps of `num_train_epochs` passes.

        batches_per_epoch: microbatches in one pass over the data.

        Raises:
            ConfigError: the warm-up is longer than the run.
        """
        microbatches = self.run.num_train_epochs * batches_per_epoch
        steps = self.run.max_train_steps or -(-microbatches // self.run.gradient_accumulation_steps)
        if self.optimization.lr_warmup_steps > steps:
            raise ConfigError(
                f"lr_warmup_steps = {self.optimization.lr_warmup_steps}: longer than the run's {steps} steps "
                f"(num_train_epochs = {self.run.num_train_epochs} of {batches_per_epoch} batches each); "
                "lower --lr_warmup_steps, or train longer"
            )
        return steps
