"""Errors that `ra_jax.train` prints without a traceback."""

import logging
from types import SimpleNamespace

import pytest
from jax.errors import JaxRuntimeError

from ra_jax import train
from ra_jax.config.settings import ParallelConfig
from ra_jax.errors import RewardError
from ra_jax.training import loop


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RewardError("unknown reward 'x'"), "error: unknown reward 'x'"),
        (JaxRuntimeError("INTERNAL: CpuCallback error\nRewardError: reward 'mine' raised KeyError: 3\nmore"), "mine"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), "smaller --train_batch_size"),
        (FloatingPointError("train_loss is nan"), "error: train_loss is nan"),
    ],
)
def test_errors_that_a_user_can_fix_are_printed_without_a_traceback(monkeypatch, error, message):
    def fail(config):
        raise error

    monkeypatch.setattr(logging, "basicConfig", lambda **settings: None)
    monkeypatch.setattr(train, "parse", lambda argv: SimpleNamespace(parallel=ParallelConfig()))
    monkeypatch.setattr(loop, "train", fail)
    with pytest.raises(SystemExit) as ended:
        train.main([])
    assert message in ended.value.code


def test_another_error_keeps_its_traceback(monkeypatch):
    def fail(config):
        raise JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(logging, "basicConfig", lambda **settings: None)
    monkeypatch.setattr(train, "parse", lambda argv: SimpleNamespace(parallel=ParallelConfig()))
    monkeypatch.setattr(loop, "train", fail)
    with pytest.raises(JaxRuntimeError, match="something else"):
        train.main([])
