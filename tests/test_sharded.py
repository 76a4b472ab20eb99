"""Gradients over several ranks, compared with the whole gradients in float64: DTensors and process groups."""

import contextlib
import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, all_reduces, gloo_averages, needs_fully_shard
from support import INF, NAN, NORM_TYPES, make_parameter, make_parameters, outcome, run_python

import fastclip
from fastclip import distributed

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="a torch without torch.distributed")


@pytest.fixture(scope="module")
def four():
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(params=[2, 4])
def ranks(request):
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])


# What follows runs on the ranks.


@functools.cache
def make_mesh(shape=None, names=("a", "b", "c")):
    from torch.distributed.tensor import init_device_mesh

    shape = shape or (dist.get_world_size(),)
    return init_device_mesh("cpu", shape, mesh_dim_names=names[: len(shape)])


def dtensor(local, placements, mesh=None, whole=None):
    """A DTensor from a rank's part; from a `whole`, if that cannot be told from the part."""
    from torch.distributed.tensor import DTensor

    layout = {} if whole is None else {"shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(local, mesh or make_mesh(), placements, run_check=False, **layout)


def shard(whole, *placements, mesh=None):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, mesh or make_mesh(), placements)


def rank_and_size():
    return dist.get_rank(), dist.get_world_size()


def placements():
    from torch.distributed.tensor import Partial, Replicate, Shard

    return Shard, Replicate, Partial


def reference(wholes, max_norm, norm_type):
    """torch's norm and clipped gradients, in float64."""
    parameters = make_parameters([whole.to(torch.float64, copy=True) for whole in wholes])
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
    return norm.item(), [parameter.grad for parameter in parameters]


def check_clip(grads, wholes, norm_type=2, max_norm=0.5, collectives=None, rtol=2e-6, module=fastclip, **groups):
    """clip_grad_norm_ on this rank's gradients has the norm and leaves the gradients of the whole ones."""
    norm, clipped = reference(wholes, max_norm, norm_type)
    fastclip.reset_counters()
    with all_reduces() as reductions:
        total_norm = module.clip_grad_norm_(make_parameters(grads), max_norm, norm_type, **groups)
    assert fastclip.counters()["native"] == fastclip.counters()["calls"] == 1, fastclip.counters()
    assert collectives is None or len(reductions) == collectives, reductions
    assert total_norm.item() == pytest.approx(norm, rel=rtol)
    for grad, whole in zip(grads, clipped, strict=True):
        full = grad.full_tensor() if distributed.is_dtensor(grad) else grad
        torch.testing.assert_close(full.double(), whole.reshape(full.shape), rtol=rtol, atol=0)
    return total_norm


def check_layouts(norm_type, dtype, max_norm):
    Shard, Replicate, Partial = placements()
    rank, size = rank_and_size()
    whole = [torch.randn(shape, dtype=dtype) for shape in [(5, 3), (1, 4), (3, 8), (7,), (6, 2), (2, 3), (300, 400)]]
    # Sums that are exact in any order.
    parts = torch.randint(-9, 9, (size, 6, 2)).to(dtype) / 4
    means = torch.randint(-9, 9, (size, 2, 3)).to(dtype) / 4
    whole[4], whole[5] = parts.sum(0), means.mean(0)
    columns = whole[2].clone().chunk(size, 1)[rank]  # a view with gaps
    assert not columns.is_contiguous()
    grads = [
        shard(whole[0], Shard(0)),  # uneven
        shard(whole[1], Shard(0)),  # nothing on all ranks but the first
        dtensor(columns, [Shard(1)], whole=whole[2]),
        shard(whole[3], Replicate()),
        dtensor(parts[rank].clone(), [Partial()]),
        dtensor(means[rank].clone(), [Partial("avg")]),
        shard(whole[6], Shard(1)),
    ]
    if not gloo_averages():
        del whole[5], grads[5]
    wrapped = [(grad, grad._local_tensor, grad._version) for grad in grads]
    total_norm = check_clip(grads, whole, norm_type, max_norm, collectives=1)
    assert distributed.is_dtensor(total_norm) and total_norm.placements == (Replicate(),)
    assert total_norm.dtype == dtype and total_norm.full_tensor().item() == total_norm.item()
    for grad, local, version in wrapped:
        assert grad._local_tensor is local
        assert (grad._version > version) == (max_norm < 1e3 and local.numel() > 0)


