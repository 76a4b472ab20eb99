"""Diagnosis: healthy models are not accused, planted faults found by kind and layer; edges; generated histories.

The models are in health_models.py. Larger sweeps over seeds and sizes are reported in docs/health-kinds.md.
"""

import json
import math
import time
from dataclasses import replace

import health_models
import pytest
import torch
from health_models import FAULTS, HEALTHY, relu_mlp
from health_support import record
from support import NAN

from fastclip.health.diagnosis import diagnose
from fastclip.health.finding import KINDS
from fastclip.health.history import Activation, History, Layer

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

INF = float("inf")
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def one_thread(fixed_state):
    torch.set_num_threads(1)


def synthetic(norms, layers=3, max_norm=None, dtype="float32", module="Linear", norm_type=2.0, weight=10.0):
    """A history of equal layers of 8 x 8 whose gradients have these norms: [steps] or [steps, layers]."""
    norms = torch.as_tensor(norms, dtype=torch.float64)
    norms = norms if norms.dim() == 2 else norms[:, None].expand(-1, layers)
    steps, layers = norms.shape
    values = torch.zeros(steps, layers, 6, dtype=torch.float64)
    values[..., 0] = norms
    values[..., 1] = norms / 4
    values[..., 2] = torch.where(norms == 0, 64.0, 0.0)
    values[..., 3] = (norms == INF).double()
    values[..., 4] = (values[..., 0].isnan()).double()
    return History(
        [Layer(f"layers.{i}.weight", (8, 8), dtype, module, i) for i in range(layers)],
        torch.arange(steps),
        norms.square().sum(1).sqrt(),
        torch.full((steps,), NAN if max_norm is None else max_norm, dtype=torch.float64),
        values,
        torch.full((steps, layers), weight, dtype=torch.float64),
        norm_type,
    )


