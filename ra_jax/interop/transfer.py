"""Copy the parameters of a module from and to safetensors files, one parameter at a time.

A `diffusers_tables.Table` maps parameters to tensors in the files.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ra_jax.errors import WeightError
from ra_jax.interop.diffusers_tables import Table
from ra_jax.interop.safetensors_io import FLOAT_DTYPES, StoredTensor, stored_tensors, write_tensors
from ra_jax.models.quantization import quantize
from ra_jax.outputs import write_file
from ra_jax.parallel.partitioning import parameter_name

Module = TypeVar("Module", bound=nnx.Module)

# Function of a parameter's name (such as "transformer_blocks/attn/to_q/kernel") and value. It puts the value on the
# parameter's devices.
PutParameter = Callable[[str, np.ndarray], jax.Array]

SCALE_NAME = "kernel_scale"  # name of the variable with the scale of an int8 kernel; it is beside the kernel
REPORT_LINES = 20  # tensors that an error message lists for each kind of problem; it counts the others
STRIP_ROWS = 32  # number of rows that are copied at a time


@dataclass(frozen=True)
class Parameter:
    """A parameter, and the tensors in the files that contain its values.

    Attributes:
        path: path of the parameter in the module's state.
        variable: the parameter.
        tensors: names of the tensors: one name, or one per block if `stacked`.
        stacked: whether the parameter stacks one tensor per block along axis 0.
        axes: as in `Rule`.
        scale: the variable with the scale of an int8 kernel, computed from the same tensors; None for other parameters.
    """

    path: tuple
    variable: nnx.Variable
    tensors: tuple[str, ...]
    stacked: bool
    axes: tuple[int, ...]
    scale: nnx.Variable | None = None

    def variables(self) -> list[tuple[tuple, nnx.Variable]]:
        """Return (path, variable) of the parameter and, for an int8 kernel, (path, variable) of its scale."""
        variables = [(self.path, self.variable)]
        return variables if self.scale is None else [*variables, ((*self.path[:-1], SCALE_NAME), self.scale)]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in the file."""
        shape = self.variable.shape[self.stacked :]
        return tuple(shape[axis] for axis in np.argsort(self.axes)) if self.axes else shape

    def to_file_axes(self, block: np.ndarray) -> np.ndarray:
        """Return a view of `block` with its axes in the order of the file.

        `block` is the part of the parameter's value that one tensor contains.
        """
        return block.transpose(np.argsort(self.axes)) if self.axes else block


def load_parameters(module: Module, folder: Path, table: Table, put: PutParameter | None = None) -> Module:
    """Return `module` with the weights in `folder`, cast to the dtypes of the module's parameters.

    Kernels whose dtype is int8 are quantized. Host memory holds one parameter at a time.

    Args:
        module: abstract module (`nnx.eval_shape`), so that no initial values are computed.
        folder: folder of safetensors files.
        table: rules for this kind of module.
        put: puts each parameter on its devices. If it is None, parameters are put on the default device.

    Raises:
        WeightError: the files could not be read, or tensors and parameters do not match one to one in name and shape.
            The message lists missing, unexpected and wrongly shaped tensors.
    """
    graphdef, state = nnx.split(module)
    stored = stored_tensors(folder)
    prefix = table.prefix if any(name.startswith(table.prefix) for name in stored) else ""
    parameters = _list_parameters(state, table, prefix)
    _check_match(folder, parameters, stored, prefix, table)
    put = put or (lambda name, value: jnp.asarray(value))

    loaded = []
    for parameter in parameters:
        for (path, variable), value in zip(parameter.variables(), _read_values(parameter, stored), strict=True):
            loaded.append((path, variable.replace(put(parameter_name(path), value))))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def _read_values(parameter: Parameter, stored: Mapping[str, StoredTensor]) -> list[np.ndarray]:
    """Read the value of each variable in `parameter.variables()` from the files."""
    values = [np.empty(variable.shape, variable.dtype) for _, variable in parameter.variables()]
    for block, tensor in enumerate(parameter.tensors):
        outputs = [value[block] if parameter.stacked else value for value in values]
        if parameter.scale is None:
            _copy_strips(stored[tensor].read(), parameter.to_file_axes(outputs[0]))
            continue
        kernel = np.empty(outputs[0].shape, np.float32)
        _copy_strips(stored[tensor].read(), parameter.to_file_axes(kernel))
        outputs[0][...], outputs[1][...] = quantize(kernel)
    return values


