"""Where each parameter is found in diffusers' and transformers' files: tables of (pattern -> tensor, axes).

A pattern is matched against a parameter's whole path in the module; the first rule that matches counts. The tables are
read from the module's side, so that one table serves loading, saving and the check that every tensor is used once.
"""

import dataclasses
import re

AS_IS: tuple[int, ...] = ()
LINEAR = (1, 0)  # [out, in] in the file -> kernel [in, out]
CONV = (2, 3, 1, 0)  # OIHW in the file -> kernel HWIO


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""One kind of parameter.

    Attributes:
        pattern: regular expression for the parameter's path, such as "transformer_blocks.attn.to_q.kernel".
        tensor: the tensor's name, with \1 for the pattern's groups; with `{block}` the parameter is a stack on axis 0
            of as many tensors.
        axes: permutation that takes the file's axes (of one block) to the parameter's; `AS_IS` for none.
    """

    pattern: str
    tensor: str
    axes: tuple[int, ...] = AS_IS


@dataclasses.dataclass(frozen=True)
class Table:
    """The rules of one model.

    Attributes:
        rules: tried in order.
        prefix: what files may have before every name; it is written.
        unused: regular expression for tensors (without the prefix) that belong to parts the model does not have.
    """

    rules: tuple[Rule, ...]
    prefix: str = ""
    unused: str | None = None

    def tensor(self, path: str) -> tuple[str, tuple[int, ...]]:
        """The tensor's name (perhaps with `{block}`) and axes for the parameter at `path`.

        Raises:
            KeyError: if no rule matches, which is the table's fault and not the file's.
        """
        for rule in self.rules:
            if match := re.fullmatch(rule.pattern, path):
                return match.expand(rule.tensor), rule.axes
        raise KeyError(f"no rule for the parameter {path}: expected one in ra_jax/interop/diffusers_tables.py.")

    def is_unused(self, tensor: str) -> bool:
        """Whether a tensor of the file is knowingly left out."""
        return self.unused is not None and re.fullmatch(self.unused, tensor) is not None


_BLOCKS = r"((?:single_)?transformer_blocks)\.(.+)"

FLUX = Table(
    (
        Rule(_BLOCKS + r"\.kernel", r"\1.{block}.\2.weight", LINEAR),
        Rule(_BLOCKS + r"\.scale", r"\1.{block}.\2.weight"),
        Rule(_BLOCKS + r"\.bias", r"\1.{block}.\2.bias"),
        Rule(r"(.+)\.kernel", r"\1.weight", LINEAR),
        Rule(r"(.+)\.bias", r"\1.bias"),
    )
)

VAE = Table(
    (
        Rule(r"(.+\.attentions\.0\.to_(?:q|k|v|out\.0))\.kernel", r"\1.weight", LINEAR),
        Rule(r"(.+)\.kernel", r"\1.weight", CONV),
        Rule(r"(.+)\.scale", r"\1.weight"),
        Rule(r"(.+)\.bias", r"\1.bias"),
    )
)

SIGLIP = Table(
    (
        Rule(r"layers\.(.+)\.kernel", r"encoder.layers.{block}.\1.weight", LINEAR),
        Rule(r"layers\.(.+)\.scale", r"encoder.layers.{block}.\1.weight"),
        Rule(r"layers\.(.+)\.bias", r"encoder.layers.{block}.\1.bias"),
        Rule(r"patch_embedding\.kernel", r"embeddings.patch_embedding.weight", CONV),
        Rule(r"patch_embedding\.bias", r"embeddings.patch_embedding.bias"),
        Rule(r"position_embedding", r"embeddings.position_embedding.weight"),
        Rule(r"post_layernorm\.scale", r"post_layernorm.weight"),
        Rule(r"post_layernorm\.bias", r"post_layernorm.bias"),
    ),
    prefix="vision_model.",
    # The pooling head comes after the last hidden state; the text model is in files of the whole SigLIP.
    unused=r"head\..+|embeddings\.position_ids|text_model\..+|logit_(scale|bias)",
)

REDUX = Table((Rule(r"(.+)\.kernel", r"\1.weight", LINEAR), Rule(r"(.+)\.bias", r"\1.bias")))