@pytest.mark.parametrize(("dtype", "max_norm"), [(torch.float32, 0.5), (torch.float64, 0.5), (torch.float32, 1e9)])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_layouts(ranks, norm_type, dtype, max_norm):
    ranks.run(check_layouts, norm_type, dtype, max_norm)


def check_half():
    Shard, _, _ = placements()
    _rank, size = rank_and_size()
    whole = torch.full((4 * size,), 6e4, dtype=torch.float16)
    grad = shard(whole, Shard(0))
    total_norm = fastclip.get_total_norm([grad])
    assert total_norm.dtype == torch.float32
    assert total_norm.item() == pytest.approx(whole.double().norm().item(), rel=1e-6)


def test_half_types_have_a_float32_norm(two):
    two.run(check_half)


def check_two_dimensions(norm_type):
    Shard, Replicate, Partial = placements()
    mesh = make_mesh((2, 2))
    a, b, c, d = (torch.randn(5, 6) for _ in range(4))
    both = lambda whole: shard(whole, Shard(0), Shard(1), mesh=mesh)  # noqa: E731
    # Both dimensions: one all-reduce over the group of all four.
    assert check_clip([both(a)], [a], norm_type, collectives=1).placements == (Replicate(), Replicate())
    # Replicas are counted once, and not exchanged.
    check_clip([shard(b, Replicate(), Shard(0), mesh=mesh)], [b], norm_type, collectives=1)
    check_clip([shard(b, Replicate(), Replicate(), mesh=mesh)], [b], norm_type, collectives=0)
    # One for each of both groups is enough for all three kinds.
    grads = [both(a), shard(b, Shard(1), Replicate(), mesh=mesh), shard(c, Replicate(), Shard(0), mesh=mesh)]
    check_clip(grads, [a, b, c], norm_type, collectives=2)
    # All four, and the first dimension.
    check_clip([both(a), shard(b, Shard(1), Replicate(), mesh=mesh)], [a, b], norm_type, collectives=2)
    parts = torch.randint(-9, 9, (2, 5, 6)) / 4
    local = parts[mesh.get_local_rank(0)].chunk(2, 1)[mesh.get_local_rank(1)].contiguous()
    check_clip([dtensor(local, [Partial(), Shard(1)], mesh), both(d)], [parts.sum(0), d], norm_type, collectives=2)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_two_dimensional_mesh(four, norm_type):
    four.run(check_two_dimensions, norm_type)


def check_flattened():
    Shard, _, _ = placements()
    mesh = make_mesh((2, 2), ("u", "v"))
    ranks_of = dist.get_process_group_ranks
    without_world = lambda group: [] if group is dist.group.WORLD else ranks_of(group)  # noqa: E731
    whole = torch.randn(5, 6)
    with mock.patch.object(dist, "get_process_group_ranks", without_world):
        check_clip([shard(whole, Shard(0), Shard(1), mesh=mesh)], [whole], collectives=2)
        group = dist.new_group(list(range(4)))
        flat = mock.Mock(get_group=lambda: group)
        with mock.patch.dict(mesh._get_root_mesh()._flatten_mapping, {"uv": flat}):
            assert distributed._flattened_group(mesh, [0, 1]) is group
            check_clip([shard(whole, Shard(0), Shard(1), mesh=mesh)], [whole], collectives=1)


def test_flattened_group_is_used_where_there_is_one(four):
    if not hasattr(pytest.importorskip("torch.distributed.device_mesh").DeviceMesh, "_get_root_mesh"):
        pytest.skip("this torch's meshes do not know their root")
    four.run(check_flattened)


def check_mixed(norm_type):
    Shard, _Replicate, _ = placements()
    _rank, size = rank_and_size()
    a, b, c, plain = torch.randn(5, 3), torch.randn(9), torch.randn(4, 4), torch.randn(7)
    grads = [shard(a, Shard(0)), plain.clone(), shard(b, Shard(0), mesh=make_mesh((size,), ("other",)))]
    wholes = [a, plain, b]
    if size == 4:
        grads.append(shard(c, Shard(0), Shard(1), mesh=make_mesh((2, 2))))
        wholes.append(c)
    total_norm = check_clip(grads, wholes, norm_type, collectives=1)
    assert type(total_norm) is torch.Tensor


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_mixed_meshes_and_plain_tensors(ranks, norm_type):
    ranks.run(check_mixed, norm_type)


