"""Tables that map a module's parameters to the tensors in diffusers' and transformers' files.

Each rule maps a pattern for parameter paths to a tensor name and an order of axes. The pattern has to match the whole
path, and the first matching rule applies. Rules map parameters to tensors, not tensors to parameters. One table can
therefore be used to load, to save, and to check that every tensor is used exactly once.
"""

import dataclasses
import re

SAME_AXES: tuple[int, ...] = ()
LINEAR = (1, 0)  # [out, in] in the file -> kernel [in, out]
CONV = (2, 3, 1, 0)  # OIHW in the file -> kernel HWIO


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""The rule for one kind of parameter.

    Attributes:
        pattern: regular expression for paths such as "transformer_blocks.attn.to_q.kernel".
        tensor: name of the tensor, with \1 for the first group of the pattern. If the name contains `{block}`, the
            parameter stacks one tensor per block along axis 0.
        axes: permutation such that `tensor.transpose(axes)` is the parameter or, if the parameter is stacked, one block
            of it; `SAME_AXES` if the order of axes is the same.
    """

    pattern: str
    tensor: str
    axes: tuple[int, ...] = SAME_AXES


@dataclasses.dataclass(frozen=True)
class Table:
    """The rules for one model.

    Attributes:
        rules: the rules, tried in this order.
        prefix: prefix of all tensor names in saved files. Files without this prefix can be loaded, too.
        unused: regular expression for the names, without prefix, of tensors that loading skips, because they belong to
            parts that the model does not have.
    """

    rules: tuple[Rule, ...]
    prefix: str = ""
    unused: str | None = None

    def find_tensor(self, path: str) -> tuple[str, tuple[int, ...]]:
        """Return `tensor` and `axes` of the first rule that matches the parameter at `path`.

        Raises:
            KeyError: no rule matches. The error is then in the table, not in the file.
        """
        for rule in self.rules:
            if match := re.fullmatch(rule.pattern, path):
                return match.expand(rule.tensor), rule.axes
        raise KeyError(f"no rule matches the parameter {path}: add one in ra_jax/interop/diffusers_tables.py.")

    def is_unused(self, tensor: str) -> bool:
        """Return whether loading skips this tensor of the file."""
        return self.unused is not None and re.fullmatch(self.unused, tensor) is not None


_BLOCKS = r"((?:single_)?transformer_blocks)\.(.+)"

FLUX_TABLE = Table(
    (
        Rule(_BLOCKS + r"\.kernel", r"\1.{block}.\2.weight", LINEAR),
        Rule(_BLOCKS + r"\.scale", r"\1.{block}.\2.weight"),
        Rule(_BLOCKS + r"\.bias", r"\1.{block}.\2.bias"),
        Rule(r"(.+)\.kernel", r"\1.weight", LINEAR),
        Rule(r"(.+)\.bias", r"\1.bias"),
    )
)

VAE_TABLE = Table(
    (
        Rule(r"(.+\.attentions\.0\.to_(?:q|k|v|out\.0))\.kernel", r"\1.weight", LINEAR),
        Rule(r"(.+)\.kernel", r"\1.weight", CONV),
        Rule(r"(.+)\.scale", r"\1.weight"),
        Rule(r"(.+)\.bias", r"\1.bias"),
    )
)

SIGLIP_TABLE = Table(
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
    # Redux uses the last hidden state, which is computed before the pooling head. Files of a complete SigLIP model also
    # contain a text model.
    unused=r"head\..+|embeddings\.position_ids|text_model\..+|logit_(scale|bias)",
)

REDUX_TABLE = Table((Rule(r"(.+)\.kernel", r"\1.weight", LINEAR), Rule(r"(.+)\.bias", r"\1.bias")))
