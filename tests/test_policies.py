"""ZClip and AutoClip: against the published algorithms, through everything that takes a max_norm."""

import copy
import math
import pickle

import numpy
import pytest
import torch
from cuda_support import assert_one_launch, watch
from ranks import Ranks
from support import EMULATED, INF, NAN, make_parameter, make_parameters

import fastclip
from fastclip import AutoClip, ZClip, _policy_rules
from fastclip._native import _C

# ---- the algorithms, as their papers have them ----


class PublishedZClip:
    def __init__(self, alpha=0.97, z_threshold=2.5, warmup=25, spike_to="reciprocal", max_norm=INF, eps=1e-6):
        self.alpha, self.z_threshold, self.warmup, self.spike_to = alpha, z_threshold, warmup, spike_to
        self.max_norm, self.eps, self.first = max_norm, eps, []

    def threshold(self, norm):
        if len(self.first) < self.warmup:
            self.first.append(norm)
            self.mean = sum(self.first) / len(self.first)
            self.variance = sum((x - self.mean) ** 2 for x in self.first) / len(self.first)
            return self.max_norm
        deviation = self.variance**0.5
        z, threshold = (norm - self.mean) / (deviation + self.eps), INF
        if z > self.z_threshold:
            factor = {"reciprocal": self.z_threshold**2 / z, "max": self.z_threshold, "mean": 0.0}[self.spike_to]
            norm = threshold = self.mean + factor * deviation
        self.mean = self.alpha * self.mean + (1 - self.alpha) * norm
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (norm - self.mean) ** 2
        return min(threshold, self.max_norm)


class PublishedAutoClip:
    def __init__(self, percentile=10.0, window=10_000):
        self.percentile, self.window, self.history = percentile, window, []

    def threshold(self, norm):
        self.history = [*self.history, norm][-self.window :]
        return float(numpy.percentile(self.history, self.percentile))