def noise(steps, seed=0, spread=0.3):
    return torch.exp(spread * torch.randn(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def kinds(history):
    return [finding.kind for finding in diagnose(history)]


# ---- trained models


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", HEALTHY)
def test_no_accusation_of_a_healthy_model(name, dtype):
    seed, size = (0, 2) if dtype == FP32 else (1, 1)
    assert [str(f) for f in diagnose(record(HEALTHY[name](seed, size, dtype)))] == []


@pytest.mark.parametrize(("seed", "size"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found_first(name, seed, size):
    fault = FAULTS[name]
    torch.manual_seed(seed)
    first, *_ = diagnose(record(fault.build(seed, size, FP32)))
    assert (first.kind, first.layer) == (fault.kind, fault.layer or first.layer), str(first)
    assert first.kind in str(first) and first.layer in str(first) and first.remedy.endswith(".")


@pytest.mark.parametrize("name", ["sigmoid_stack", "large_init", "dead_relu", "bad_batch", "low_threshold"])
@pytest.mark.parametrize("norm_type", [1.0, INF])
def test_other_norms(name, norm_type):
    fault = FAULTS[name]
    trial = replace(fault.build(0, 1, FP32), norm_type=norm_type)
    first, *_ = diagnose(record(trial))
    assert (first.kind, first.layer) == (fault.kind, fault.layer or first.layer), str(first)
    assert diagnose(record(replace(relu_mlp(0, 1, FP32), norm_type=norm_type, max_norm=None))) == []


def test_saturation_is_named_as_the_cause():
    finding, *_ = diagnose(record(health_models.saturated_sigmoids(0, 1, FP32)))
    assert set(finding.evidence["saturated"]) == {"1", "3", "5", "7"} and "saturated" in finding.remedy


def test_small_weights_are_named_as_the_cause():
    finding, *_ = diagnose(record(health_models.sigmoid_stack(0, 1, FP32)))
    assert "He's" in finding.remedy and finding.evidence["weights_to_he"] < 0.1


# ---- what every finding keeps to


def test_fewer_than_ten_records_say_nothing():
    assert kinds(synthetic(noise(9) * 1e-3, max_norm=1e3)) == []
    assert kinds(synthetic(noise(10) * 1e-3, max_norm=1e3)) == ["never-clipped"]
    assert kinds(synthetic(torch.zeros(0, 2))) == []


def test_one_record_is_enough_for_non_finite():
    norms = torch.ones(1, 3)
    norms[0, 1] = INF
    finding = diagnose(synthetic(norms))[0]
    assert (finding.kind, finding.layer, finding.evidence["first_step"]) == ("non-finite", "layers.1.weight", 0)


@pytest.mark.parametrize("field", ["total_norm", "max_norm", "values", "weight_norms", "steps"])
def test_shapes_are_checked(field):
    history = synthetic(noise(12))
    bad = getattr(history, field)[:-1] if field != "steps" else history.steps[:-1]
    with pytest.raises(ValueError, match=r"history\.\w+: expected shape .* got"):
        diagnose(replace(history, **{field: bad}))


def test_other_arguments_are_refused():
    with pytest.raises(TypeError, match="history: expected"):
        diagnose([1, 2])
    with pytest.raises(ValueError, match="norm_type"):
        diagnose(replace(synthetic(noise(12)), norm_type=NAN))
    activation = Activation("a", "ReLU", torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"activations\[0\].saturated"):
        diagnose(replace(synthetic(noise(12)), activations=[activation]))


# ---- edges of each kind


def test_gradscaler_search_is_normal():
    norms = noise(60)
    norms[:5] = INF
    assert kinds(synthetic(norms)) == []
    assert kinds(synthetic(norms[:5])) == ["non-finite"]  # not recovered yet


def test_gradscaler_growth_is_normal_and_bad_batches_are_not():
    norms = noise(4100)
    norms[2050] = INF
    assert kinds(synthetic(norms)) == []
    norms[2080] = INF
    finding, *_ = diagnose(synthetic(norms))
    assert finding.kind == "non-finite" and finding.evidence["steps"] == [2080] and "stayed finite" in str(finding)


def test_lost_weights_are_no_skipped_step():
    norms = noise(60)
    norms[0] = INF
    history = synthetic(norms)
    history.weight_norms[1:, 1] = NAN
    assert kinds(history)[0] == "non-finite"


def test_non_finite_weight_is_the_source():
    norms = noise(30)
    norms[20:] = NAN
    history = synthetic(norms)
    history.values[20:, :, 4] = 64
    history.weight_norms[20:, 1] = NAN
    assert diagnose(history)[0].layer == "layers.1.weight"


def test_infinite_norm_of_finite_gradients():
    history = synthetic(noise(12))
    history.total_norm[11] = INF
    history.values[11, 2, 0] = 1e200
    finding = diagnose(history)[0]
    assert (finding.kind, finding.layer) == ("non-finite", "layers.2.weight")


@pytest.mark.parametrize(("factor", "found"), [(30.0, True), (5.0, False)])
@pytest.mark.parametrize("steps", [40, 5000])
def test_one_spike(factor, found, steps):
    norms = noise(steps)
    norms[steps // 2] = factor
    findings = [f for f in diagnose(synthetic(norms)) if f.kind == "spike"]
    assert [f.evidence["steps"] for f in findings] == ([[steps // 2]] if found else [])


def test_lasting_growth_is_no_spike():
    norms = noise(200)
    norms[100:] *= 20
    assert kinds(synthetic(norms)) == []


def test_first_steps_fall_without_a_finding():
    assert kinds(synthetic(noise(40) * (1 + 200 * torch.exp(-torch.arange(40.0))))) == []


def test_jumps_of_a_converged_model_are_no_spikes():
    norms = torch.logspace(0, -6, 100, dtype=torch.float64)
    norms[80] *= 50
    assert kinds(synthetic(norms)) == []
    norms[80] = 1.0
    assert kinds(synthetic(norms)) == ["spike"]


def test_ratios_of_a_converged_model_mean_nothing():
    norms = torch.logspace(0, -6, 100, dtype=torch.float64)[:, None].repeat(1, 3)
    norms[60:, 0] *= 1e-5
    norms[60:, 1] = 0
    assert kinds(synthetic(norms)) == []


def test_habitually_wild_norms_are_no_spikes():
    assert "spike" not in kinds(synthetic(noise(500, spread=1.0)))


def test_growth_from_nothing_is_no_explosion():
    norms = torch.logspace(-6, 0, 60, dtype=torch.float64)
    assert "exploding" not in kinds(synthetic(norms))
    assert "exploding" in kinds(synthetic(norms * 1e6))


def test_a_head_with_a_small_loss_weight_is_no_explosion():
    norms = noise(40)[:, None] * torch.tensor([1.0, 1.0, 1e-2 / 3])
    assert kinds(synthetic(norms)) == []
    assert kinds(synthetic(norms * 100)) == ["exploding"]


def test_suggested_threshold_is_in_the_sentence():
    finding = next(f for f in diagnose(synthetic(torch.logspace(0, 6, 40) * 10)) if f.kind == "exploding")
    assert f"{finding.evidence['suggested_max_norm']:g}" in finding.remedy
    low = diagnose(synthetic(noise(40) * 10, max_norm=0.1))[0]
    assert low.kind == "always-clipped" and f"{low.evidence['suggested_max_norm']:g}" in low.remedy
    assert 15 < low.evidence["suggested_max_norm"] < 40


@pytest.mark.parametrize(
    ("max_norm", "expected"),
    [(INF, []), (None, []), (2.0, []), (1.0, []), (0.5, []), (0.1, ["always-clipped"]), (0.0, ["always-clipped"]),
     (10, []), (60.0, ["never-clipped"])],
)  # fmt: skip
def test_thresholds(max_norm, expected):
    assert kinds(synthetic(noise(60), max_norm=max_norm)) == expected


def test_clipped_in_the_first_steps_alone_is_a_use_of_the_threshold():
    norms = noise(200) * 0.02
    norms[:3] = 5.0
    assert kinds(synthetic(norms, max_norm=1.0)) == []


def test_zero_gradient_at_the_start_is_no_death():
    norms = noise(20)[:, None].repeat(1, 3)
    norms[:3, 0] = 0  # LoRA's A, the inside of ReZero, a learning rate that warms up from 0
    assert kinds(synthetic(norms)) == []
    norms[:, 0] = 0
    assert [(f.kind, f.layer) for f in diagnose(synthetic(norms))] == [("dead", "layers.0.weight")]


def test_death_during_training_gives_the_last_step():
    norms = noise(40)[:, None].repeat(1, 3)
    norms[15:, 1] = 0
    finding = diagnose(synthetic(norms))[0]
    assert (finding.kind, finding.layer, finding.evidence["last_step_with_gradient"]) == ("dead", "layers.1.weight", 14)
    assert "learning rate" in finding.remedy


def test_loss_of_zero_is_no_death():
    norms = noise(60)
    norms[20:] = 0
    assert kinds(synthetic(norms)) == []
    assert kinds(synthetic(norms * 0)) == ["dead"]


def test_frozen_and_empty_layers_are_left_alone():
    history = synthetic(noise(40), layers=4)
    history.values[:, 0] = NAN
    history.layers[1] = replace(history.layers[1], shape=(0, 8))
    history.values[:, 1] = 0
    assert kinds(history) == []


@pytest.mark.parametrize("shape", [(64,), ()])
def test_vectors_do_not_vanish(shape):
    norms = noise(40)[:, None] * torch.tensor([1e-9, 1.0, 1.0])
    history = synthetic(norms)
    assert kinds(history) == ["vanishing"]
    history.layers[0] = replace(history.layers[0], name="key.bias", shape=shape)
    assert kinds(history) == []


def test_small_gradient_in_the_middle_is_attention_at_the_start():
    assert kinds(synthetic(noise(40)[:, None] * torch.tensor([1.0, 1e-5, 1.0]))) == []
    finding = diagnose(synthetic(noise(40)[:, None] * torch.tensor([1.0, 1e-9, 1.0])))[0]
    assert (finding.kind, finding.layer) == ("vanishing", "layers.1.weight")


def test_order_is_that_of_the_forward_pass():
    history = synthetic(noise(40)[:, None] * torch.tensor([1.0, 1e-3, 1e-5]))
    assert kinds(history) == []  # the loss is at the end: the gradient grows, but is small
    for depth, layer in enumerate(reversed(history.layers)):
        layer.depth = depth
    assert [(f.kind, f.layer) for f in diagnose(history)] == [("vanishing", "layers.2.weight")]


def test_zeros_before_a_fading_gradient_have_vanished():
    norms = noise(40)[:, None] * torch.tensor([0.0, 0.0, 1e-7, 1e-4, 1.0])
    assert [(f.kind, f.layer) for f in diagnose(synthetic(norms))] == [("vanishing", "layers.0.weight")]


def test_sparse_rows_of_an_embedding_are_not_small():
    history = synthetic(noise(40))
    history.layers[0] = Layer("embedding.weight", (10**6, 64), "float32", "Embedding", 0)
    history.values[:, 0, 2] = 64e6 - 640
    assert kinds(history) == []


def test_underflow_of_half_types():
    history = synthetic(noise(40) * 1e-4, dtype="float16")
    history.values[:, 0, 5] = 40
    finding = diagnose(history)[0]
    assert (finding.kind, finding.layer) == ("vanishing", "layers.0.weight") and "GradScaler" in finding.remedy


def test_nothing_from_the_start():
    findings = diagnose(synthetic(noise(40) * 1e-9))
    assert [f.kind for f in findings] == ["vanishing"] and "layers." in str(findings[0])
    assert kinds(synthetic(torch.cat([torch.logspace(0, -9, 20), torch.full((200,), 1e-9)]))) == []


def test_rare_experts_are_not_dead():
    history = synthetic(noise(60))
    history.values[torch.arange(60) % 6 != 0, 1, 0] = 0
    history.values[torch.arange(60) % 6 != 0, 1, 2] = 64
    assert kinds(history) == []


# ---- generated histories

ODD = [0.0, 1e-300, 1e-30, 1e-8, 1.0, 1e6, 1e38, 1e300, INF, NAN]


@st.composite
def histories(draw):
    steps, layers = draw(st.integers(0, 30)), draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    sizes = [draw(st.sampled_from([(), (0,), (7,), (4, 5), (0, 3), (2, 3, 4)])) for _ in range(layers)]
    names = ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "head.weight", "head.bias"]
    module = draw(st.sampled_from(["Linear", "LSTM", ""]))
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))

    def numbers(*shape):
        plain = torch.exp(3 * torch.randn(*shape, generator=generator, dtype=torch.float64))
        if not draw(st.booleans()):
            return plain
        odd = torch.tensor(ODD, dtype=torch.float64)[torch.randint(len(ODD), shape, generator=generator)]
        return torch.where(
            torch.rand(*shape, generator=generator) < draw(st.sampled_from([0.03, 0.5, 1.0])), odd, plain
        )

    values = numbers(steps, layers, 6)
    numel = torch.tensor([math.prod(s) for s in sizes], dtype=torch.float64)
    values[..., 2:] = (
        torch.rand(steps, layers, 4, generator=generator) * draw(st.sampled_from([0, 1])) * numel[:, None]
    ).round()
    values[torch.rand(steps, layers, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = NAN
    activations = [Activation("act", "Sigmoid", numbers(steps), numbers(steps))] if draw(st.booleans()) else []
    return History(
        [Layer(names[i], sizes[i], dtype, module, draw(st.integers(-1, 3))) for i in range(layers)],
        torch.arange(steps) * 3, numbers(steps), numbers(steps), values, numbers(steps, layers),
        draw(st.sampled_from([1.0, 2.0, INF])), activations,
    )  # fmt: skip


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(histories())
def test_any_history(history):
    before = history.values.clone()
    findings = diagnose(history)
    assert findings == diagnose(history)
    assert [f.severity for f in findings] == sorted((f.severity for f in findings), reverse=True)
    names = {layer.name for layer in history.layers}
    for finding in findings:
        assert finding.kind in KINDS and finding.kind in str(finding)
        assert finding.layer in names | {""} and finding.layer in str(finding) and str(finding).endswith(".")
        assert not names or any(name in str(finding) for name in names)
        assert finding.remedy and json.loads(json.dumps(finding.evidence)) is not None
    assert torch.equal(before.nan_to_num(-1), history.values.nan_to_num(-1))


@pytest.mark.parametrize("name", ["sigmoid_stack", "exploding_rnn", "dead_relu", "bad_batch", "low_threshold", "lstm"])
@pytest.mark.parametrize("power", [-3, 2])
def test_scaled_gradients_and_weights_change_nothing(name, power):
    build = HEALTHY[name] if name in HEALTHY else FAULTS[name].build
    history = record(build(0, 1, FP32))
    factor = 4.0**power  # a power of two: no rounding
    values = history.values.clone()
    values[..., :2] *= factor
    scaled = replace(
        history, values=values, total_norm=history.total_norm * factor, max_norm=history.max_norm * factor,
        weight_norms=history.weight_norms * factor,
    )  # fmt: skip
    assert [(f.kind, f.layer) for f in diagnose(scaled)] == [(f.kind, f.layer) for f in diagnose(history)]


@pytest.mark.parametrize("name", ["exploding_lstm", "large_init", "large_rate", "sigmoid_stack", "summed_loss"])
def test_weight_norms_looked_at_now_and_then(name):
    build = HEALTHY[name] if name in HEALTHY else FAULTS[name].build
    history = record(build(0, 1, FP32))
    weights = history.weight_norms.clone()
    weights[1:] = NAN
    sparse = replace(history, weight_norms=weights)
    assert [(f.kind, f.layer) for f in diagnose(sparse)] == [(f.kind, f.layer) for f in diagnose(history)]


def test_long_histories_of_large_models_take_no_python_loop_over_records():
    norms = noise(3000)[:, None].repeat(1, 300)
    history = synthetic(norms, max_norm=20.0)
    began = time.perf_counter()
    assert diagnose(history) == []
    print(f"3,000 steps x 300 layers: {time.perf_counter() - began:.2f} s")