def check_missing(norm_type, with_plain):
    Shard, _, _ = placements()
    rank, size = rank_and_size()
    parameter = torch.nn.Parameter(shard(torch.zeros(2 * size, 3), Shard(0)))
    plain = make_parameter(torch.full((2,), 3.0))
    whole = torch.zeros(2 * size, 3)
    whole[2:] = torch.randn(2 * size - 2, 3)
    if rank > 0:  # the first rank has no gradient
        parameter.grad = shard(whole, Shard(0))
        parameter.grad._local_tensor.copy_(whole[2 * rank : 2 * rank + 2])
    else:
        shard(whole, Shard(0))
    norm, clipped = reference([whole, plain.grad] if with_plain else [whole], 0.5, norm_type)
    total_norm = fastclip.clip_grad_norm_([plain, parameter] if with_plain else [parameter], 0.5, norm_type)
    assert total_norm.item() == pytest.approx(norm, rel=1e-6)
    assert distributed.is_dtensor(total_norm) != with_plain
    assert fastclip.counters()["native"] == 1
    if rank > 0:
        expected = clipped[0][2 * rank : 2 * rank + 2].float()
        torch.testing.assert_close(parameter.grad._local_tensor, expected, rtol=2e-6, atol=0)
    if with_plain:
        torch.testing.assert_close(plain.grad, clipped[1].float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("with_plain", [False, True])
def test_rank_without_a_gradient(ranks, norm_type, with_plain):
    ranks.run(check_missing, norm_type, with_plain)


def check_nonfinite(norm_type, value):
    Shard, _, _ = placements()
    rank, size = rank_and_size()
    local = torch.full((3,), value if rank == size - 1 else 2.0)
    grad, plain = dtensor(local.clone(), [Shard(0)]), torch.ones(2)
    items = make_parameters([grad, plain])
    mine, message = outcome(fastclip.clip_grad_norm_, items, 0.1, norm_type, True)
    assert mine is RuntimeError and f"order {float(norm_type)}" in message and "non-finite" in message
    assert message.endswith("parameters[0].grad has the first inf or NaN on this rank") == (rank == size - 1)
    message = message.replace("parameters[0].grad", "tensors[0]")
    assert outcome(fastclip.get_total_norm, [grad, plain], norm_type, True) == (mine, message)
    assert torch.equal(plain, torch.ones(2)) and plain._version == grad._version == 0
    assert grad._local_tensor._version == 0
    norm = fastclip.clip_grad_norm_(items, 0.1, norm_type).item()
    assert norm != norm if value != value else norm == INF
    torch.testing.assert_close(plain, torch.full((2,), NAN if value != value else 0.0), equal_nan=True)
    torch.testing.assert_close(grad._local_tensor, local * (NAN if value != value else 0.0), equal_nan=True)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("value", [NAN, INF])
def test_nonfinite_on_one_rank(ranks, norm_type, value):
    ranks.run(check_nonfinite, norm_type, value)


def check_range(dtype, values):
    Shard, _, _ = placements()
    rank, _ = rank_and_size()
    local = torch.tensor([values[rank % 2]], dtype=dtype)
    norm = fastclip.get_total_norm([dtensor(local, [Shard(0)])]).item()
    largest = max(values)
    copies = dist.get_world_size() / 2
    expected = largest * (copies * sum((value / largest) ** 2 for value in values)) ** 0.5
    assert norm == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.float64, (3e307, 4e307)),
        (torch.float64, (3e200, 4e-200)),
        (torch.float64, (3e-300, 4e-300)),
        (torch.float64, (3e-136, 4e-136)),
        (torch.float64, (3e154, 4e153)),
        (torch.float32, (1e38, 1e38)),
        (torch.float32, (1e-38, 1e-38)),
    ],
)
def test_range(ranks, dtype, values):
    ranks.run(check_range, dtype, values)


def check_value():
    Shard, Replicate, Partial = placements()
    rank, _size = rank_and_size()
    local = torch.linspace(-3, 3, 8).reshape(2, 4) * (rank + 1)
    for placement in Shard(0), Shard(1), Replicate(), Partial("max"), Partial("min"):
        grads = [dtensor(local.clone(), [placement]), local.clone()]
        fastclip.clip_grad_value_(make_parameters(grads), 2.0)
        assert torch.equal(grads[0]._local_tensor, local.clamp(-2, 2)) and torch.equal(grads[1], local.clamp(-2, 2))
        assert grads[0]._version == 1
    assert fastclip.counters()["native"] == fastclip.counters()["calls"] == 5
    outcomes = []
    for module in fastclip, torch.nn.utils:
        grad = dtensor(local.clone(), [Partial()])
        outcomes.append((outcome(module.clip_grad_value_, [make_parameter(grad)], 2.0), grad.full_tensor().tolist()))
    assert outcomes[0] == outcomes[1]
    assert fastclip.counters()["fallback_reasons"] == {"Partial(sum)": 1}