def norms_of_a_run(steps=1000, seed=0):
    """They fall, vary, have spikes of all heights, are equal for a while, and 0."""
    random = numpy.random.default_rng(seed)
    norms = 5 * numpy.exp(-numpy.arange(steps) / 400) * random.lognormal(0, 0.3, steps)
    spikes = random.random(steps) < 0.03
    norms[spikes] *= 10 ** random.uniform(0.5, 5, spikes.sum())
    norms[steps // 2 : steps // 2 + steps // 20] = 1.25
    norms[random.integers(steps, size=3)] = 0
    return norms.tolist()


POLICIES = {
    "zclip": (ZClip, PublishedZClip, {}),
    "zclip max": (ZClip, PublishedZClip, {"spike_to": "max", "alpha": 0.9}),
    "zclip mean": (ZClip, PublishedZClip, {"spike_to": "mean", "z_threshold": 1.5, "warmup": 5}),
    "zclip limited": (ZClip, PublishedZClip, {"max_norm": 2.0, "warmup": 1}),
    "autoclip": (AutoClip, PublishedAutoClip, {}),
    "autoclip median": (AutoClip, PublishedAutoClip, {"percentile": 50, "window": 100}),
    "autoclip maximum": (AutoClip, PublishedAutoClip, {"percentile": 100, "window": 7}),
    "autoclip minimum": (AutoClip, PublishedAutoClip, {"percentile": 0, "window": 600 if not EMULATED else 20}),
    "autoclip last": (AutoClip, PublishedAutoClip, {"percentile": 37.5, "window": 1}),
}
policies = pytest.mark.parametrize("kind", POLICIES)


def pair(kind):
    ours, published, arguments = POLICIES[kind]
    return ours(**arguments), published(**arguments)


def gradient(norm, device="cpu", dtype=torch.float64):
    return torch.tensor([0.6 * norm, 0, -0.8 * norm], dtype=dtype, device=device)


def close(a, b):
    return a == pytest.approx(b, rel=1e-9, abs=1e-12)


# ---- the call ----


@policies
def test_a_run(device, kind):
    policy, published = pair(kind)
    for norm in norms_of_a_run(60 if device == "cuda" and EMULATED else 1000):
        parameter = make_parameter(gradient(norm, device))
        total_norm = fastclip.clip_grad_norm_([parameter], policy)
        threshold = published.threshold(norm)
        assert close(total_norm.item(), norm) and close(policy.threshold.item(), threshold)
        expected = gradient(norm) * min(1, threshold / (norm + 1e-6))
        torch.testing.assert_close(parameter.grad.cpu(), expected, rtol=1e-9, atol=1e-12)
    assert policy.threshold.device.type == ("cuda" if device == "cuda" else "cpu")
    assert fastclip.counters()["fallback"] == 0


@policies
def test_rules_in_python_equal_the_native_ones(kind):
    native, python = pair(kind)[0], pair(kind)[0]
    for norm in [*norms_of_a_run(200), NAN, INF, *norms_of_a_run(200, seed=1)]:
        native.follow(torch.tensor(norm, dtype=torch.float64))
        _policy_rules.follow(python._state, norm)
        torch.testing.assert_close(python._state, native._state, rtol=1e-12, atol=0)


@policies
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_norms_that_are_not_finite_are_not_learnt(device, kind, bad):
    policy, twin = pair(kind)[0], pair(kind)[0]
    for number, norm in enumerate(norms_of_a_run(40)):
        fastclip.clip_grad_norm_([make_parameter(gradient(norm, device))], policy)
        fastclip.clip_grad_norm_([make_parameter(gradient(norm, device))], twin)
        if number % 10 == 3:
            grads = [torch.tensor([1.0, bad], device=device) for _ in range(2)]
            fastclip.clip_grad_norm_(make_parameters(grads[:1]), policy)
            torch.nn.utils.clip_grad_norm_(make_parameters(grads[1:]), 1.0)
            torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0, equal_nan=True)
            assert policy.threshold.item() == 0
    assert policy.count.item() == 40
    torch.testing.assert_close(policy._state, twin._state, rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["native", "python"])
def test_norms_whose_square_is_not_finite_are_clipped_and_not_learnt(rule):
    """One in the warm-up, where nothing is clipped, one after it; ZClip's variance would stay inf."""

    def follow(norm):
        if rule == "native":
            return float(policy.follow(torch.tensor(norm, dtype=torch.float64)))
        _policy_rules.follow(policy._state, norm)
        return float(policy.threshold)

    policy, published = ZClip(warmup=5, max_norm=1e6), PublishedZClip(warmup=5, max_norm=1e6)
    for number, norm in enumerate(norms_of_a_run(40)):
        assert close(follow(norm), published.threshold(norm))
        if number == 2:
            assert follow(1e160) == 1e6
        if number == 20:
            assert 0 < follow(1e160) < 10
    assert policy.count == 40

    policy = ZClip(warmup=2)
    follow(1.3e154), follow(1e153)
    assert follow(1.5e154) == INF and math.isfinite(policy.state_dict()["variance"])  # no spike beside those


def test_raising_learns_nothing(device):
    policy = ZClip()
    grad = torch.tensor([1.0, NAN], device=device)
    with pytest.raises(RuntimeError, match="non-finite"):
        fastclip.clip_grad_norm_([make_parameter(grad)], policy, error_if_nonfinite=True)
    assert policy.count.item() == 0 and grad[0].item() == 1


