"""What docs/reliability.md says of security: nothing is unpickled, no program is started, no connection is opened."""

import ast

import pytest
import torch
from support import ROOT, run_python

import fastclip

# Modules that unpickle, start programs or open connections, and functions that run what they are given.
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "subprocess", "pty", "socket", "urllib", "http", "requests"}
# The compiler is what `python -m fastclip build` is for. Importing these starts nothing: see AUDITED.
MAY_START_PROGRAMS = {"_build.py", "__main__.py"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "system", "popen", "load_module", "unsafe_load"}


def test_no_module_of_the_package_can_unpickle_or_start_a_program():
    found = []
    for path in sorted((ROOT / "fastclip").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names if alias.name != "torch.distributed"]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            allowed = {"subprocess"} if path.name in MAY_START_PROGRAMS else set()
            bad = FORBIDDEN_MODULES & set(names) - allowed
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                is_torch_load = ast.unparse(node.func) in ("torch.load", "torch.hub.load", "torch.jit.load")
                is_re = ast.unparse(node.func) == "re.compile"
                has_shell = any(keyword.arg == "shell" for keyword in node.keywords)
                bad = {name} & FORBIDDEN_CALLS if not is_re else set()
                bad |= ({"torch.load"} if is_torch_load else set()) | ({"shell"} if has_shell else set())
            found += [f"{path.name}:{node.lineno} {name}" for name in bad]
    assert found == []


AUDITED = """
import os, sys
import torch, torch._dynamo, jinja2
seen, watched = set(), {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.fork",
           "os.posix_spawn", "socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request"}
sys.addaudithook(lambda event, args: seen.add(event) if event in watched else None)

import fastclip
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
monitor = fastclip.GradientMonitor(model, path=sys.argv[1])
optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 1.0, monitor=monitor)
for _ in range(5):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
monitor.save(sys.argv[2])
loaded = fastclip.GradientMonitor.load(sys.argv[2])
loaded.diagnose()
loaded.report(sys.argv[3])
assert seen == set(), seen
os.system("true")
assert seen == {"os.system"}, seen
print("finished")
"""


def test_recording_loading_and_reporting_start_nothing(tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    done = run_python(AUDITED, tmp_path / "a.log", tmp_path / "b.log", tmp_path / "page.html")
    assert done.stdout == "finished\n", done.stderr


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_a_pickle_is_no_monitors_file(tmp_path):
    torch.save(Malicious(), tmp_path / "new.log")
    torch.save(Malicious(), tmp_path / "old.log", _use_new_zipfile_serialization=False)
    for name in ("new.log", "old.log"):
        with pytest.raises(ValueError, match="path: expected a monitor's file, got"):
            fastclip.GradientMonitor.load(tmp_path / name)


def test_names_of_layers_are_text_in_a_page(tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    name = "<script>alert(1)</script>"
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 1)})
    monitor = fastclip.GradientMonitor(model)
    for _ in range(3):
        model[name](torch.randn(2, 3)).sum().backward()
        monitor.clip_grad_norm_(1.0)
    monitor.report(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert name not in page and "&lt;script&gt;alert(1)" in page
