"""Diagnosis of what the real monitor records."""

import pytest
import torch
from health_models import FAULTS, HEALTHY

health = pytest.importorskip("fastclip.health.monitor")


@pytest.mark.parametrize("name", ["sigmoid_stack", "exploding_rnn", "dead_relu", "low_threshold", "infinite_layer"])
def test_faults(name):
    fault = FAULTS[name]
    monitor, _ = train(fault.build(0, 1, torch.float32))
    first, *_ = monitor.diagnose()
    assert (first.kind, first.layer) == (fault.kind, fault.layer or first.layer), str(first)


@pytest.mark.parametrize("name", ["lstm", "encoder", "rezero"])
def test_healthy(name):
    monitor, losses = train(HEALTHY[name](0, 1, torch.float32))
    assert [str(f) for f in monitor.diagnose()] == []
    assert losses[-1] < losses[0]


def train(trial):
    monitor = health.GradientMonitor(trial.model, activations=True)
    optimizer = trial.optimizer([p for p in trial.model.parameters() if p.requires_grad], lr=trial.lr)
    losses = []
    for step in range(trial.steps):
        optimizer.zero_grad()
        loss = trial.loss(step)
        loss.backward()
        trial.plant(step, trial.model)
        monitor.clip_grad_norm_(float("inf") if trial.max_norm is None else trial.max_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return monitor, losses