def test_clip_value(two):
    two.run(check_value)


def check_left_to_torch():
    Shard, _, Partial = placements()
    rank, _size = rank_and_size()
    local = torch.randn(3, 4) * (rank + 1)
    for placement, norm_type, reason in (Shard(0), 3.0, "norm_type"), (Partial("max"), 2.0, "Partial(max)"):
        fastclip.reset_counters()
        outcomes = []
        for module in fastclip, torch.nn.utils:
            grad = dtensor(local.clone(), [placement])
            kind, result = outcome(module.clip_grad_norm_, [make_parameter(grad)], 0.5, norm_type)
            outcomes.append((kind, str(result), grad.to_local().tolist()))
        assert outcomes[0] == outcomes[1]
        assert fastclip.counters()["fallback_reasons"] == {reason: 1} and fastclip.counters()["native"] == 0


def test_what_is_left_to_torch(two):
    two.run(check_left_to_torch)


def check_given_norm():
    Shard, _, _ = placements()
    _rank, _size = rank_and_size()
    whole = torch.randn(9, 3) * 5
    total_norm = fastclip.get_total_norm([shard(whole, Shard(0))])
    assert distributed.is_dtensor(total_norm)
    norm, (clipped,) = reference([whole], 0.5, 2)
    assert total_norm.item() == pytest.approx(norm, rel=1e-6)
    for given in total_norm, total_norm.full_tensor():
        for max_norm in 0.5, torch.tensor(0.5), dtensor(torch.tensor(0.5), [placements()[1]()]):
            grad, plain = shard(whole, Shard(0)), whole.clone()
            fastclip.reset_counters()
            fastclip.clip_grads_with_norm_([make_parameter(grad)], max_norm, given)
            fastclip.clip_grads_with_norm_([make_parameter(plain)], max_norm, given)
            assert fastclip.counters()["native"] == fastclip.counters()["calls"] == 2
            torch.testing.assert_close(grad.full_tensor().double(), clipped, rtol=2e-6, atol=0)
            torch.testing.assert_close(plain.double(), clipped, rtol=2e-6, atol=0)


def test_norm_given_as_dtensor(ranks):
    ranks.run(check_given_norm)


def check_async():
    _Shard, Replicate, Partial = placements()
    rank, size = rank_and_size()
    parts = torch.randint(-9, 9, (size, 5)) / 4
    grad = dtensor(parts[rank].clone(), [Partial()]).redistribute(placements=[Replicate()], async_op=True)
    assert type(grad._local_tensor) is not torch.Tensor
    check_clip([grad], [parts.sum(0)], collectives=0)


def test_local_tensor_that_is_still_on_its_way(two):
    two.run(check_async)


def check_patched():
    Shard, _, _ = placements()
    whole = torch.randn(9, 3) * 5
    with fastclip.patched():
        check_clip([shard(whole, Shard(0))], [whole], module=torch.nn.utils, collectives=1)


def test_under_patch(two):
    two.run(check_patched)


# Process groups.


def check_pipeline(norm_type, native):
    """Every rank is a stage; the last has nothing."""
    rank, size = rank_and_size()
    stages = [torch.randn(stage + 2) for stage in range(size - 1)] + [torch.zeros(0)]
    norm, clipped = reference(stages, 0.5, norm_type) if norm_type != INF else reference(stages[:-1], 0.5, INF)
    with mock.patch.object(distributed, "_C", distributed._C if native else None), all_reduces() as reductions:
        parameters = make_parameters([stages[rank].clone()] if rank < size - 1 else [])
        grads = [parameter.grad for parameter in parameters]
        total = fastclip.get_total_norm(grads, norm_type, process_group=dist.group.WORLD)
        total_norm = fastclip.clip_grad_norm_(parameters, 0.5, norm_type, process_group=dist.group.WORLD)
    assert reductions == [dist.group.WORLD] * 2 and type(total_norm) is torch.Tensor
    assert total.item() == total_norm.item() == pytest.approx(norm, rel=1e-6)
    if grads:
        torch.testing.assert_close(grads[0].double(), clipped[rank], rtol=2e-6, atol=0)
    counters = fastclip.counters()
    assert counters["native" if native else "fallback"] == counters["calls"] == 2


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("native", [True, False])
def test_pipeline_stages(ranks, norm_type, native):
    ranks.run(check_pipeline, norm_type, native)