@pytest.mark.parametrize("norm_type", [2, 3])
@pytest.mark.parametrize("nonfinite", [None, "propagate"])
def test_after_raising_the_threshold_is_that_of_the_bad_norm(norm_type, nonfinite):
    policy = ZClip(max_norm=5)
    for value, threshold in ((1.0, 5), (NAN, 0)):
        parameter = make_parameter(gradient(value))
        try:
            fastclip.clip_grad_norm_([parameter], policy, norm_type, True, nonfinite=nonfinite)
        except RuntimeError as error:
            assert "is non-finite" in str(error) and "parameters[0].grad has the first" in str(error)
            assert parameter.grad[1] == 0
        assert policy.threshold == threshold and policy.count == 1


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("norm_type", [2, 3])
def test_a_folded_step_without_gradients_teaches_nothing(monkeypatch, built, norm_type):
    if not built:
        monkeypatch.setattr("fastclip.step_clipping._C", None)
    policy, parameter = AutoClip(), torch.nn.Parameter(torch.ones(3))
    fastclip.ClippedOptimizer(torch.optim.Adam([parameter], fused=True), policy, norm_type, fold=True).step()
    assert policy.count == 0


def test_zero_variance():
    policy, published = ZClip(warmup=3), PublishedZClip(warmup=3)
    for norm in [2.0, 2.0, 2.0, 2.0, 2.0 + 1e-7, 3.0, 2.0, 0.0, 2.0]:
        policy.follow(torch.tensor(norm, dtype=torch.float64))
        assert close(policy.threshold.item(), published.threshold(norm))


@pytest.mark.parametrize("items", ["several dtypes", "gaps", "one memory", "many", "large"])
def test_kinds_of_lists(device, items):
    torch.manual_seed(0)
    count, size = (3000, 8) if items == "many" else (6, 40_011) if items == "large" else (6, 33)
    grads = [torch.randn(2, size, device=device) for _ in range(count)]
    if items == "several dtypes":
        grads[1], grads[2] = grads[1].double(), grads[2].bfloat16()
    if items == "gaps":
        grads = [grad[:, ::2] for grad in grads]
    if items == "one memory":
        grads += [grads[0][:1], grads[1]]
    policy, published = AutoClip(50), PublishedAutoClip(50)
    for _ in range(3):
        before = [grad.clone() for grad in grads]
        norm = math.sqrt(sum(grad.double().square().sum().item() for grad in before))
        fastclip.clip_grad_norm_(make_parameters(grads), policy)
        threshold = published.threshold(norm)
        assert policy.threshold.item() == pytest.approx(threshold, rel=1e-6)
        if items != "one memory":
            for grad, was in zip(grads, before, strict=True):
                torch.testing.assert_close(grad.double(), was.double() * min(1, threshold / norm), rtol=1e-2, atol=0)


@pytest.mark.parametrize("reason", ["complex", "norm_type"])
def test_where_torch_clips(reason):
    policy, published = AutoClip(50), PublishedAutoClip(50)
    norm_type = 3.0 if reason == "norm_type" else 2.0
    for scale in (1.0, 5.0, 2.0, 0.5):
        grad = scale * torch.tensor([3.0, 0.0, -4.0], dtype=torch.complex64 if reason == "complex" else torch.float32)
        norm = torch.linalg.vector_norm(grad, norm_type).item()
        parameter = make_parameter(grad.clone())
        statistics = fastclip.GradStatistics() if scale > 1 and reason == "norm_type" else None
        total_norm = fastclip.clip_grad_norm_([parameter], policy, norm_type, statistics=statistics)
        assert total_norm.item() == pytest.approx(norm)
        threshold = published.threshold(norm)
        assert policy.threshold.item() == pytest.approx(threshold, rel=1e-6)
        torch.testing.assert_close(parameter.grad, grad * min(1, threshold / (norm + 1e-6)))
    assert fastclip.counters()["fallback_reasons"] == {reason: 4}
    assert fastclip.clip_grad_norm_([], policy, norm_type).item() == 0 and policy.count.item() == 4


def test_given_norm(device):
    policy, published = AutoClip(50), PublishedAutoClip(50)
    for norm in (4.0, 1.0, 9.0):
        parameter = make_parameter(gradient(norm, device))
        fastclip.clip_grads_with_norm_([parameter], policy, torch.tensor(norm, device=device))
        torch.testing.assert_close(
            parameter.grad.cpu(), gradient(norm) * min(1, published.threshold(norm) / (norm + 1e-6)), rtol=1e-6, atol=0
        )


