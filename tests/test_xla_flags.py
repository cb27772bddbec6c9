"""XLA flags that ra_jax sets, and the exactness of matrix products with them.

The products are computed in subprocesses in which only ra_jax sets flags. The process of pytest itself disables most
optimizations (conftest.py).
"""

import json
import os
import subprocess
import sys
import warnings

import jax
import jaxlib
import pytest

from ra_jax.config.parse import to_toml
from ra_jax.xla_flags import EXACT_PRODUCTS, FUSION_TYPE, compile_exact_products

AFFECTED = jaxlib.__version__.startswith("0.10.")

# Prints a row per shape: the shape, and the errors of one product, of two products, of gradients, and of value and
# gradients from one program. Errors are relative to the largest value.
PRODUCTS = """
import json
import jax, jax.numpy as jnp, numpy as np
import ra_jax

def one(h, W, a, b):
    return ((h @ (W + a @ b)) ** 2).mean(-1)

def errors(h, W, a, b, V, c, d, x):
    z = h @ (W + a @ b)
    return ((jax.nn.silu(z) @ (V + c @ d) - x) ** 2).mean(-1)

def exact(h, W, a, b, V, c, d, x):
    first, second = W + a @ b, V + c @ d
    z = h @ first
    sigmoid = 1.0 / (1.0 + np.exp(-z))
    y = z * sigmoid
    difference = y @ second - x
    dy = 2.0 * difference / x.shape[1]
    dz = dy @ second.T * sigmoid * (1.0 + z * (1.0 - sigmoid))
    dW, dV = h.T @ dz, y.T @ dy
    return (difference**2).mean(-1), [dz @ first.T, dW, dW @ b.T, a.T @ dW, dV, dV @ d.T, c.T @ dV, -dy]

def gradients(*inputs):
    return jax.grad(lambda *inputs: errors(*inputs).sum(), argnums=tuple(range(8)))(*inputs)

def distance(computed, true):
    return max(float(np.abs(p - q).max() / np.abs(q).max()) for p, q in zip(computed, true, strict=True))

rng, rows = np.random.default_rng(0), []
for shape in SHAPES:
    n, d, m, k, r = shape
    shapes = [(n, d), (d, m), (d, r), (r, m), (m, k), (m, r), (r, k), (n, k)]
    inputs = [rng.normal(size=s) / np.sqrt(1.0 if i in (0, 7) else s[0]) for i, s in enumerate(shapes)]
    (value, gradient), first = exact(*inputs), one(*inputs[:4])
    inputs = [jnp.asarray(x, jnp.float32) for x in inputs]
    both = jax.jit(lambda *inputs: [errors(*inputs), *gradients(*inputs)])(*inputs)
    rows.append([
        shape,
        distance([jax.jit(one)(*inputs[:4])], [first]),
        distance([jax.jit(errors)(*inputs)], [value]),
        distance(jax.jit(gradients)(*inputs), gradient),
        distance(both, [value, *gradient]),
    ])
print(json.dumps(rows))
"""
# (rows, input features, hidden features, output features, rank). Without the flag jaxlib 0.10.2 is right for the first
# two shapes.
SHAPES = [
    (64, 64, 64, 64, 8),
    (300, 200, 100, 50, 5),
    (512, 256, 256, 64, 16),
    (512, 256, 256, 128, 16),
    (256, 512, 192, 192, 2),
    (128, 256, 256, 64, 16),
]

LATE = """
import jax, jaxlib
jaxlib.__version__ = "0.10.2"
jax.devices()
import ra_jax
"""


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python on the CPU, without the variables of this process for XLA and JAX."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env=own | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_chains_of_products_are_exact_in_compiled_programs():
    done = start("-c", PRODUCTS.replace("SHAPES", repr(SHAPES)))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == len(SHAPES)
    assert not [row for row in rows if max(row[1:]) > 1e-5]


# Trains, and removes an object with the trained experts. Arguments: configuration, run, base, Redux.
ENTRIES = """
import sys
import numpy as np
from PIL import Image
from ra_jax import RemovalPipeline, train

config, run, base, redux = sys.argv[1:]
train.main(["--config", config])
pipe = RemovalPipeline.from_pretrained(base, redux=redux, experts=run, dtype="float32")
pipe(Image.new("RGB", (32, 32)), Image.new("L", (32, 32), 255), num_inference_steps=1)
"""


@pytest.mark.slow
def test_step_drift_previews_and_pipeline_are_compiled_with_the_flag(make_config_in, scored_scenes, tmp_path):
    """XLA dumps the options of each compiled program. All programs have the flag if it is needed, else none has it."""
    config = make_config_in(
        tmp_path,
        **dict.fromkeys(("use_grpo", "use_human_scores", "enable_grpo_rewards", "enable_grpo_loss"), False),
        val_json_path=str(scored_scenes / "labeled_dict.json"),
        train_batch_size=2,
        max_train_steps=1,
        validation_steps=1,
        num_validation_images=1,
        num_inference_steps=1,
        max_drift=10.0,
        drift_steps=1,
    )
    (tmp_path / "run.toml").write_text(to_toml(config))
    models = config.model.pretrained_model_name_or_path, config.model.pretrained_redux_model_name_or_path
    done = start(
        *("-c", ENTRIES, str(tmp_path / "run.toml"), config.run.output_dir, *models),
        XLA_FLAGS=f"--xla_dump_to={tmp_path / 'dump'}",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        JAX_ENABLE_COMPILATION_CACHE="0",
    )
    assert done.returncode == 0, done.stderr
    options = {path.name: path.read_text() for path in (tmp_path / "dump").glob("*.debug_options")}
    names = [name.split(".")[1] for name in options]
    assert {"jit_train_step", "jit__lambda"} <= set(names)  # jit__lambda is the program of DriftGuard
    assert names.count("jit_remove") >= 2  # one of the preview, one of the pipeline
    assert {EXACT_PRODUCTS.partition("=")[2] in text for text in options.values()} == {AFFECTED}