def check_experts(norm_type):
    """Dense parameters are on all ranks, experts on one each; the last rank has none."""
    rank, size = rank_and_size()
    dense = torch.randn(5)
    experts = [torch.randn(3) for _ in range(size - 1)]
    norm, clipped = reference([dense, *experts], 0.5, norm_type)
    mine = make_parameters([experts[rank].clone()] if rank < size - 1 else [])
    parameters = [make_parameter(dense.clone()), *mine]
    with all_reduces() as reductions:
        total_norm = fastclip.clip_grad_norm_(parameters, 0.5, norm_type, process_groups={dist.group.WORLD: mine})
    assert total_norm.item() == pytest.approx(norm, rel=1e-6) and len(reductions) == 1
    torch.testing.assert_close(parameters[0].grad.double(), clipped[0], rtol=2e-6, atol=0)
    if mine:
        torch.testing.assert_close(mine[0].grad.double(), clipped[1 + rank], rtol=2e-6, atol=0)
    assert fastclip.counters()["native"] == 1


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_experts(ranks, norm_type):
    ranks.run(check_experts, norm_type)


def check_all_at_once(norm_type):
    """Two stages of two ranks: FSDP, experts and column shards of one inside a stage; only one stage has the latter."""
    Shard, _, _ = placements()
    _rank, _ = rank_and_size()
    mesh = make_mesh((2, 2), ("pp", "dp"))
    stage, place = mesh.get_coordinate()
    sharded, experts, dense, columns = (torch.randn(2, *shape) for shape in [(5, 3), (2, 4), (6,), (2, 3)])
    grads = [shard(sharded[stage], Shard(0), mesh=mesh["dp"]), experts[stage, place].clone(), dense[stage].clone()]
    wholes = [*sharded, *experts.flatten(0, 1), *dense]
    if stage == 0:
        grads.append(columns[0, place].clone())
        wholes.append(columns[0])
    norm, _ = reference([*sharded, *experts.flatten(0, 1), *dense, columns[0]], 0.5, norm_type)
    parameters = make_parameters(grads)
    dp, pp = mesh.get_group("dp"), mesh.get_group("pp")
    with all_reduces() as reductions:
        total_norm = fastclip.clip_grad_norm_(
            iter(parameters), 0.5, norm_type, process_group=pp, process_groups={dp: [parameters[1], *parameters[3:]]}
        )
    assert reductions == [dp, pp]
    assert total_norm.item() == pytest.approx(norm, rel=1e-6) and type(total_norm) is torch.Tensor
    coef = min(1, 0.5 / (norm + 1e-6))
    torch.testing.assert_close(parameters[1].grad.double(), experts[stage, place].double() * coef, rtol=2e-6, atol=0)
    torch.testing.assert_close(grads[0].full_tensor().double(), sharded[stage].double() * coef, rtol=2e-6, atol=0)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_stages_experts_and_shards_at_once(four, norm_type):
    four.run(check_all_at_once, norm_type)


def check_nested_groups(norm_type):
    """The mesh's own group named again, as another object or inside a larger one, counts once."""
    Shard, _, _ = placements()
    rank, size = rank_and_size()
    world = dist.new_group(list(range(size)))
    a, b, c = torch.randn(8), torch.randn(5, 3), torch.randn(4, 4)
    for group in world, dist.group.WORLD:
        check_clip([shard(a, Shard(0))], [a], norm_type, collectives=1, process_group=group)
    if size == 4:
        mesh = make_mesh((2, 2), ("p", "q"))
        halves = [torch.randn(2, 3) for _ in range(2)]
        local = dtensor(halves[mesh.get_local_rank(0)].chunk(2)[mesh.get_local_rank(1)], [Shard(0)], mesh["q"])
        total_norm = fastclip.get_total_norm([local], norm_type, process_group=world)
        assert total_norm.item() == pytest.approx(reference(halves, 0.5, norm_type)[0], rel=1e-6)
        both = shard(b, Shard(0), Shard(1), mesh=mesh), shard(c, Shard(0), Shard(1), mesh=mesh)
        check_clip(both, [b, c], norm_type, collectives=1, process_group=world)
        # Ranks outside of a mesh know the norm by a group around it.
        everywhere = shard(a, Shard(0))
        part = dtensor(b[: 1 + rank] if rank < 2 else b[:0], [Shard(0)], outer_mesh())
        expected = reference([a, b[:1], b[:2]], 0.5, norm_type)[0]
        total_norm = fastclip.get_total_norm([part, everywhere], norm_type, process_groups={world: [part]})
        assert total_norm.item() == pytest.approx(expected, rel=1e-6)


