"""What a user can hand in wrongly, and what is said then: the one table of tests/test_errors.py and docs/errors.md.

`python tests/error_table.py` writes the page.
"""

import sys
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[1] / "docs" / "errors.md"


class Row(NamedTuple):
    """`call` is evaluated with the names of test_errors.py::names. A message that ends in … is the beginning of one.

    Where the call is of `clip`, it holds for each of the four functions, with what else that one needs;
    `get_total_norm` says `tensors` where the message has `parameters`.
    """

    given: str
    call: str
    error: type[Exception]
    message: str


NOT_FINITE = (
    "The total norm of order 2.0 for gradients from `parameters` is non-finite, so it cannot be clipped. To disable "
    "this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`. "
    "parameters[1].grad has the first inf or NaN"
)

LISTS = [
    ("None in the list", "clip([good, None])", TypeError, "parameters[1]: expected a torch.Tensor, got NoneType"),
    ("a number", "clip([good, 1.0])", TypeError, "parameters[1]: expected a torch.Tensor, got float"),
    ("text", "clip([good, 'p'])", TypeError, "parameters[1]: expected a torch.Tensor, got str"),
    (
        "a NumPy array",
        "clip([good, np.ones(3)])",
        TypeError,
        "parameters[1]: expected a torch.Tensor, got numpy.ndarray",
    ),
    ("a list in the list", "clip([good, [good]])", TypeError, "parameters[1]: expected a torch.Tensor, got list"),
    ("further behind", "clip([good, good, good, 5])", TypeError, "parameters[3]: expected a torch.Tensor, got int"),
    (
        "names and parameters",
        "clip(model.named_parameters())",
        TypeError,
        "parameters[0]: expected a torch.Tensor, got tuple",
    ),
    ("a state dict", "clip(model.state_dict())", TypeError, "parameters[0]: expected a torch.Tensor, got str"),
    (
        "an optimizer's groups",
        "clip(optimizer.param_groups)",
        TypeError,
        "parameters[0]: expected a torch.Tensor, got dict",
    ),
    ("a model", "clip(model)", TypeError, "parameters: expected a torch.Tensor or an iterable of them, got Linear"),
    ("nothing", "clip(None)", TypeError, "parameters: expected a torch.Tensor or an iterable of them, got NoneType"),
    ("text instead of a list", "clip('w')", TypeError, "parameters[0]: expected a torch.Tensor, got str"),
    (
        "a number instead of a list",
        "clip(5)",
        TypeError,
        "parameters: expected a torch.Tensor or an iterable of them, got int",
    ),
    (
        "integer gradients",
        "clip([good, with_grad(torch.ones(3).long())])",
        TypeError,
        "parameters[1]: expected a floating-point gradient, got torch.int64",
    ),
    (
        "a mask",
        "clip([good, with_grad(torch.ones(3).bool())])",
        TypeError,
        "parameters[1]: expected a floating-point gradient, got torch.bool",
    ),
    (
        "a gradient whose storage was resized to nothing",
        "clip([good, with_grad(freed())])",
        RuntimeError,
        "parameters[1]: expected a gradient with memory for its elements, got 0 bytes of storage",
    ),
    (
        "an object whose `.grad` is no tensor",
        "fastclip.clip_grad_norm_([good, has_grad], 1.0)",
        TypeError,
        "parameters[1].grad: expected a torch.Tensor, got str",
    ),
    (
        "an expanded gradient",
        "fastclip.clip_grad_norm_([good, with_grad(torch.ones(1).expand(3))], 1e-3)",
        RuntimeError,
        "unsupported operation: more than one element of the written-to tensor refers to a single memory location…",
    ),
    (
        "an inference tensor",
        "fastclip.clip_grad_norm_([good, with_grad(inference())], 1e-3)",
        RuntimeError,
        "Inplace update to inference tensor outside InferenceMode is not allowed…",
    ),
    (
        "the inf norm of an empty gradient",
        "fastclip.clip_grad_norm_([good, with_grad(torch.ones(0))], 1.0, 'inf')",
        RuntimeError,
        "_foreach_norm cannot compute the infinity norm on an empty tensor…",
    ),
]