# ---- state ----


@policies
def test_state_dict_goes_on(kind, tmp_path):
    norms = norms_of_a_run(300)
    whole, first, second = pair(kind)[0], pair(kind)[0], pair(kind)[0]
    for norm in norms[:150]:
        for policy in (whole, first):
            policy.follow(torch.tensor(norm))
    torch.save(first.state_dict(), tmp_path / "policy.pt")
    second.load_state_dict(torch.load(tmp_path / "policy.pt"))  # with weights_only
    third, fourth = pickle.loads(pickle.dumps(first)), copy.deepcopy(first)
    assert second.threshold == whole.threshold
    for norm in norms[150:]:
        thresholds = {float(p.follow(torch.tensor(norm))) for p in (whole, second, third, fourth)}
        assert len(thresholds) == 1
    assert first.count.item() == 150


def test_state_dict_of_another_window():
    policy, shorter = AutoClip(0, window=100), AutoClip(0, window=3)
    for norm in (1.0, 5.0, 4.0, 3.0):
        policy.follow(torch.tensor(norm))
    shorter.load_state_dict(policy.state_dict())
    assert shorter.follow(torch.tensor(9.0)).item() == 3.0
    assert shorter.state_dict()["norms"].tolist() == [4.0, 3.0, 9.0]


@pytest.mark.parametrize("window", [10, 4, 20])
def test_a_full_window_goes_on(window):
    norms = norms_of_a_run(60)
    first, second = AutoClip(30, window=10), AutoClip(30, window=window)
    for norm in norms[:25]:
        first.follow(torch.tensor(norm, dtype=torch.float64))
    second.load_state_dict(first.state_dict())
    assert second.count == (10 if window == 20 else 25)
    assert second.state_dict()["norms"].tolist() == first.state_dict()["norms"][-window:].tolist()
    published = PublishedAutoClip(30, window)
    published.history = norms[15:25][-window:]
    for norm in norms[25:]:
        assert close(float(second.follow(torch.tensor(norm, dtype=torch.float64))), published.threshold(norm))


def test_what_a_policy_was_told_stays():
    policy = ZClip(max_norm=2.0)
    with pytest.raises(AttributeError, match="max_norm: a policy stays as it was made; make another ZClip"):
        policy.max_norm = 5
    with pytest.raises(AttributeError, match="window: a policy stays as it was made; make another AutoClip"):
        AutoClip().window = 5
    assert policy.max_norm == 2.0


def test_made_where_another_device_is_the_default():
    with torch.device("meta"):
        policy = AutoClip(window=3)
        policy.load_state_dict(AutoClip(window=3).state_dict())
    assert policy.follow(torch.tensor(2.0)).item() == 2.0


def test_state_dict_of_another_kind():
    with pytest.raises(ValueError, match=r"state_dict\['policy'\]: expected 'ZClip', got 'AutoClip'"):
        ZClip().load_state_dict(AutoClip().state_dict())


def test_arguments():
    for make, error, message in [
        (lambda: ZClip(alpha=1.5), ValueError, "alpha: expected a number from 0 to 1, got 1.5"),
        (lambda: ZClip(alpha="x"), TypeError, "alpha: expected a number, got 'x'"),
        (lambda: ZClip(z_threshold=0), ValueError, "z_threshold: expected a number from"),
        (lambda: ZClip(warmup=0), ValueError, "warmup: expected 1 or more, got 0"),
        (lambda: ZClip(warmup=2.5), TypeError, "warmup: expected an integer, got 2.5"),
        (lambda: ZClip(spike_to="min"), ValueError, 'spike_to: expected "reciprocal", "max" or "mean", got \'min\''),
        (lambda: ZClip(max_norm=NAN), ValueError, "max_norm: expected a number from 0 to inf, got nan"),
        (lambda: AutoClip(101), ValueError, "percentile: expected a number from 0 to 100, got 101"),
        (lambda: AutoClip(window=0), ValueError, "window: expected 1 or more, got 0"),
        (lambda: fastclip.clip_grad_norm_([], ZClip), TypeError, "max_norm: expected a number, got <class"),
        (lambda: AutoClip().follow(3.0), TypeError, "total_norm: expected a 0-d floating-point tensor, got 3.0"),
    ]:
        with pytest.raises(error) as caught:
            make()
        assert str(caught.value).startswith(message)
    assert eval(repr(AutoClip(20, 5))).window == 5 and eval(repr(ZClip()), {"inf": INF, "ZClip": ZClip}).alpha == 0.97


