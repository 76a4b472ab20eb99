#!/usr/bin/env bash
# Everything that needs a card: build, tests over CUDA, compute-sanitizer on a small run, benchmark. No network, no
# packages beyond torch and pytest, under 9 minutes. PYTHON=... chooses the Python, it has to have torch with CUDA.
#
#   tools/gpu.sh [arguments of `python -m benchmarks run`]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=()

say() { printf '\n== %s\n' "$*"; }

if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "expected a Python with torch; $python has none. Set PYTHON." >&2
    exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "expected a CUDA device that torch can use; found none. Nothing was measured." >&2
    exit 3
fi
# Only the card at hand: one architecture builds in a third of the time of three.
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch
print("{}.{}+PTX".format(*torch.cuda.get_device_capability()))')}
export TORCH_CUDA_ARCH_LIST
"$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)'

say "build for $TORCH_CUDA_ARCH_LIST"
FASTCLIP_CUDA=1 FASTCLIP_REQUIRE_NATIVE=1 timeout 120 "$python" setup.py --quiet build_ext --inplace || exit 1

say "tests over cuda"
timeout 150 "$python" -m pytest tests --ignore=tests/trainers -m cuda -q || failed+=("tests")

say "compute-sanitizer"
sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null || true)
if [ -z "$sanitizer" ]; then
    echo "not found: left out"
else
    for tool in memcheck racecheck synccheck; do
        log=$(PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 30 "$sanitizer" --tool "$tool" --error-exitcode 9 \
            --kernel-name regex:clip_kernel "$python" -m benchmarks.gpu_small_run 2>&1)
        case $? in
            0) echo "$tool: clean" ;;
            9) echo "$tool: FAILED"; tail -n 30 <<<"$log"; failed+=("$tool") ;;
            *) echo "$tool: does not work on this machine, left out: $(grep -v '^$' <<<"$log" | tail -n 1)" ;;
        esac
    done
fi

say "benchmark"
timeout 170 "$python" -m benchmarks.gpu "$@" || failed+=("benchmark")

if [ ${#failed[@]} -gt 0 ]; then
    say "FAILED: ${failed[*]}"
    exit 1
fi
say "all passed"