NUMBERS = [
    ("no threshold", "fastclip.clip_grad_norm_([good], None)", TypeError, "max_norm: expected a number, got None"),
    ("a list", "fastclip.clip_grad_norm_([good], [1.0])", TypeError, "max_norm: expected a number, got [1.0]"),
    ("text", "fastclip.clip_grad_norm_([good], 'one')", ValueError, "max_norm: expected a number, got 'one'"),
    (
        "a complex number",
        "fastclip.clip_grads_with_norm_([good], 1j, torch.tensor(2.0))",
        TypeError,
        "max_norm: expected a number, got 1j",
    ),
    (
        "an order that is no number",
        "fastclip.clip_grad_norm_([good], 1.0, 'two')",
        ValueError,
        "norm_type: expected a number, got 'two'",
    ),
    ("no order", "fastclip.get_total_norm([good.grad], None)", TypeError, "norm_type: expected a number, got None"),
    (
        "an int beyond float64",
        "fastclip.clip_grad_norm_([good], 10**400)",
        OverflowError,
        "max_norm: expected a number in float64's range, got one beyond it",
    ),
    (
        "an order beyond float64",
        "fastclip.get_total_norm([good.grad], 10**400)",
        OverflowError,
        "norm_type: expected a number in float64's range, got one beyond it",
    ),
    ("no limit", "fastclip.clip_grad_value_([good], None)", TypeError, "clip_value: expected a number, got None"),
    (
        "a limit that is no number",
        "fastclip.clip_grad_value_([good], '')",
        ValueError,
        "clip_value: expected a number, got ''",
    ),
    (
        "a limit beyond float16",
        "fastclip.clip_grad_value_([good, with_grad(torch.ones(3).half())], 1e6)",
        RuntimeError,
        "value cannot be converted to type c10::Half without overflow",
    ),
    (
        "a norm that is not finite, where that is an error",
        "fastclip.clip_grad_norm_([good, with_grad(torch.full((3,), torch.nan))], 1.0, error_if_nonfinite=True)",
        RuntimeError,
        NOT_FINITE,
    ),
    (
        "no statistics object",
        "fastclip.clip_grad_norm_([good], 1.0, statistics={})",
        TypeError,
        "statistics: expected a fastclip.GradStatistics or None, got dict",
    ),
    (
        "no process group",
        "fastclip.clip_grad_norm_([good], 1.0, process_group=5)",
        TypeError,
        "process_group: expected a torch.distributed.ProcessGroup, got int",
    ),
    (
        "no mapping",
        "fastclip.clip_grad_norm_([good], 1.0, process_groups=[1])",
        TypeError,
        "process_groups: expected a mapping from process groups to tensors, got list",
    ),
]

OPTIMIZERS = [
    (
        "a model",
        "fastclip.ClippedOptimizer(model, 1.0)",
        TypeError,
        "optimizer: expected a torch.optim.Optimizer, got Linear",
    ),
    (
        "one that clips already",
        "fastclip.ClippedOptimizer(fastclip.ClippedOptimizer(optimizer, 1.0), 1.0)",
        TypeError,
        "optimizer: expected one that is not clipped already, got ClippedOptimizer",
    ),
    (
        "both thresholds",
        "fastclip.ClippedOptimizer(optimizer, 1.0, clip_value=0.5)",
        ValueError,
        "clip_value: expected None beside max_norm, got both",
    ),
    (
        "a negative threshold",
        "fastclip.ClippedOptimizer(optimizer, -1.0)",
        ValueError,
        "max_norm: expected a number >= 0, got -1.0",
    ),
    ("NaN", "fastclip.ClippedOptimizer(optimizer, torch.nan)", ValueError, "max_norm: expected a number >= 0, got nan"),
    ("text", "fastclip.ClippedOptimizer(optimizer, '1')", TypeError, "max_norm: expected a number, got '1'"),
    (
        "a limit that is no number",
        "fastclip.ClippedOptimizer(optimizer, clip_value='1')",
        TypeError,
        "clip_value: expected a number, got '1'",
    ),
    (
        "a threshold that becomes negative",
        "fastclip.ClippedOptimizer(optimizer, lambda steps: steps - 1).step()",
        ValueError,
        "max_norm: expected a number >= 0, got -1",
    ),
    (
        "a group's threshold that is none",
        "fastclip.ClippedOptimizer(with_group_threshold('x'), 1.0).step()",
        TypeError,
        "param_groups[0]['max_norm']: expected a number, got 'x'",
    ),
    (
        "a way of folding that does not exist",
        "fastclip.ClippedOptimizer(optimizer, 1.0, fold='always')",
        ValueError,
        "fold: expected \"auto\", True or False, got 'always'",
    ),
    (
        "folding that is not possible",
        "fastclip.ClippedOptimizer(torch.optim.RMSprop([good]), 1.0, fold=True)",
        ValueError,
        "fold: expected with True an optimizer that honours grad_scale…",
    ),
    (
        "no statistics object",
        "fastclip.ClippedOptimizer(optimizer, 1.0, statistics=[])",
        TypeError,
        "statistics: expected a fastclip.GradStatistics or None, got list",
    ),
    (
        "no monitor",
        "fastclip.ClippedOptimizer(optimizer, 1.0, monitor=5)",
        TypeError,
        "monitor: expected a fastclip.GradientMonitor, got int",
    ),
    ("no model", "fastclip.GradientMonitor([good])", TypeError, "model: expected a torch.nn.Module, got list"),
]

SECTIONS = {
    "Lists of parameters": [Row(*row) for row in LISTS],
    "Numbers and options": [Row(*row) for row in NUMBERS],
    "Optimizers and monitors": [Row(*row) for row in OPTIMIZERS],
}

HEAD = """# Errors

What can be handed in wrongly, and the exact message: argument, index, expected, found. Gradients are as they were when
an error is raised, those before the faulty one included. `test_errors.py::test_table` makes every call of this page,
which `python tests/error_table.py` writes from the table that the test reads.

`clip` stands for each of the four functions; `get_total_norm` takes gradients and says `tensors` where the message has
`parameters`. `good` is a parameter with a gradient, `with_grad(x)` one with the gradient `x`. A message that ends in …
is longer than that. Messages that do not begin with an argument's name are torch's own.
"""


def page() -> str:
    lines = [HEAD]
    for title, rows in SECTIONS.items():
        lines += [f"## {title}\n", "| given | call | error |", "|---|---|---|"]
        for row in rows:
            lines.append(
                f"| {row.given} | `{row.call}` | `{row.error.__name__}: {row.message.replace('`', chr(39))}` |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE, file=sys.stderr)
