"""The schema of a batch: its keys, their types and shapes, and which batches have them.

Sizes by letter: B rows, h × w pixels of a panel, s × s pixels that Redux sees, N packed latent tokens of a diptych with
C4 = 4C features each, T image tokens of D features.

A batch has parts, which depend on the run:

    photos    pictures of the panels; all batches but those of a pack with latents, where no rewards are computed
    results   the records have results
    latents   of a pack with latents, in place of what encodes the photos
    redux     the model has image tokens, and they are not among the latents
    training  the batch is for a training step
    rewards   human mode with --enable_grpo_rewards

`LOADED` is what `loader.Loader` makes of records; `VALUES` is what `training.dataset.record_values` adds to each.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import jax  # takes seconds, and commands that only read data do without

Batch = dict[str, "jax.Array"]
Part = Literal["photos", "results", "latents", "redux", "training", "rewards"]


@dataclass(frozen=True)
class Field:
    """A key of a batch. shape: of sizes and letters for sizes; parts: the batch has the key where it has all of them;
    dtypes: one of these, the first if nothing else is known."""

    shape: tuple[str | int, ...]
    dtypes: tuple[str, ...]
    parts: tuple[Part, ...] = ()

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with numbers in the place of letters."""
        return tuple(sizes[side] if isinstance(side, str) else side for side in self.shape)


_PANEL, _TOKENS = ("B", "h", "w", 3), ("B", "N", "C4")

LOADED: dict[str, Field] = {
    "source": Field(_PANEL, ("uint8",), ("photos",)),
    "reference": Field(_PANEL, ("uint8",), ("photos",)),
    "result": Field(_PANEL, ("uint8",), ("photos", "results")),
    "mask": Field(("B", "h", "w"), ("uint8",)),  # 1 = remove
    "redux_pixels": Field(("B", "s", "s", 3), ("float32",), ("redux",)),  # of the reference
    "masked_latents": Field(_TOKENS, ("float32",), ("latents",)),  # of the source, the mask's pixels grey
    "image_tokens": Field(("B", "T", "D"), ("float32", "bfloat16"), ("latents",)),
    "result_latents": Field(_TOKENS, ("float32",), ("latents", "results")),
    "group_id": Field(("B",), ("int32",)),  # `records.scene_ids`
    "record_id": Field(("B",), ("int32",)),  # position in the list of records
    "epoch": Field(("B",), ("int32",)),
    "condition_weight": Field(("B",), ("float32",)),  # 1 / (rows of the record's group in the global batch)
}
VALUES: dict[str, Field] = {
    "sample_weight": Field(("B",), ("float32",), ("training",)),  # of the record in the base loss
    "scores": Field(("B", 3), ("float32",), ("training", "rewards")),  # removal, background, smoothness in [0, 1]
    "reward": Field(("B",), ("float32",), ("training", "rewards")),  # weighted sum of 2·score − 1
    "advantage": Field(("B",), ("float32",), ("training", "rewards")),
    "group_reward_std": Field(("B",), ("float32",), ("training", "rewards")),  # of the record's scene
    "zero_std_group": Field(("B",), ("float32",), ("training", "rewards")),  # 1: all rewards of the scene are equal
}
FIELDS = LOADED | VALUES
# What packs with latents hold, and the loader takes from them.
LATENTS = tuple(name for name, field in LOADED.items() if "latents" in field.parts)


def batch_fields(parts: Collection[Part]) -> dict[str, Field]:
    """The keys of a batch with these parts."""
    return {name: field for name, field in FIELDS.items() if set(field.parts) <= set(parts)}


def has_results(batch: Mapping[str, Any]) -> bool:
    """Whether the records of a batch have results, as photos or as latents."""
    return "result" in batch or "result_latents" in batch


def check_schema(batch: Mapping[str, Any], parts: Collection[Part]) -> dict[str, int]:
    """Compare a batch of arrays with the schema; returns the sizes of its letters.

    Raises:
        ValueError: keys that are missing or too many, another type or shape, letters that stand for two sizes.
    """
    fields = batch_fields(parts)
    if batch.keys() != fields.keys():
        missing, extra = sorted(fields.keys() - batch.keys()), sorted(batch.keys() - fields.keys())
        raise ValueError(f"a batch with {sorted(parts)}: keys {missing} are missing, {extra} are too many")
    sizes: dict[str, int] = {}
    for name, field in fields.items():
        array = batch[name]
        if str(array.dtype) not in field.dtypes:
            raise ValueError(f"{name} is {array.dtype}: expected {' or '.join(field.dtypes)}")
        if len(array.shape) == len(field.shape):
            for letter, side in zip(field.shape, array.shape, strict=True):
                if isinstance(letter, str):
                    sizes.setdefault(letter, side)
            if array.shape == field.sized(sizes):
                continue
        raise ValueError(f"{name} has shape {array.shape}: expected {field.shape}, where {sizes}")
    return sizes