# ---- optimizers ----


@policies
@pytest.mark.parametrize("fold", [True, False])
def test_clipped_optimizer(device, kind, fold):
    policy, published = pair(kind)
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    reference = torch.nn.Parameter(torch.ones(3))
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD([parameter], 0.1, fused=True), policy, fold=fold)
    plain = torch.optim.SGD([reference], 0.1)
    for norm in norms_of_a_run(40):
        parameter.grad = gradient(norm, device, torch.float32)
        threshold = published.threshold(norm)
        coef = min(1, threshold / (norm + 1e-6))
        reference.grad = gradient(norm, dtype=torch.float32) * coef
        optimizer.step()
        plain.step()
        assert optimizer.last_clip_coef.item() == pytest.approx(coef, rel=1e-5)
        torch.testing.assert_close(parameter.detach().cpu(), reference.detach(), rtol=1e-4, atol=1e-5)
    assert isinstance(copy.deepcopy(optimizer).max_norm, type(policy))


@pytest.mark.parametrize("scaler_type", [torch.amp.GradScaler, fastclip.GradScaler])
@pytest.mark.parametrize("fold", ["auto", False])
def test_under_a_scaler_true_norms_are_learnt(device, scaler_type, fold):
    policy, published = AutoClip(50), PublishedAutoClip(50)
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD([parameter], 0.1, fused=True), policy, fold=fold)
    scaler = scaler_type(device.split(":")[0], init_scale=1024.0)
    for step, norm in enumerate([4.0, 1.0, INF, 3.0, 9.0]):
        scaler.scale(torch.ones((), device=device))
        parameter.grad = gradient(norm, device, torch.float32).nan_to_num(INF, INF, -INF) * scaler.get_scale()
        before = parameter.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert torch.equal(parameter, before) and scaler.get_scale() == 512 and policy.count.item() == 2
        else:
            assert policy.threshold.item() == pytest.approx(published.threshold(norm), rel=1e-6)


def test_groups_have_policies_of_their_own():
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": parameters[:1], "max_norm": ZClip(warmup=1)}, {"params": parameters[1:]}]
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(groups, 0.1), AutoClip(0))
    for norm in (1.0, 2.0, 3.0):
        for p in parameters:
            p.grad = gradient(norm, dtype=torch.float32)
        optimizer.step()
    assert optimizer.max_norm.threshold.item() == pytest.approx(1) and optimizer.param_groups[0]["max_norm"].count == 3


def test_monitor_records_the_threshold():
    model = torch.nn.Linear(3, 1, bias=False)
    policy = AutoClip(50)
    with fastclip.GradientMonitor(model) as monitor:
        for norm in (1.0, 3.0, 4.0):
            model.weight.grad = gradient(norm, dtype=torch.float32)[None]
            monitor.clip_grad_norm_(policy)
        assert monitor.history().max_norm.tolist() == pytest.approx([1.0, 2.0, 3.0])


def test_in_compiled_code():
    parameter = torch.nn.Parameter(torch.ones(3))
    policy, published = AutoClip(50), PublishedAutoClip(50)

    @torch.compile(backend="eager")
    def clip(grad):
        parameter.grad = grad * 1
        return fastclip.clip_grad_norm_([parameter], policy) + 1

    for norm in (4.0, 1.0, 9.0):
        assert clip(gradient(norm, dtype=torch.float32)).item() == pytest.approx(norm + 1)
        assert policy.threshold.item() == pytest.approx(published.threshold(norm), rel=1e-6)