@pytest.fixture
def pretend_jaxlib(monkeypatch):
    """A function that simulates a version of jaxlib, and the backend that JAX has initialized (None for none)."""

    def seem(version: str, backend: str | None = None):
        bridge = sys.modules["jax._src.xla_bridge"]
        monkeypatch.setattr(jaxlib, "__version__", version)
        monkeypatch.setattr(bridge, "backends_are_initialized", lambda: backend is not None)
        monkeypatch.setattr(bridge, "default_backend", lambda: backend)

    return seem


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, EXACT_PRODUCTS),
        ({"XLA_FLAGS": "  "}, EXACT_PRODUCTS),
        ({"XLA_FLAGS": "--xla_dump_to=/a  --xla_b=1"}, f"--xla_dump_to=/a  --xla_b=1 {EXACT_PRODUCTS}"),
        ({"XLA_FLAGS": f"{FUSION_TYPE}= --xla_b=1"}, f"{FUSION_TYPE}= --xla_b=1"),
    ],
)
def test_the_flag_is_added_to_other_flags_and_does_not_replace_the_users_value(before, after, pretend_jaxlib):
    pretend_jaxlib("0.10.2")
    environ = dict(before)
    for _ in range(2):  # the second time as in a child process, which inherits the variable
        compile_exact_products(environ)
        assert environ == {"XLA_FLAGS": after}


def test_a_file_of_flags_is_read(tmp_path, pretend_jaxlib):
    pretend_jaxlib("0.10.2")
    (tmp_path / "flags").write_text("--xla_a=1\n--xla_b=2\n")
    environ = {"XLA_FLAGS": str(tmp_path / "flags")}
    compile_exact_products(environ)
    assert environ["XLA_FLAGS"].split() == ["--xla_a=1", "--xla_b=2", EXACT_PRODUCTS]


@pytest.mark.parametrize("version", ["0.11.0", "0.12.0.1", "0.100.0", "1.0.10.2"])
def test_other_jaxlibs_get_no_flag(version, pretend_jaxlib):
    pretend_jaxlib(version)
    environ = {"XLA_FLAGS": "--xla_a=1"}
    compile_exact_products(environ)
    assert environ == {"XLA_FLAGS": "--xla_a=1"}


def test_too_late_for_the_cpu_warns_and_leaves_the_keys_of_the_compilation_cache(pretend_jaxlib):
    pretend_jaxlib("0.10.2", backend="cpu")
    environ = {"XLA_FLAGS": "--xla_a=1"}
    with pytest.warns(RuntimeWarning, match=r"JAX was in use before ra_jax was imported.*XLA_FLAGS=--xla_cpu_exp"):
        compile_exact_products(environ)
    assert environ == {"XLA_FLAGS": "--xla_a=1"}
    pretend_jaxlib("0.10.2", backend="gpu")
    with warnings.catch_warnings(action="error"):
        compile_exact_products(environ)
    assert environ == {"XLA_FLAGS": "--xla_a=1"}


def test_the_warning_names_the_line_that_imports_too_late(tmp_path):
    (tmp_path / "late.py").write_text(LATE)
    done = start(str(tmp_path / "late.py"))
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'late.py'}:5: RuntimeWarning: JAX was in use" in done.stderr


# Compiles a program as a train step is compiled, in a process that used JAX before ra_jax. Prints its largest error.
LATE_STEP = """
import jax, jax.numpy as jnp, numpy as np
jax.devices()
from ra_jax.parallel.compilation import compile_lowered

def errors(h, W, a, b, V, c, d, x):
    return ((jax.nn.silu(h @ (W + a @ b)) @ (V + c @ d) - x) ** 2).mean(-1)

rng = np.random.default_rng(0)
shapes = [(512, 256), (256, 256), (256, 16), (16, 256), (256, 64), (256, 16), (16, 64), (512, 64)]
inputs = [jnp.asarray(rng.normal(size=s) / 16, jnp.float32) for s in shapes]
step = compile_lowered(jax.jit(errors).lower(*inputs), jax.default_backend())
print(float(jnp.abs(step(*inputs) - errors(*inputs)).max()))
"""


def test_a_train_step_is_exact_even_if_jax_was_used_before():
    done = start("-c", LATE_STEP)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6


def test_an_unreadable_file_of_flags_is_left_to_xla(tmp_path, pretend_jaxlib):
    pretend_jaxlib("0.10.2")
    environ = {"XLA_FLAGS": str(tmp_path / "nothing")}
    compile_exact_products(environ)
    assert environ == {"XLA_FLAGS": str(tmp_path / "nothing")}


def test_this_process_has_the_flag_if_it_is_needed():
    assert jax.devices("cpu")  # an unknown flag would abort the process here
    assert (EXACT_PRODUCTS in os.environ.get("XLA_FLAGS", "")) == AFFECTED
