#!/usr/bin/env bash
# The native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the sources with a library
# of its own. Needs an installation of fpdarts with its tests (PYTHON names its interpreter) and g++ with the sanitizers'
# runtimes. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r CMakeLists.txt setup.py pyproject.toml fpdarts kernels tests "$copy"
cd "$copy"
cmake -G Ninja -S . -B build -DFPDARTS_SANITIZE=address,undefined -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/kernels/native"
cmake --build build
# Python itself and PyTorch keep memory to their end, and are not built with the sanitizers
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
"$python" -m pytest -q -p no:cacheprovider tests/test_native.py "$@"
