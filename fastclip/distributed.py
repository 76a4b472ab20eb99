"""Gradients spread over ranks: DTensors, and norms that are combined over process groups.

A rank reduces what it holds in the native pass, the ranks add up what they found, and each scales what it holds. What
is exchanged are a few float64 numbers, once for each process group: gradients are sorted by the set of groups over
which their elements are spread, and all that a group has to add up travels in one vector.

Whether an all-reduce takes place follows from the parameters, not from the gradients that a rank happens to have, so
that no rank waits for another.

Functions that may find nothing to do here return a str then, as those of the extension do: the reason why torch's
function has to do the call.
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip import _torch_functions, clip_report
from fastclip._native import _C, NOT_BUILT
from fastclip.counters import count_fallback
from fastclip.policies import ThresholdPolicy
from fastclip.statistics import COLUMNS, GradStatistics, by_torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# A tensor; or a str, the reason why torch has to do the call, but never where there are process groups.
TensorOrReason = Any


@torch.no_grad()
def get_total_norm(
    tensors, norm_type, error_if_nonfinite, process_group=None, process_groups: Mapping | None = None
) -> TensorOrReason:
    grads = _Gradients(tensors, "tensors")
    given = _given_groups(grads, process_group, process_groups)
    reason = grads.why_left_to_torch(given) or _why_not_fused(norm_type, given)
    if reason:
        return reason
    norm, _ = grads.total_norm(norm_type, error_if_nonfinite, given)
    grads.count_call()
    return norm


@torch.no_grad()
def clip_grad_norm_(
    parameters,
    max_norm,
    norm_type,
    error_if_nonfinite,
    process_group=None,
    process_groups: Mapping | None = None,
    statistics: GradStatistics | None = None,
    nonfinite: str | None = None,
) -> TensorOrReason:
    grads = _Gradients(parameters, "parameters")
    given = _given_groups(grads, process_group, process_groups)
    reason = grads.why_left_to_torch(given) or _why_not_fused(norm_type, given) or grads.why_not_scaled(given)
    if reason:
        return reason
    max_norm = _full(max_norm)
    norm, unrounded = grads.total_norm(norm_type, error_if_nonfinite and nonfinite is None, given, statistics)
    if isinstance(max_norm, ThresholdPolicy):
        max_norm = max_norm.follow(unrounded)
    if nonfinite is not None:
        report = grads.report_on(max_norm, unrounded, norm, "skip" if error_if_nonfinite else nonfinite)
        clip_report.remember(report, nonfinite, error_if_nonfinite)
        if error_if_nonfinite:
            grads.check_finite(unrounded, float(norm_type))
    grads.scale(max_norm, unrounded, nonfinite)
    grads.count_call()
    return norm


@torch.no_grad()
def clip_grads_with_norm_(parameters, max_norm, total_norm) -> str | None:
    grads = _Gradients(parameters, "parameters")
    if not (grads.has_dtensors or is_dtensor(total_norm)):
        return "subclass"
    if reason := grads.why_not_scaled():
        return reason
    total_norm = _full(total_norm)
    if not (isinstance(total_norm, Tensor) and total_norm.dim() == 0):
        return "total_norm"
    grads.scale(_full(max_norm), total_norm)
    grads.count_call()
    return None


@torch.no_grad()
def clip_grad_value_(parameters, clip_value) -> str | None:
    grads = _Gradients(parameters, "parameters")
    if reason := grads.why_left_to_torch() or grads.why_not_clamped():
        return reason
    grads.clamp(float(_full(clip_value)))
    grads.count_call()
    return None


class _Gradients:
    """The gradients of one call, as this rank holds them."""

    def __init__(self, items: Tensor | Sequence, argument: str):
        self.argument = argument
        self.items = [items] if isinstance(items, Tensor) else items
        self.grads = [_gradient(item, argument, index) for index, item in enumerate(self.items)]
        self.locals: list[Any] = [None if grad is None else _local(grad) for grad in self.grads]
        # What says where a gradient's elements are: itself, or, where this rank has none, its parameter.
        self.models = [
            item if grad is None and is_dtensor(item) and item.requires_grad else grad
            for item, grad in zip(self.items, self.grads, strict=True)
        ]
        self.has_dtensors = any(map(is_dtensor, self.models))
        self.fallback_reason = None if _C else NOT_BUILT

    def why_left_to_torch(self, given: Mapping | tuple = ()) -> str | None:
        return None if self.has_dtensors or given else "subclass"

    def why_not_scaled(self, given: Mapping | tuple = ()) -> str | None:
        # Scaling the parts of a sum or a mean scales it. torch refuses the other kinds, at least some versions of it.
        return self._why_not_local(("sum", "avg"), given)

    def why_not_clamped(self) -> str | None:
        return self._why_not_local(("max", "min"), ())

    def _why_not_local(self, reductions: tuple, given: Mapping | tuple) -> str | None:
        """Why an operation cannot be done rank by rank: it does not commute with the reduction that is pending."""
        for index, grad in enumerate(self.grads):
            placements: Any = grad.placements if is_dtensor(grad) else ()
            for placement in placements:
                if placement.is_partial() and (
                    type(placement) is not _dtensor_module().Partial or placement.reduce_op not in reductions
                ):
                    if given:
                        raise ValueError(
                            f"{self.argument}[{index}]: expected a gradient that can be scaled rank by rank when "
                            f"there are process groups, got {placement!r}"
                        )
                    return repr(placement)
        return None

    def total_norm(
        self,
        norm_type: float,
        error_if_nonfinite: bool,
        given: Mapping,
        statistics: GradStatistics | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The norm as users get it, and in float64 as the clip coefficient is computed from it."""
        p, device = float(norm_type), self._device()
        reduction = _Reduction(p)
        parts, groups = self._by_groups(given)
        if statistics is None:
            norms = {key: self._local_norm(list(part.values()), p, device) for key, part in parts.items()}
        else:
            norms, rows = {}, torch.zeros(len(self.items), len(COLUMNS), dtype=torch.float64, device=device)
            for key, part in parts.items():
                norms[key], values = self._local_statistics(list(part.values()), p, device)
                rows[list(part)] = values
            rows = self._global_statistics(rows, groups, reduction)
            statistics.values = rows[[index for index, grad in enumerate(self.grads) if grad is not None]]
        terms = {key: reduction.terms(norm) for key, norm in norms.items()}
        unrounded = reduction.norm(_all_reduce(terms, groups, list(given), reduction, device))
        norm = unrounded.to(self._norm_dtype())
        if error_if_nonfinite:
            self.check_finite(norm, p)
        # Where the user gets inf or NaN, torch's results hold: everything finite becomes 0.
        unrounded = torch.where(norm.isfinite(), unrounded, norm.double())
        if not given and (mesh := self._common_mesh()) is not None:
            module = _dtensor_module()
            norm = module.DTensor.from_local(norm, mesh, [module.Replicate()] * mesh.ndim, run_check=False)
        return norm, unrounded

    def check_finite(self, norm: Tensor, p: float) -> None:
        with clip_report.naming_the_first_bad(self.argument, self.items, " on this rank"):
            _torch_functions.get_total_norm([norm], p, error_if_nonfinite=True)  # torch's own error

    def report_on(self, max_norm: float | Tensor, total_norm: Tensor, returned: Any, nonfinite: str):
        """What is about to be done, and which gradient of this rank is the first bad one. No rank is asked."""
        returned = _full(returned)
        reason = self.fallback_reason
        if _C:
            report, tensors = _C.ClipReport(), [local for local in self.locals if local is not None]
            missing = [index for index, local in enumerate(self.locals) if local is None]
            reason = _C.report_on(report, tensors, missing, max_norm, total_norm, returned, nonfinite)
            if reason is None:
                return report
        self.fallback_reason = reason
        return clip_report.known(returned.double(), max_norm, nonfinite, self.locals)

    def scale(self, max_norm: float | Tensor, total_norm: Tensor, nonfinite: str | None = None) -> None:
        self._write(
            lambda tensors: _C.scale_by_norm_(tensors, max_norm, total_norm, nonfinite),
            lambda holders: clip_report.scale_by_torch(holders, max_norm, total_norm, nonfinite),
        )

    def clamp(self, clip_value: float) -> None:
        self._write(
            lambda tensors: _C.clamp_(tensors, clip_value) if clip_value >= 0 else "clip_value",
            lambda holders: _torch_functions.clip_grad_value_(holders, clip_value),
        )

    def count_call(self) -> None:
        if self.fallback_reason:
            count_fallback(self.fallback_reason)
        else:
            _C.count_native_call()

    def _write(self, native, by_torch) -> None:
        """Changes the local parts in place, and the version counters of what wraps them."""
        tensors = [local for local in self.locals if local is not None]
        versions = [local._version for local in tensors]
        reason = native(tensors) if _C else self.fallback_reason
        if reason:
            self.fallback_reason = reason
            by_torch([SimpleNamespace(grad=tensor) for tensor in tensors if tensor.numel()])
        wrappers = [grad for grad in self.grads if grad is not None]
        for grad, local, version in zip(wrappers, tensors, versions, strict=True):
            if grad is not local and local._version != version:
                torch.autograd.graph.increment_version(grad)

    def _by_groups(self, given: Mapping) -> tuple[dict[frozenset, dict[int, Tensor]], list]:
        """The local parts whose norms count, by the process groups over which each is spread; and all those groups.

        A part comes with its item's index.

        The groups are in the order in which the parameters need them, which is the same on all ranks of a mesh.
        """
        layouts = [(x.device_mesh, x.placements) if is_dtensor(x) else None for x in self.models]
        groups_of = _sharding_groups([layout for layout in dict.fromkeys(layouts) if layout], given)
        all_groups = list(dict.fromkeys(group for groups in groups_of.values() for group in groups))
        # A sum over a named group has that over any group inside it: not twice.
        inside = {(group, named) for named in given for group in all_groups if _within(group, named)}
        self.groups_of_items = [groups_of.get(layout, []) for layout in layouts]
        parts: dict[frozenset, dict[int, Tensor]] = {}
        for index, (item, grad, local, layout) in enumerate(
            zip(self.items, self.grads, self.locals, layouts, strict=True)
        ):
            named = [group for group, members in given.items() if id(item) in members]
            others = [g for g in groups_of.get(layout, []) if not any((g, n) in inside for n in named)]
            key = frozenset(named + others)
            part = parts.setdefault(key, {})
            if grad is not None:
                part[index] = _local(_without_partial(grad)) if _is_partial(grad) else local
        return parts, all_groups

    def _local_norm(self, tensors: list[Tensor], p: float, device: torch.device) -> Tensor:
        """The norm of plain tensors: float64, 0-d; that of no elements is 0."""
        norm: Any = _C.norm_of(tensors, p) if _C else self.fallback_reason
        if type(norm) is str:
            self.fallback_reason = norm
            norm = _torch_functions.get_total_norm([tensor for tensor in tensors if tensor.numel()], p).double()
        return norm.to(device)

    def _local_statistics(self, tensors: list[Tensor], p: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """The norm, as _local_norm has it, and the rows of GradStatistics; from one pass."""
        both: Any = _C.norm_and_statistics_of(tensors, p) if _C else self.fallback_reason
        if type(both) is not str:
            return both[0].to(device), both[1].to(device)
        self.fallback_reason = both
        return self._local_norm(tensors, p, device), by_torch(tensors, p).to(device)

    def _global_statistics(self, rows: Tensor, groups: list, reduction: "_Reduction") -> Tensor:
        """Rows of whole parameters from those of local parts, in two all-reduces for each process group of a mesh.

        Groups that the caller names hold different parameters: there is nothing to combine.
        """
        for group in groups:
            items = [index for index, of_item in enumerate(self.groups_of_items) if group in of_item]
            if not items:
                continue
            part = rows[items]
            terms = torch.stack([reduction.terms(norm) for norm in part[:, 0].unbind()])
            is_max = reduction.op == dist.ReduceOp.MAX
            sums = part[:, 2:] if is_max else torch.cat([part[:, 2:], terms], dim=1)
            # NaN is counted; some backends' maximum (gloo) drops it.
            maxima = part[:, 1:2].nan_to_num(nan=0, posinf=float("inf"))
            _all_reduce_in_place(sums := sums.contiguous(), dist.ReduceOp.SUM, group)
            _all_reduce_in_place(maxima := maxima.contiguous(), dist.ReduceOp.MAX, group)
            counts = sums[:, :4]
            largest = maxima[:, 0].masked_fill(counts[:, 2] > 0, float("nan"))
            norms = largest if is_max else torch.stack([reduction.norm(term) for term in sums[:, 4:].unbind()])
            rows[items] = torch.cat([norms[:, None], largest[:, None], counts], dim=1)
        return rows

    def _device(self) -> torch.device:
        return next((local.device for local in self.locals if local is not None), torch.device("cpu"))

    def _norm_dtype(self) -> torch.dtype:
        wide = any(x is not None and x.dtype in (torch.float64, torch.complex128) for x in self.models)
        return torch.float64 if wide else torch.float32

    def _common_mesh(self):
        """The mesh on which all gradients are DTensors, or None."""
        meshes = {x.device_mesh if is_dtensor(x) else None for x in self.models if x is not None}
        return meshes.pop() if len(meshes) == 1 else None


class _Reduction:
    """How norms of parts become the norm of the whole: as terms that an all-reduce adds up.

    For norm type 2 these are three sums of squares, of the norms times 2^-600, 1 and 2^600 (J. L. Blue, A portable
    Fortran program to find the Euclidean norm of a vector, 1978): one of them neither overflows nor underflows, for
    any float64, so that no maximum has to be agreed on before. For inf they are the maximum and whether there is a
    NaN, which the maximum of some backends (gloo) drops.
    """

    _POWER = 2.0**600

    def __init__(self, p: float):
        self.p = p
        self.size = 1 if p == 1 else 3 if p == 2 else 2
        self.combine = torch.add if p < float("inf") else torch.maximum
        self.op = dist.ReduceOp.SUM if p < float("inf") else dist.ReduceOp.MAX

    def terms(self, norm: Tensor) -> Tensor:
        if self.p == 1:
            return norm.reshape(1)
        if self.p == 2:
            return torch.stack([norm / self._POWER, norm, norm * self._POWER]).square()
        is_nan = norm.isnan()
        return torch.stack([norm.masked_fill(is_nan, 0), is_nan.double()])

    def norm(self, terms: Tensor) -> Tensor:
        if self.p == 1:
            return terms[0]
        if self.p == 2:
            large, medium, small = terms
            norm = torch.where(medium < 2.0**-900, small.sqrt() / self._POWER, medium.sqrt())
            return torch.where(medium.isinf(), large.sqrt() * self._POWER, norm)
        return terms[0].masked_fill(terms[1] > 0, float("nan"))


def _all_reduce(terms: dict, groups: list, given: list, reduction: _Reduction, device: torch.device) -> Tensor:
    """Combines terms over all groups: first over those of meshes, then over those that the caller named, in order."""
    zero = torch.zeros(reduction.size, dtype=torch.float64, device=device)
    for group in [group for group in groups if group not in given] + given:
        if group in given:
            # Its ranks may know different parameters: each sends a term for every combination that any can have.
            later = given[given.index(group) + 1 :]
            keys = [frozenset({group, *some}) for n in range(len(later) + 1) for some in combinations(later, n)]
        else:
            keys = [key for key in terms if group in key]
        if not keys:
            continue
        vector = torch.cat([terms.pop(key, zero) for key in keys])
        # A group of NCCL wants it on the device, also when gradients are offloaded to the CPU or this rank has none.
        types = [device.type for device in group._device_types]
        there = vector.to(device if device.type in types else types[0])
        dist.all_reduce(there, reduction.op, group=group)
        for key, term in zip(keys, there.to(device).split(reduction.size), strict=True):
            rest = key - {group}
            terms[rest] = reduction.combine(terms.get(rest, zero), term)
    return terms.get(frozenset(), zero)


def _all_reduce_in_place(tensor: Tensor, op, group) -> None:
    types = [device.type for device in group._device_types]
    there = tensor if tensor.device.type in types else tensor.to(types[0])
    dist.all_reduce(there, op, group=group)
    if there is not tensor:
        tensor.copy_(there)


def _sharding_groups(layouts: list, given: Mapping) -> dict:
    """For each (mesh, placements) the process groups over which a gradient's elements are spread."""
    dims_of = {(mesh, placements): _sharded_dims(mesh, placements) for mesh, placements in layouts}
    groups_of = {layout: [layout[0].get_group(dim) for dim in dims] for layout, dims in dims_of.items()}
    needed = {groups[0] for groups in groups_of.values() if len(groups) == 1}.union(given)
    for (mesh, placements), groups in groups_of.items():
        # One group for several dimensions, where that saves an all-reduce; it must not hide one that the caller named.
        flat = _flattened_group(mesh, dims_of[mesh, placements]) if len(set(groups) - needed) > 1 else None
        if flat and not any(_within(group, flat) and not _within(flat, group) for group in given):
            groups[:] = [flat]
    return groups_of


def _within(group, other) -> bool:
    return set(dist.get_process_group_ranks(group)) <= set(dist.get_process_group_ranks(other))


def _sharded_dims(mesh, placements) -> list[int]:
    if mesh.get_coordinate() is None:  # this rank is outside of the mesh
        return []
    spread = [not (placement.is_replicate() or placement.is_partial()) for placement in placements]
    return [dim for dim, is_spread in enumerate(spread) if is_spread and mesh.size(dim) > 1]


def _flattened_group(mesh, dims: list[int]):
    """A process group of exactly the ranks along these dimensions of a mesh, if there is one; none is created."""
    at = [slice(None) if dim in dims else here for dim, here in enumerate(mesh.get_coordinate())]
    ranks = sorted(mesh.mesh[tuple(at)].flatten().tolist())
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh  # older torch: WORLD only
    flattened = [flat.get_group() for flat in getattr(root, "_flatten_mapping", {}).values()]
    return next((g for g in [dist.group.WORLD, *flattened] if sorted(dist.get_process_group_ranks(g)) == ranks), None)


def _given_groups(grads: _Gradients, process_group, process_groups: Mapping | None) -> dict:
    """The groups that the caller names, in order, each with the ids of those items that are spread over it."""
    everything = {id(item) for item in grads.items}
    given: dict = {}
    if process_groups is not None and not isinstance(process_groups, Mapping):
        found = type(process_groups).__name__
        raise TypeError(f"process_groups: expected a mapping from process groups to tensors, got {found}")
    for group, members in (process_groups or {}).items():
        given[_checked(group, "process_groups")] = ids = set()
        for index, member in enumerate([members] if isinstance(members, Tensor) else members):
            if id(member) not in everything:
                where = f"process_groups[{group.group_name!r}][{index}]"
                raise ValueError(f"{where}: expected one of {grads.argument}, got another {type(member).__name__}")
            ids.add(id(member))
    if process_group is not None:
        given.pop(_checked(process_group, "process_group"), None)
        given[process_group] = everything
    return given


def _checked(group, argument: str):
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{argument}: expected a torch.distributed.ProcessGroup, got {type(group).__name__}")
    return group


def _why_not_fused(norm_type: float, given: Mapping) -> str | None:
    if float(norm_type) in (1, 2, float("inf")):
        return None
    if given:
        raise ValueError(f"norm_type: expected 1, 2 or inf when there are process groups, got {norm_type}")
    return "norm_type"


def _gradient(item, argument: str, index: int) -> Tensor | None:
    grad = item if argument == "tensors" else getattr(item, "grad", item)
    if grad is None and argument == "parameters":
        return None
    if not isinstance(grad, Tensor) or (grad is item and argument == "parameters"):
        raise TypeError(f"{argument}[{index}]: expected a torch.Tensor, got {type(item).__name__}")
    if not (grad.is_floating_point() or grad.is_complex()):
        raise TypeError(f"{argument}[{index}]: expected a floating-point gradient, got {grad.dtype}")
    return grad


def _dtensor_module():
    """torch.distributed.tensor, or None while nobody has imported it: then nobody has a DTensor either."""
    return sys.modules.get("torch.distributed.tensor")


def is_dtensor(x: object) -> "TypeGuard[DTensor]":
    module = _dtensor_module()
    return module is not None and isinstance(x, module.DTensor)


def _full(number: float | Tensor) -> float | Tensor:
    return number.full_tensor() if is_dtensor(number) else number


def _is_partial(grad: Tensor) -> "TypeGuard[DTensor]":
    return is_dtensor(grad) and any(placement.is_partial() for placement in grad.placements)


def replicated(tensor: "DTensor") -> "DTensor":
    return tensor.redistribute(placements=[_dtensor_module().Replicate()] * tensor.device_mesh.ndim)


def _without_partial(grad: "DTensor") -> Tensor:
    """A copy whose pending reductions are done. torch does the same, for one gradient after the other."""
    replicate = _dtensor_module().Replicate()
    return grad.redistribute(placements=[replicate if p.is_partial() else p for p in grad.placements])


def _local(grad: Tensor) -> Tensor:
    """This rank's part of a gradient, once it has arrived."""
    local = grad._local_tensor if is_dtensor(grad) else grad
    return local.trigger_wait() if hasattr(local, "trigger_wait") else local  # an AsyncCollectiveTensor
