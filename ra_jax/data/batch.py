"""Schema of a batch: its keys, their dtypes and shapes, and which batches have which keys.

Letters in shapes: B rows, h × w pixels of a panel, s × s pixels of a Redux input, N packed latent tokens of a diptych
with C4 = 4C features each, T image tokens with D features each.

A batch consists of parts. The settings of the run determine its parts:

    photos    images of the panels; absent if a pack has latents and no automatic rewards are computed
    results   results of the records; absent if the records have none
    latents   latents and image tokens from a pack with latents; a step then does not encode the photos
    redux     inputs of Redux; present if the model has image tokens and no pack provides them
    training  what a training step needs besides images; absent in batches for previews and validation
    judged    masks for the rewards of generated images; present in automatic mode
    rewards   scores, rewards and advantages; present in human mode with --enable_grpo_rewards

`loader.Loader` loads the keys of `LOADED_FIELDS`. `training.dataset.record_values` computes the keys of
`COMPUTED_FIELDS`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import jax  # The import takes seconds, and commands that only read data do not need JAX.

Batch = dict[str, "jax.Array"]
Part = Literal["photos", "results", "latents", "redux", "judged", "training", "rewards"]


@dataclass(frozen=True)
class Field:
    """A key of a batch.

    Attributes:
        shape: sizes, or letters that stand for sizes.
        dtypes: allowed dtypes; the first is the default.
        parts: parts that a batch must have to contain the key.
    """

    shape: tuple[str | int, ...]
    dtypes: tuple[str, ...]
    parts: tuple[Part, ...] = ()

    def shape_for(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with each letter replaced by its size in `sizes`."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)


_PANEL_SHAPE, _TOKENS_SHAPE = ("B", "h", "w", 3), ("B", "N", "C4")

LOADED_FIELDS: dict[str, Field] = {
    "source": Field(_PANEL_SHAPE, ("uint8",), ("photos",)),
    "reference": Field(_PANEL_SHAPE, ("uint8",), ("photos",)),
    "result": Field(_PANEL_SHAPE, ("uint8",), ("photos", "results")),
    "mask": Field(("B", "h", "w"), ("uint8",)),  # 1 = remove; enlarged if masks are augmented
    "file_mask": Field(("B", "h", "w"), ("uint8",), ("judged",)),  # the mask as it is in the file
    "redux_pixels": Field(("B", "s", "s", 3), ("float32",), ("redux",)),  # preprocessed reference
    "masked_latents": Field(_TOKENS_SHAPE, ("float32",), ("latents",)),  # of the diptych, with masked pixels gray
    "image_tokens": Field(("B", "T", "D"), ("float32", "bfloat16"), ("latents",)),
    "result_latents": Field(_TOKENS_SHAPE, ("float32",), ("latents", "results")),
    "group_id": Field(("B",), ("int32",)),  # `records.scene_ids`
    "record_id": Field(("B",), ("int32",)),  # position in the list of records
    "epoch": Field(("B",), ("int32",)),
    "condition_weight": Field(("B",), ("float32",)),  # 1 / (rows of the record's scene in the global batch)
}
COMPUTED_FIELDS: dict[str, Field] = {
    "sample_weight": Field(("B",), ("float32",), ("training",)),  # weight of the record in the base loss
    "scores": Field(("B", 3), ("float32",), ("training", "rewards")),  # removal, background, smoothness in [0, 1]
    "reward": Field(("B",), ("float32",), ("training", "rewards")),  # weighted sum of 2·score − 1
    "advantage": Field(("B",), ("float32",), ("training", "rewards")),
    "group_reward_std": Field(("B",), ("float32",), ("training", "rewards")),  # in the record's scene
    "zero_std_group": Field(("B",), ("float32",), ("training", "rewards")),  # 1 if all rewards of the scene are equal
}
FIELDS = LOADED_FIELDS | COMPUTED_FIELDS
# Keys that the loader reads from a pack with latents.
LATENT_KEYS = tuple(name for name, field in LOADED_FIELDS.items() if "latents" in field.parts)


def batch_fields(parts: Collection[Part]) -> dict[str, Field]:
    """Return the keys of a batch with these parts, and their fields."""
    return {name: field for name, field in FIELDS.items() if set(field.parts) <= set(parts)}


def has_results(batch: Mapping[str, Any]) -> bool:
    """Return whether a batch has results, as photos or as latents."""
    return "result" in batch or "result_latents" in batch


def check_schema(batch: Mapping[str, Any], parts: Collection[Part]) -> dict[str, int]:
    """Check a batch of arrays against the schema and return the size of each letter.

    Raises:
        ValueError: a key is missing or unexpected, a dtype or shape is wrong, or one letter has two sizes.
    """
    fields = batch_fields(parts)
    if batch.keys() != fields.keys():
        missing, unexpected = sorted(fields.keys() - batch.keys()), sorted(batch.keys() - fields.keys())
        raise ValueError(f"batch with parts {sorted(parts)}: missing keys {missing}, unexpected keys {unexpected}")
    sizes: dict[str, int] = {}
    for name, field in fields.items():
        array = batch[name]
        if str(array.dtype) not in field.dtypes:
            raise ValueError(f"{name} has dtype {array.dtype}: expected {' or '.join(field.dtypes)}")
        if len(array.shape) == len(field.shape):
            for letter, size in zip(field.shape, array.shape, strict=True):
                if isinstance(letter, str):
                    sizes.setdefault(letter, size)
            if array.shape == field.shape_for(sizes):
                continue
        raise ValueError(f"{name} has shape {array.shape}: expected {field.shape} with sizes {sizes}")
    return sizes