def save_parameters(module: nnx.Module, config: Mapping[str, Any], folder: Path, stem: str, table: Table) -> None:
    """Write all parameters except experts to `folder`, without changing dtypes, and `config` to `folder`/config.json.

    Args:
        module: module with weights.
        config: content of config.json.
        folder: folder to write to. It is created if it does not exist.
        stem: as in `safetensors_io.write_tensors`.
        table: rules for this kind of module.
    """
    state = nnx.state(module, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    blocks = {
        tensor: (parameter, block)
        for parameter in _list_parameters(state, table, table.prefix)
        for block, tensor in enumerate(parameter.tensors)
    }

    def read(tensor: str) -> np.ndarray:
        parameter, block = blocks[tensor]
        value = np.asarray(parameter.variable[block] if parameter.stacked else parameter.variable[...])
        out = np.empty(parameter.tensor_shape, value.dtype)
        _copy_strips(parameter.to_file_axes(value), out)
        return out

    sizes = {
        tensor: math.prod(parameter.tensor_shape) * parameter.variable.dtype.itemsize
        for tensor, (parameter, _) in blocks.items()
    }
    write_tensors(folder, stem, sizes, read)
    write_file(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _list_parameters(state: nnx.State, table: Table, prefix: str) -> list[Parameter]:
    parameters, variables = [], dict(nnx.to_flat_state(state))
    for path, variable in variables.items():
        if path[-1] == SCALE_NAME:
            continue  # The scale of an int8 kernel belongs to the kernel's `Parameter`.
        tensor, axes = table.find_tensor(parameter_name(path, "."))
        stacked = "{block}" in tensor
        blocks = range(variable.shape[0] if stacked else 1)
        tensors = tuple(prefix + tensor.format(block=block) for block in blocks)
        scale = variables.get((*path[:-1], SCALE_NAME)) if path[-1] == "kernel" else None
        parameters.append(Parameter(path, variable, tensors, stacked, axes, scale))
    return parameters


def _copy_strips(values: np.ndarray, out: np.ndarray) -> None:
    """Copy `values` to `out` and cast them to the dtype of `out`. Either array may be a transposed view."""
    # A strip of rows fits into the cache. Copying strips is three times faster than transposing a large matrix at once.
    for start in range(0, values.shape[0], STRIP_ROWS):
        out[start : start + STRIP_ROWS] = values[start : start + STRIP_ROWS]


def _check_match(
    folder: Path, parameters: Sequence[Parameter], stored: Mapping[str, StoredTensor], prefix: str, table: Table
) -> None:
    """Raise WeightError unless parameters and tensors match one to one in name and shape."""
    expected = {tensor: parameter.tensor_shape for parameter in parameters for tensor in parameter.tensors}
    uses = Counter(tensor for parameter in parameters for tensor in parameter.tensors)
    problems = {
        "missing (the model needs them)": [
            f"{tensor} {list(shape)}" for tensor, shape in expected.items() if tensor not in stored
        ],
        "unexpected (the model has no parameters for them)": [
            f"{name} {list(tensor.shape)}"
            for name, tensor in stored.items()
            if name not in expected and not table.is_unused(name.removeprefix(prefix))
        ],
        "of the wrong shape": [
            f"{tensor} {list(stored[tensor].shape)}, expected {list(shape)}"
            for tensor, shape in expected.items()
            if tensor in stored and stored[tensor].shape != shape
        ],
        f"of a dtype other than {', '.join(FLOAT_DTYPES)} (quantized files are not supported)": [
            f"{tensor} {stored[tensor].dtype_name}"
            for tensor in expected
            if tensor in stored and stored[tensor].dtype_name not in FLOAT_DTYPES
        ],
        "used by more than one parameter": [tensor for tensor, count in uses.items() if count > 1],
    }
    if not any(problems.values()):
        return
    report = [f"the tensors in {folder} do not match the config.json there:"]
    for problem, lines in problems.items():
        if lines:
            report.append(f"{len(lines)} {problem}:")
            report += [f"  {line}" for line in lines[:REPORT_LINES]]
        if len(lines) > REPORT_LINES:
            report.append(f"  and {len(lines) - REPORT_LINES} more")
    report.append("Use config.json and weights of the same model, in diffusers' layout.")
    raise WeightError("\n".join(report))
