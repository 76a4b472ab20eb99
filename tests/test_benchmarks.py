"""The benchmark harness: case data, statistics, what it refuses, its report, comparison, and the figures in docs."""

import copy
import html
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from support import ROOT

import fastclip
from benchmarks import (
    cases,
    ceilings,
    clocks,
    compare,
    docs_figures,
    limits,
    machine,
    measure,
    models,
    results,
    rivals,
    run,
    stats,
    table,
)
from benchmarks.__main__ import main
from benchmarks.cases import BOTH, CLIPPED, NONFINITE, UNCLIPPED, Case
from benchmarks.gradients import Gradients, WrongResult

needs_native = pytest.mark.skipif(not fastclip.build_info()["native"], reason="the harness measures the extension")

# ---- case data -----------------------------------------------------------------------------------------------------

# Tensors and parameters as published: model cards, papers, torchvision's and transformers' documentation.
PUBLISHED = [
    (models.resnet50, 161, 25_557_032),
    (models.bert_base, 199, 109_482_240),
    (models.gpt2_small, 148, 124_439_808),
    (models.gpt2_xl, 580, 1_557_611_200),
    (models.distil_gpt2, 76, 81_912_576),
    (models.vit_large, 296, 304_326_632),
    (models.llama3_8b, 291, 8_030_261_248),
    (models.olmoe, 3219, 6_919_161_856),
    (models.actor_critic, 12, 9_155),
    (models.nature_dqn, 10, 1_686_180),
]


@pytest.mark.parametrize("shapes, tensors, parameters", PUBLISHED, ids=lambda x: getattr(x, "__name__", ""))
def test_parameters_as_published(shapes, tensors, parameters):
    assert (len(shapes()), models.elements(shapes())) == (tensors, parameters)


@pytest.mark.parametrize("shapes, ranks", [(models.llama3_8b, 8), (models.olmoe, 64)])
def test_shards_are_equal_parts(shapes, ranks):
    assert models.elements(models.shard(shapes(), ranks)) * ranks == models.elements(shapes())


def test_a_shard_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="ranks: expected a divisor"):
        models.shard([(10, 3)], 4)


def test_the_models_that_are_trained_have_these_shapes():
    from benchmarks import training

    with torch.device("meta"):
        made = [training.GPT2(), training.LSTMTextModel(), training.ResNet50()]
    for model, shapes in zip(made, (models.gpt2_small(), models.lstm_text_model(), models.resnet50()), strict=True):
        have = sorted(sorted(p.shape) for p in model.parameters())
        want = sorted(sorted(shape) for shape in shapes)
        assert have == want, type(model).__name__


def test_cases():
    all_cases = cases.cases(threads=6)
    names = [(case.part, case.name) for case in all_cases]
    assert len(names) == len(set(names))
    assert {case.part for case in all_cases} == set(run.CASE_PARTS)
    assert {case.dtype for case in all_cases} == {"fp32", "bf16", "fp16", "mixed"}
    assert {case.norm_type for case in all_cases} == {1.0, 2.0, float("inf")}
    assert {mode for case in all_cases for mode in case.modes} == {UNCLIPPED, CLIPPED, NONFINITE}
    tensors = [len(case.shapes) for case in all_cases if case.part == "tensors"]
    assert (min(tensors), max(tensors)) == (1, 100_000)
    sizes = {case.name: case.bytes for case in all_cases if case.part == "bytes"}
    assert sizes["1 KB, fp32"] == 1024 and sizes["16 GB, fp32"] == 16 << 30
    assert sorted({case.threads for case in all_cases if case.threads}) == [1, 2, 4, 6]


def test_mixed_dtypes():
    case = Case("models", "x", [(4, 4), (4,)], "mixed")
    assert [case.dtype_of(shape) for shape in case.shapes] == [torch.bfloat16, torch.float32]
    assert case.bytes == 16 * 2 + 4 * 4