@functools.cache
def outer_mesh():
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh("cpu", [0, 1])


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_groups_inside_of_named_ones(ranks, norm_type):
    ranks.run(check_nested_groups, norm_type)


def test_flattened_group_does_not_hide_a_named_one():
    code = """
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
import fastclip
from ranks import all_reduces

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)  # its all-reduce changes nothing
mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("a", "b", "c"))
a, b, c = (mesh.get_group(name) for name in "abc")
grad = DTensor.from_local(torch.ones(2), mesh, [Shard(0)] * 3, run_check=False)
with all_reduces() as reductions:
    fastclip.get_total_norm([grad])
    fastclip.get_total_norm([grad], process_group=a)
assert reductions == [dist.group.WORLD, b, c, a], reductions
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def check_nothing_to_exchange():
    """Neither a dimension of one rank nor a frozen parameter asks for an all-reduce."""
    Shard, _, _ = placements()
    _, size = rank_and_size()
    whole = torch.randn(5, 6)
    check_clip([shard(whole, Shard(1), Shard(0), mesh=make_mesh((1, size)))], [whole], collectives=1)
    plain = make_parameter(torch.ones(2))
    for requires_grad in False, True:
        parameter = torch.nn.Parameter(shard(whole, Shard(0)), requires_grad=requires_grad)
        with all_reduces() as reductions:
            fastclip.clip_grad_norm_([plain, parameter], 0.5)
        assert len(reductions) == requires_grad
    # A frozen one in a call that another parameter has brought here.
    layers = [shard(whole, Shard(1), mesh=make_mesh((1, size))["b"]), whole]
    frozen = torch.nn.Parameter(shard(whole, Shard(0), mesh=other_mesh()), requires_grad=False)
    with all_reduces() as reductions:
        fastclip.clip_grad_norm_([frozen, *make_parameters(layers)], 0.5)
    assert reductions == [layers[0].device_mesh.get_group()]


@functools.cache
def other_mesh():
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(dist.new_group(list(range(dist.get_world_size()))), "cpu")


def test_collectives_are_for_what_is_spread(two):
    two.run(check_nothing_to_exchange)


def check_watched():
    """One rank counts FLOPs: it takes part in the same all-reduce."""
    from torch.utils.flop_counter import FlopCounterMode

    Shard, _, _ = placements()
    rank, _ = rank_and_size()
    whole = torch.randn(5, 3)
    grad = shard(whole, Shard(0))
    with FlopCounterMode(display=False) if rank == 0 else contextlib.nullcontext(), all_reduces() as reductions:
        total_norm = fastclip.clip_grad_norm_([make_parameter(grad)], 0.5)
    assert len(reductions) == 1
    assert total_norm.full_tensor().item() == pytest.approx(whole.norm().item(), rel=1e-6)
    assert fastclip.counters()["fallback_reasons"] == ({"dispatch mode": 1} if rank == 0 else {})


def test_dispatch_mode_on_one_rank(two):
    two.run(check_watched)


def check_after_complex():
    Shard, _, _ = placements()
    rank, _ = rank_and_size()
    whole, plain = torch.randn(5, 3), torch.full((3,), 3 + 4j)
    first = [plain] if rank == 0 else []  # only one rank has it, in front
    grads = [*first, shard(whole, Shard(0))]
    total_norm = fastclip.get_total_norm(grads).item()
    expected = (whole.norm().item() ** 2 + 75 * len(first)) ** 0.5
    assert total_norm == pytest.approx(expected, rel=1e-6)
    assert fastclip.counters()["fallback_reasons"] == ({"complex": 1} if rank == 0 else {})


def test_dtensor_after_a_gradient_that_is_not_fused(two):
    two.run(check_after_complex)


def check_different_parameters():
    """Two groups: the tensors of ranks 0 and 1 are spread over both, those of 2 and 3 over the first alone."""
    rank, _ = rank_and_size()
    mesh = make_mesh((2, 2), ("x", "y"))
    x, y = mesh.get_group("x"), mesh.get_group("y")
    values = torch.tensor([1.0, 2.0, 3.0, 3.0])
    mine = [values[rank : rank + 1]]
    total_norm = fastclip.get_total_norm(mine, process_groups={x: mine, y: mine if rank < 2 else []})
    assert total_norm.item() == pytest.approx((1 + 4 + 9) ** 0.5, rel=1e-6)


def test_combinations_that_not_every_rank_has(four):
    four.run(check_different_parameters)


def check_errors():
    group, other = dist.group.WORLD, torch.ones(2)
    parameter = make_parameter(torch.full((3,), 4.0))
    call = functools.partial(fastclip.clip_grad_norm_, [parameter], 0.1)
    name = group.group_name
    where = f"process_groups[{name!r}][0]"
    for kwargs, expected in [
        ({"process_group": 5}, (TypeError, "process_group: expected a torch.distributed.ProcessGroup, got int")),
        (
            {"process_groups": {5: []}},
            (TypeError, "process_groups: expected a torch.distributed.ProcessGroup, got int"),
        ),
        (
            {"process_groups": [group]},
            (TypeError, "process_groups: expected a mapping from process groups to tensors, got list"),
        ),
        (
            {"process_groups": {group: [other]}},
            (ValueError, f"{where}: expected one of parameters, got another Tensor"),
        ),
        (
            {"norm_type": 3, "process_group": group},
            (ValueError, "norm_type: expected 1, 2 or inf when there are process groups, got 3"),
        ),
    ]:
        assert outcome(call, **kwargs) == expected
    for items, expected in [
        ([parameter, 5], "parameters[1]: expected a torch.Tensor, got int"),
        (
            [make_parameter(torch.ones(2, dtype=torch.int64))],
            "parameters[0]: expected a floating-point gradient, got torch.int64",
        ),
    ]:
        assert outcome(fastclip.clip_grad_norm_, items, 0.1, process_group=group) == (TypeError, expected)
    assert parameter.grad._version == 0 and fastclip.counters()["calls"] == 0
    assert fastclip.clip_grad_norm_([parameter], 0.1, process_groups={}).item() == pytest.approx(48**0.5)


def test_errors_of_process_groups(two):
    two.run(check_errors)


# A model under FSDP2 and tensor parallelism.


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(12)
        self.up, self.down = torch.nn.Linear(12, 20), torch.nn.Linear(20, 12, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def check_model(shape, with_tensor_parallel):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = make_mesh(shape, ("dp", "tp"))
    whole, model = (torch.nn.Sequential(Block(), Block()) for _ in range(2))
    model.load_state_dict(whole.state_dict())
    x = torch.randn(6, 12) * 10
    if with_tensor_parallel:
        for block in model:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    data = mesh["dp"] if with_tensor_parallel else mesh
    for block in model:
        fully_shard(block, mesh=data)
    fully_shard(model, mesh=data)
    whole(x).square().mean().backward()
    model(x).square().mean().backward()
    whole.double()
    for parameter in whole.parameters():
        parameter.grad = parameter.grad.double()
    max_norm = 0.1
    expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), max_norm)
    with all_reduces() as reductions:
        total_norm = fastclip.clip_grad_norm_(model.parameters(), max_norm)
    assert fastclip.counters()["native"] == fastclip.counters()["calls"] == 1
    assert len(reductions) <= len(shape)
    full = total_norm.full_tensor() if distributed.is_dtensor(total_norm) else total_norm
    assert full.item() == pytest.approx(expected.item(), rel=1e-4)  # the two models differ by rounding
    wholes = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor().double(), wholes[name].grad, rtol=1e-3, atol=1e-6)


@needs_fully_shard
def test_model_under_fsdp(two):
    two.run(check_model, (2,), False)


@needs_fully_shard
def test_model_under_hsdp(four):
    four.run(check_model, (2, 2), False)


@needs_fully_shard
def test_model_under_fsdp_and_tensor_parallel(four):
    four.run(check_model, (2, 2), True)


def check_optimizer(fold):
    from torch.distributed.fsdp import fully_shard

    mesh = make_mesh((2,), ("dp",))
    whole, model = (torch.nn.Sequential(Block(), Block()) for _ in range(2))
    model.load_state_dict(whole.state_dict())
    fully_shard(model, mesh=mesh)
    bare = torch.optim.AdamW(whole.parameters(), 0.01, fused=True)
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters(), 0.01, fused=True), 0.1, fold=fold)
    for _ in range(3):
        x = torch.randn(6, 12) * 10
        bare.zero_grad()
        optimizer.zero_grad()
        whole(x).square().mean().backward()
        model(x).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
        assert norm.item() > 0.2
        bare.step()
        optimizer.step()
        assert type(optimizer.last_total_norm) is torch.Tensor
        assert optimizer.last_total_norm.item() == pytest.approx(norm.item(), rel=1e-4)
    assert fastclip.counters()["fallback"] == 0
    for sharded, parameter in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(sharded.full_tensor(), parameter, rtol=1e-4, atol=1e-5)


@needs_fully_shard
@pytest.mark.parametrize("fold", [True, False])
def test_optimizer_under_fsdp(two, fold):
    """The norm is that of the whole model, on every rank."""
    two.run(check_optimizer, fold)


def test_import_leaves_dtensor_alone():
    code = """