# ---- several ranks ----


def check_ranks_agree():
    group = torch.distributed.group.WORLD
    rank, size = group.rank(), group.size()
    for kind in ("zclip mean", "autoclip"):
        policy, published = pair(kind)
        for norm in norms_of_a_run(30):
            # All of it on one rank, in turn; the other one has no parameters at all.
            parts = [[], [make_parameter(gradient(norm))]]
            mine = parts[(int(norm * 1e6) + rank) % size]
            fastclip.clip_grad_norm_(mine, policy, process_group=group)
            threshold = published.threshold(norm)
            assert close(policy.threshold.item(), threshold)
            for parameter in mine:
                expected = gradient(norm) * min(1, threshold / (norm + 1e-6))
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)


def test_ranks_agree():
    with Ranks(2) as two:
        two.run(check_ranks_agree)


# ---- CUDA ----


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["zclip", "autoclip"])
def test_one_launch_and_nobody_waits(cuda_device, kind):
    policy = pair(kind)[0]
    parameters = make_parameters([torch.randn(1000, device="cuda") for _ in range(5)])
    fastclip.clip_grad_norm_(parameters, policy)  # moves the state
    torch.cuda.synchronize()
    with watch() as seen:
        fastclip.clip_grad_norm_(parameters, policy)
    assert_one_launch(seen)


@pytest.mark.cuda
def test_without_cooperative_launches(cuda_device):
    _C.allow_cooperative_launches(False)
    policy, published = AutoClip(50, window=700), PublishedAutoClip(50, 700)
    for norm in norms_of_a_run(5):
        parameter = make_parameter(gradient(norm, "cuda"))
        fastclip.clip_grad_norm_([parameter], policy)
        threshold = published.threshold(norm)
        torch.testing.assert_close(parameter.grad.cpu(), gradient(norm) * min(1, threshold / (norm + 1e-6)))


@pytest.mark.cuda
def test_a_window_longer_than_a_block(cuda_device):
    policy, published = AutoClip(30, window=1100), PublishedAutoClip(30, 1100)
    norms = norms_of_a_run(1100)
    learnt = AutoClip(30, window=1100)
    for norm in norms:
        learnt.follow(torch.tensor(norm, dtype=torch.float64))
        published.threshold(norm)
    policy.load_state_dict(learnt.state_dict())
    for norm in [0.0, 1e9, 1.25, 1.25, 0.7]:
        policy.follow(torch.tensor(norm, dtype=torch.float64, device="cuda"))
        assert close(policy.threshold.item(), published.threshold(norm))


@pytest.mark.cuda
def test_captured_in_a_graph(cuda_device):
    policy, published = AutoClip(50), PublishedAutoClip(50)
    grad = gradient(4.0, "cuda")
    parameters = [make_parameter(grad)]
    fastclip.clip_grad_norm_(parameters, policy)
    published.threshold(4.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastclip.clip_grad_norm_(parameters, policy)
    for norm in (1.0, 9.0, 2.0):
        grad.copy_(gradient(norm))
        graph.replay()
        assert close(policy.threshold.item(), published.threshold(norm))


@pytest.mark.cuda
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_gradients_on_two_devices(cuda_device, first):
    policy, published = AutoClip(50), PublishedAutoClip(50)
    for norm in (4.0, 1.0, 9.0):
        grads = [gradient(norm, device) for device in (first, "cuda" if first == "cpu" else "cpu")]
        fastclip.clip_grad_norm_(make_parameters(grads), policy)
        threshold, both = published.threshold(norm * 2**0.5), norm * 2**0.5
        for grad in grads:
            torch.testing.assert_close(grad.cpu(), gradient(norm) * min(1, threshold / (both + 1e-6)))
    assert policy.threshold.device.type == first