def test_what_memory_has_no_room_for_is_left_out_by_name(monkeypatch):
    case = Case("bytes", "5 GB", [(5 << 28,)], "fp32")
    monkeypatch.setattr(machine, "memory", lambda: 8 << 30)
    fitting, left_out = run.fit(case, "cpu", quick=False)
    assert fitting.modes == (UNCLIPPED,)
    assert len(left_out) == 1 and left_out[0].startswith("5 GB, clipped: needs 10.7 GB")
    assert run.fit(case, "cpu", quick=True)[0].modes == ()


# ---- gradients and their check -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*BOTH, NONFINITE])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "mixed"])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_right_calls_pass_the_check(mode, dtype, norm_type):
    gradients = Gradients(Case("models", "x", [(33, 5), (7,), (1000,)], dtype, norm_type=norm_type))
    gradients.set_mode(mode)
    for name, clip in (("torch", torch.nn.utils.clip_grad_norm_), ("fastclip", fastclip.clip_grad_norm_)):
        for _ in range(2):
            gradients.restore()
            norm = clip(gradients.parameters, gradients.max_norm, norm_type)
            exact = name == "fastclip" and fastclip.build_info()["native"]
            gradients.check(name, norm, exact)
            gradients.check_whole(name, norm, exact)


WRONG = {
    "does nothing": lambda ps, m: torch.nn.utils.get_total_norm([p.grad for p in ps]),
    "norm too small": lambda ps, m: torch.nn.utils.clip_grad_norm_(ps, m) * 0.9,
    "forgets the last": lambda ps, m: (torch.nn.utils.clip_grad_norm_(ps, m), ps[-1].grad.mul_(10))[0],
    "makes a NaN": lambda ps, m: (torch.nn.utils.clip_grad_norm_(ps, m), ps[0].grad.fill_(float("nan")))[0],
    "off by a thousandth": lambda ps, m: (torch.nn.utils.clip_grad_norm_(ps, m), ps[0].grad.mul_(1.001))[0],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls_do_not(wrong):
    gradients = Gradients(Case("models", "x", [(33, 5), (7,), (1000,)], "fp32"))
    gradients.set_mode(CLIPPED)
    for check in (gradients.check, gradients.check_whole):
        gradients.restore()
        norm = WRONG[wrong](gradients.parameters, gradients.max_norm)
        with pytest.raises(WrongResult, match="x, clipped: somebody"):
            check("somebody", norm, exact=True)


def test_unclipped_gradients_must_stay_as_they_are():
    gradients = Gradients(Case("models", "x", [(1000,)], "fp32"))
    gradients.set_mode(UNCLIPPED)
    norm = fastclip.clip_grad_norm_(gradients.parameters, gradients.max_norm)
    gradients.grads[0].mul_(1 + 1e-6)
    with pytest.raises(WrongResult):
        gradients.check("somebody", norm, exact=True)


def test_gradients_have_version_counters_of_their_own():
    gradients = Gradients(Case("models", "x", [(5,), (3, 2)], "bf16"))
    assert [grad.shape for grad in gradients.grads] == [(5,), (3, 2)]
    gradients.grads[0].mul_(2)
    assert gradients.grads[1]._version < gradients.grads[0]._version
    assert all(grad.data_ptr() % 64 == gradients.grads[0].data_ptr() % 64 for grad in gradients.grads)


# ---- timing and statistics -----------------------------------------------------------------------------------------


def test_contestants_alternate_and_preparation_is_not_timed():
    log = []

    def contestant(name):
        def prepare():
            log.append(f"prepare {name}")
            time.sleep(0.02)

        return measure.Contestant(lambda: log.append(name), prepare, lambda _: log.append(f"check {name}"))

    times = measure.paired({"a": contestant("a"), "b": contestant("b")}, 0.0, max_rounds=3, calls=2)
    calls = [entry for entry in log if len(entry) == 1]
    assert calls == [*"aabb", *"bbaa", *"aabb", *"bbaa"]
    assert log[:5] == ["prepare a", "a", "prepare a", "a", "check a"]
    assert [len(samples) for samples in times.samples.values()] == [3, 3]  # the first round is for warm-up
    assert times.median("a") < 0.02


def test_ratio_is_the_median_of_the_rounds_ratios():
    # A machine that is ten times slower in one round: the ratio of medians would be off.
    ratio = stats.ratio([2.0, 20.0, 6.0], [1.0, 10.0, 3.0])
    assert ratio["median"] == 2.0 and ratio["interval"] == [2.0, 2.0]


@pytest.mark.parametrize("count", [2, 5, 30, 200])
def test_interval_is_the_same_every_time_and_holds_the_median(count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(count)).tolist()
    low, high = stats.interval(values)
    assert min(values) <= low <= stats.median(values) <= high <= max(values)
    assert stats.interval(values) == [low, high]


def test_interval_covers():
    """Of 100 samples with a known median about 95% have it inside their interval."""
    generator = torch.Generator().manual_seed(0)
    intervals = [stats.interval(torch.randn(60, generator=generator).tolist()) for _ in range(100)]
    inside = sum(low <= 0 <= high for low, high in intervals)
    assert 85 <= inside <= 99


def test_interval_is_wider_where_rounds_resemble_their_neighbours():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(10, generator=generator).repeat_interleave(20).tolist()
    shuffled = [steps[i] for i in torch.randperm(200, generator=generator).tolist()]
    width, independent = (high - low for low, high in map(stats.interval, (steps, shuffled)))
    assert width > 1.5 * independent


# ---- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def no_compiler():
    """Compiling ceilings.cpp takes half a minute; `make bench ARGS=--quick` does that. Here torch's reads will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "native", lambda: "left out by the tests")
        yield


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory, no_compiler):
    """A real run of two small cases."""
    folder = tmp_path_factory.mktemp("run")
    arguments = [
        "run",
        "--quick",
        "--part",
        "models",
        "--case",
        "RL",
        "--threads",
        "2",
        "--output",
        str(folder / "new"),
    ]
    assert main(arguments) == 0
    return folder


@needs_native
def test_run_writes_json_and_markdown(quick_run):
    report = results.load(quick_run / "new.json")
    assert {row["case"] for row in report["results"]} == {"RL policy, fp32", "RL actor and critic, fp32"}
    for row in report["results"]:
        assert row["bytes"] == 4 * row["elements"] and row["calls_a_sample"] == 20
        assert set(row["samples_us"]) >= {"torch", "fastclip", "torch for-loop", "list", "ceiling"}
        assert all(len(samples) == row["rounds"] for samples in row["samples_us"].values())
        assert row["norm_error"]["fastclip"] <= 1e-6
    assert "ceilings in C++: left out by the tests" in report["left_out"]
    assert report["machine"]["threads"] == 2 and report["fastclip"]["native"]
    absent = {name.split(",")[0] for name in report["absent"]}
    assert {"apex", "TransformerEngine"} <= absent or rivals.optional_module("apex")
    assert "| RL policy, fp32" in (quick_run / "new.md").read_text()


@needs_native
def test_another_part_can_be_merged(quick_run):
    arguments = ["run", "--quick", "--part", "accuracy", "--merge", "--output", str(quick_run / "new")]
    assert main(arguments) == 0
    report = results.load(quick_run / "new.json")
    assert {row["part"] for row in report["results"]} == {"models", "accuracy"}
    assert set(report["seconds"]) == {"models", "accuracy"}


@needs_native
def test_a_wrong_result_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        fastclip, "clip_grad_norm_", lambda ps, m, n: torch.nn.utils.get_total_norm([p.grad for p in ps])
    )
    arguments = ["run", "--quick", "--part", "models", "--case", "RL policy", "--output", str(tmp_path / "x")]
    assert main(arguments) == run.WRONG
    assert "RL policy, fp32, clipped: fastclip" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_native
def test_a_torch_that_is_wrong_is_timed_and_said_to_be(monkeypatch):
    right = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **options: right(*args, **options) * 2)
    case = Case("models", "x", [(33, 5), (7,)], "fp32", rivals=True)
    gradients = Gradients(case)
    row, absent = measure.run_mode(case, gradients, CLIPPED, clocks.CpuClock(), measure.Effort(quick=True))
    assert {"torch", "fastclip"} <= set(row["samples_us"]) and "torch for-loop" not in row["samples_us"]
    assert all(absent[name].startswith("wrong result: x, clipped") for name in ("torch", "torch for-loop"))
    assert table.case_row(row)[-1].startswith("wrong / ")


@needs_native
def test_strict_refuses_a_busy_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "who_is_there", lambda: {"others_cores": 1.5, "steal": 0.0})
    arguments = ["run", "--quick", "--part", "accuracy", "--output", str(tmp_path / "x")]
    assert main([*arguments, "--strict"]) == run.REFUSED
    assert "others use 1.5 cores" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main(arguments) == 0
    assert "The machine is busy (others use 1.5 cores" in capsys.readouterr().err


@needs_native
def test_strict_measures_again_and_then_refuses(monkeypatch):
    tries = []

    def rows(_):
        tries.append(1)
        yield {
            "part": "models",
            "case": "x",
            "mode": CLIPPED,
            "contention": {"others_cores": calm[len(tries)], "steal": 0},
        }

    step = [run.Step("models", "x", rows)]
    monkeypatch.setattr(machine, "who_is_there", lambda: {"others_cores": 0.0, "steal": 0.0})
    monkeypatch.setattr("benchmarks.display.Plain.finish", lambda *_: None)
    calm = {1: 1.0, 2: 0.0}
    report = run.run(step, [], "cpu", measure.Effort(), 2, strict=True)
    assert len(tries) == 2 and [row["disturbed"] for row in report["results"]] == [False]
    tries.clear()
    calm = dict.fromkeys(range(1, 10), 1.0)
    with pytest.raises(run.Disturbed, match=r"x, clipped: others use 1\.0 cores"):
        run.run(step, [], "cpu", measure.Effort(), 2, strict=True)
    assert len(tries) == run.STRICT_TRIES
    tries.clear()
    assert run.run(step, [], "cpu", measure.Effort(), 2)["results"][0]["disturbed"] and len(tries) == 1


def test_contention_is_the_work_of_others(monkeypatch):
    """In two seconds all cores worked for 3, this process for 1, and the hypervisor took 0.5."""
    tick = os.sysconf("SC_CLK_TCK")
    moments = iter([(0.0, 10.0, 5.0, 1.0), (2.0, 13.0, 6.0, 1.5)])
    now = []

    def stat(_):
        _, work, _, steal = now[0]
        # user nice system idle iowait irq softirq steal: idle and iowait are nobody's work
        return f"cpu {work / 2 * tick:.0f} 0 {work / 2 * tick:.0f} 900 900 0 0 {steal * tick:.0f} 0 0\ncpu0 0 0 0"

    monkeypatch.setattr(machine, "read", stat)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0][0])
    monkeypatch.setattr(machine.time, "process_time", lambda: now[0][2])
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    now.append(next(moments))
    contention = machine.Contention()
    now[0] = next(moments)
    found = contention.so_far()
    assert found == {"others_cores": 1.0, "steal": 0.125} and machine.disturbed(found)
    assert not machine.disturbed({"others_cores": 0.05, "steal": 0.01})


@needs_native
def test_no_gpu_time_without_a_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.is_a_card", lambda: False)
    assert main(["--device", "cuda", "--output", str(tmp_path / "x")]) == run.REFUSED
    captured = capsys.readouterr()
    assert "expected a real CUDA device" in captured.err and not captured.out and not list(tmp_path.iterdir())


@needs_native
def test_budget_names_what_it_does_not_reach():
    steps, _ = run.plan(["models"], "RL", "cpu", measure.Effort(quick=True), 2)
    report = run.run(steps, [], "cpu", measure.Effort(quick=True), 2, budget=-1)
    assert not report["results"] and sum("--budget" in line for line in report["left_out"]) == 2


def test_parts_run_in_the_order_of_their_list():
    steps, _ = run.plan(["optim", "models"], "", "cpu", measure.Effort(quick=True), 1)
    assert [step.part for step in steps] == ["optim", *["models"] * (len(steps) - 1)]


def test_list(capsys):
    assert main(["--list", "--part", "models", "--part", "threads", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "GPT-2 XL, bf16" in out and "threads:\n  GPT-2 small, fp32, 1 thread\n" in out


@pytest.mark.parametrize(
    "arguments", [["--threads", "0"], ["--part", "nothing"], ["--device", "tpu"], ["--effort", "nan"]]
)
def test_arguments_that_are_wrong(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@needs_native
def test_a_part_that_a_gpu_has_not(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.is_a_card", lambda: True)
    assert main(["--device", "cuda", "--part", "limits"]) == run.NO_CASE
    assert "--part: expected one of models" in capsys.readouterr().err


@needs_native
def test_a_case_that_does_not_exist(capsys):
    assert main(["--case", "no such case"]) == run.NO_CASE
    assert "'no such case'" in capsys.readouterr().err


@needs_native
def test_spinners_spin_only_when_they_should():
    with limits.Spinners() as spinners:
        pids = [process.pid for process in spinners.processes]
        states = [state_of(pid) for pid in pids]
        spinners.set(True)
        running = [state_of(pid) for pid in pids]
    assert states == ["T"] * len(pids) and all(state != "T" for state in running)
    assert all(process.poll() is not None for process in spinners.processes)


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


# ---- comparison ----------------------------------------------------------------------------------------------------


def slowed(report, factor, case=None):
    """The report of a fastclip that takes `factor` times as long."""
    report = copy.deepcopy(report)
    for row in report["results"]:
        if "speedup" in row and case in (None, row["case"]):
            for key in ("median", "quartiles", "interval"):
                for figure, by in (("speedup", 1 / factor), ("ours_us", factor)):
                    value = row[figure][key]
                    row[figure][key] = [v * by for v in value] if isinstance(value, list) else value * by
    return report


@pytest.fixture
def fixture_report():
    return results.load(ROOT / "tests" / "data" / "benchmark.json")


@pytest.fixture
def files(tmp_path, fixture_report):
    def write(name, report):
        results.save(report, tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("options", [[], ["--absolute"]])
def test_compare_exits_1_only_when_a_case_got_slower(files, fixture_report, capsys, options):
    old = files("old.json", fixture_report)
    case = fixture_report["results"][0]["case"]
    for report, code, said in [
        (fixture_report, 0, "None of"),
        (slowed(fixture_report, 0.3), 0, "faster"),
        (slowed(fixture_report, 1.001), 0, "within noise"),
        (slowed(fixture_report, 3.0, case), 1, "slower"),
    ]:
        assert main(["compare", old, files("new.json", report), *options]) == code
        assert said in capsys.readouterr().out


def test_compare_names_what_was_disturbed(files, fixture_report, capsys):
    slow = slowed(fixture_report, 3.0)
    for row in slow["results"]:
        row["disturbed"] = row["case"] == "LSTM text model, fp32"
    for row in fixture_report["results"]:
        row["disturbed"] = False
    assert main(["compare", files("old.json", fixture_report), files("new.json", slow)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "measure them again: LSTM text model, fp32, unclipped" in last and "RL policy" not in last


def test_compare_takes_a_slow_machine_for_what_it_is(fixture_report):
    slow = copy.deepcopy(fixture_report)
    for row in slow["results"]:
        if "ours_us" not in row:
            continue
        row["ours_us"] = {k: [v * 5 for v in x] if isinstance(x, list) else x * 5 for k, x in row["ours_us"].items()}
    assert {change.verdict for change in compare.compare(fixture_report, slow)[0]} == {"within noise"}
    assert "slower" in {change.verdict for change in compare.compare(fixture_report, slow, absolute=True)[0]}


def test_compare_says_what_differs(fixture_report):
    other = copy.deepcopy(fixture_report)
    other["machine"]["processor"] = "another"
    gone = other["results"].pop(0)
    notes = compare.compare(fixture_report, other)[1]
    assert any("processor differs" in note for note in notes)
    assert any("only in the old run" in note and gone["case"] in note for note in notes)


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"format": 1}'])
def test_files_that_are_no_results(tmp_path, files, fixture_report, capsys, text):
    (tmp_path / "bad.json").write_text(text)
    good = files("good.json", fixture_report)
    assert main(["compare", good, str(tmp_path / "bad.json")]) == 2
    assert "bad.json: expected" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "missing.json"), "-o", str(tmp_path / "x.html")]) == 2
    assert "missing.json" in capsys.readouterr().err and not (tmp_path / "x.html").exists()


# ---- report --------------------------------------------------------------------------------------------------------


def test_report_of_two_runs(files, fixture_report, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    a, b = files("before.json", fixture_report), files("after.json", slowed(fixture_report, 1.5))
    page = tmp_path / "report.html"
    assert main(["report", a, b, "-o", str(page)]) == 0
    text = page.read_text()
    for row in fixture_report["results"]:
        assert html.escape(row["case"], quote=False).replace("'", "&#39;") in text
    assert "before: unclipped" in text and "after: unclipped" in text
    assert text.count("<svg") >= 5 and "prefers-color-scheme: dark" in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text  # nothing from elsewhere
    for stand_in in ("#010203", "#0a0b0c"):
        assert stand_in not in text


def test_report_without_matplotlib_names_the_extra(files, fixture_report, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("report", "plots"):
        monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
        monkeypatch.delattr(f"benchmarks.{name}", raising=False)
    assert main(["report", files("a.json", fixture_report)]) == 2
    assert "fastclip[bench]" in capsys.readouterr().err


def test_html_is_escaped(fixture_report):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    from benchmarks.report import page

    fixture_report |= {"left_out": ["<script>alert(1)</script>"], "results": []}
    assert "<script>" not in page([("<b>", fixture_report)])


def test_saved_samples_stand_on_one_line(tmp_path):
    results.save({"results": [{"a": [1.5, -2, 3e-7], "b": []}]}, tmp_path / "x.json")
    text = (tmp_path / "x.json").read_text()
    assert "[1.5, -2, 3e-07]" in text
    assert json.loads(text)["results"] == [{"a": [1.5, -2, 3e-7], "b": []}]


def test_tables_have_as_many_cells_as_heads(fixture_report):
    made = table.tables(fixture_report)
    assert made
    for one in made:
        assert {len(row) for row in one.rows} == {len(one.head)}, one.title


# ---- the figures in README and docs --------------------------------------------------------------------------------


def test_docs_figures_are_up_to_date(capsys):
    assert docs_figures.main(["--check"]) == 0, capsys.readouterr().out


def test_docs_figures_check_writes_nothing(tmp_path, monkeypatch, fixture_report):
    pytest.importorskip("matplotlib")
    results.save(fixture_report, tmp_path / "cpu.json")
    page, typed = tmp_path / "README.md", "<!-- fig: machine | cores -->1000<!-- end -->"
    page.write_text(typed)
    for name, value in {"ROOT": tmp_path, "RESULTS": tmp_path, "CHARTS": tmp_path / "figures"}.items():
        monkeypatch.setattr(docs_figures, name, value)
    monkeypatch.setattr(docs_figures, "pages", lambda: [page])
    assert docs_figures.main(["--check"]) == 1
    assert page.read_text() == typed and not (tmp_path / "figures").exists()
    assert docs_figures.main([]) == 0 and "1000" not in page.read_text()
    assert docs_figures.main(["--check"]) == 0
    chart = tmp_path / "figures" / "tensors.svg"
    chart.write_text(chart.read_text().replace("<!-- ", "<!-- 0", 1))
    assert docs_figures.main(["--check"]) == 1


def test_docs_figures_notice_a_typed_figure(fixture_report):
    figures = docs_figures.Figures(fixture_report, None)
    case = fixture_report["results"][0]["case"]
    text = f"about <!-- fig: speedup | {case} | unclipped -->9000<!-- end --> times,\n\n"
    text += "<!-- fig: not_faster -->\n<!-- end -->\n"
    filled = docs_figures.fill(text, figures)
    assert "9000" not in filled and docs_figures.fill(filled, figures) == filled
    assert f"-->{fixture_report['results'][0]['speedup']['median']:.1f}<!-- end --> times" in filled


@pytest.mark.parametrize("marker", ["no_such_figure", "speedup | no such case | unclipped", "_row | a | b"])
def test_a_marker_that_names_nothing_is_an_error(fixture_report, marker):
    with pytest.raises(LookupError):
        docs_figures.Figures(fixture_report, None).text(marker)