import sys, torch, fastclip
parameter = torch.nn.Parameter(torch.ones(3)); parameter.grad = torch.ones(3)
fastclip.clip_grad_norm_([parameter], 1.0)
print([name for name in sys.modules if name.startswith("torch.distributed.tensor")])
"""
    assert run_python(code).stdout == "[]\n"


def statistics_of_shards(norm_type):
    from torch.distributed.tensor import Replicate, Shard

    torch.manual_seed(0)
    wholes = [torch.randn(8, 6), torch.randn(4, 2), torch.randn(1, 3), torch.randn(5)]
    wholes[0][3, 1], wholes[0][7, 0], wholes[0][0, 0] = 0.0, -0.0, 1e-40
    wholes[1][3, 0] = INF
    wholes[2][0, 1] = NAN  # on the first rank only: the others have no element of it
    expected = fastclip.statistics.by_torch(wholes, norm_type)
    placements = [Shard(0), Shard(1), Shard(0), Replicate()]
    grads = [shard(whole, placement) for whole, placement in zip(wholes, placements, strict=True)]
    statistics = fastclip.GradStatistics()
    with all_reduces() as plain:
        fastclip.clip_grad_norm_(make_parameters([grad.clone() for grad in grads]), 1.0, norm_type)
    with all_reduces() as full:
        fastclip.clip_grad_norm_(make_parameters(grads), 1.0, norm_type, statistics=statistics)
    torch.testing.assert_close(statistics.values, expected, rtol=1e-6, atol=0, equal_nan=True)
    assert len(full) == len(plain) + 2


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_statistics(ranks, norm_type):
    ranks.run(statistics_of_shards, norm_type)


def check_a_monitor(path):
    """Every rank records the values of the whole gradients; the first one writes."""
    Shard, _, _ = placements()
    rank = dist.get_rank()
    model = torch.nn.Linear(3, 5)
    wholes = [torch.randn(5, 3), torch.tensor([0.0, 3.0, INF, NAN, -1.0])]
    layouts = Shard(0), Shard(0)
    for name, whole, layout in zip(("weight", "bias"), wholes, layouts, strict=True):
        parameter = torch.nn.Parameter(shard(torch.full_like(whole, 2.0), layout))
        parameter.grad = shard(whole, layout)
        setattr(model, name, parameter)
    monitor = fastclip.GradientMonitor(model, path=path)
    monitor.clip_grad_norm_(1.0)
    history = monitor.history()
    assert [(layer.name, layer.shape) for layer in history.layers] == [("weight", (5, 3)), ("bias", (5,))]
    weight, bias = history.values[0].tolist()
    assert weight[0] == pytest.approx(wholes[0].norm().item(), rel=1e-6)
    assert weight[1] == wholes[0].abs().max().item() and weight[2:5] == [0, 0, 0]
    assert bias[2:5] == [1, 1, 1]
    norms = [2 * 15**0.5, 2 * 5**0.5]
    assert history.weight_norms[0].tolist() == pytest.approx(norms, rel=1e-6)
    assert (monitor._file is not None) == (rank == 0)
    monitor.close()
    # Another one goes on with the file, on all ranks at the same step: what they measure together has to be of one.
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    monitor = fastclip.GradientMonitor(model, path=path, every=2)
    assert monitor.step == 1
    for _ in range(3):
        monitor.clip_grad_norm_(1.0)
    assert monitor.history().steps.tolist()[-1] == 2
    monitor.close()


def test_a_monitor(ranks, tmp_path):
    ranks.run(check_a_monitor, str(tmp_path / "run.jsonl"))
    assert fastclip.GradientMonitor.load(tmp_path / "run.jsonl").history().steps.tolist() == [0, 2]
