#!/usr/bin/env bash
# Builds the CPU part with sanitizers and runs tests under them: tools/sanitize.sh PYTHON [--program | --quick]
#
# address   AddressSanitizer and UndefinedBehaviorSanitizer: the extension, under the Python tests and random lists
# thread    ThreadSanitizer: the backend in a C++ program of its own. Python's torch brings an OpenMP runtime that the
#           sanitizer cannot see into: each of its barriers would be reported as a race, and hide the real ones.
#
# --program  only the C++ program, which needs no torch: one minute
# --quick    the extension with fewer tests
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
what=${2:-}
tests=(tests/test_{clip,norm,value,groups,adaptive,policies,nonfinite,statistics,errors,hazards,semantics,properties,threads,fallback,optim,table}.py)
lists=3000
if [ "$what" = --quick ]; then
    tests=(tests/test_{clip,value,errors,hazards,statistics}.py)
    lists=1000
fi
undefined="-fsanitize=undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"

for sanitizer in "thread" "address $undefined"; do
    program=build/sanitize/threads-${sanitizer%% *}
    mkdir -p build/sanitize
    # shellcheck disable=SC2086
    g++ -std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=$sanitizer -Itests/cpp/threads -Icsrc \
        tests/cpp/test_threads.cpp csrc/tensor_table.cpp csrc/cpu/{clip_cpu,dispatch,shares}.cpp csrc/cpu/kernels_*.cpp -pthread -o "$program"
    echo "$program"
    "$program"
done

[ "$what" = --program ] && exit

# The extension, in a copy of the tree: the one in use stays as it is.
copy=build/sanitize/address
mkdir -p "$copy"
cp -ru csrc fastclip tests setup.py pyproject.toml README.md docs examples tools benchmarks "$copy"
rm -f "$copy"/fastclip/_C*.so
cd "$copy"
export CFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address $undefined" LDFLAGS="-fsanitize=address,undefined"
FASTCLIP_CUDA=0 FASTCLIP_REQUIRE_NATIVE=1 "$python" setup.py --quiet build_ext --inplace >build.log 2>&1 || {
    cat build.log
    exit 1
}
unset CFLAGS LDFLAGS

# libstdc++ too, or the sanitizer does not find __cxa_throw. Python frees little at its end: no leak check. An
# allocation that fails is an exception, and a signal ends the process, as without the sanitizer: tests count on both.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_segv=0
export LD_PRELOAD ASAN_OPTIONS UBSAN_OPTIONS=print_stacktrace=1 OMP_WAIT_POLICY=passive PYTHONPATH=.
"$python" -m pytest -q -p no:cacheprovider "${tests[@]}" --deselect tests/test_threads.py::test_memory
"$python" tests/fuzz --lists "$lists"
