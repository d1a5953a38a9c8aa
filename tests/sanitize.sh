#!/usr/bin/env bash
# The native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a library built for it and put in
# place of the installed one meanwhile. Needs g++ with the sanitizers' runtimes. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
library=kernels/native/libfpdarts_kernels.so
build=$(mktemp -d)
cp "$library" "$build/installed.so"
trap 'cp "$build/installed.so" "$library"; rm -rf "$build"' EXIT
cmake -G Ninja -S . -B "$build" -DFPDARTS_SANITIZE=address,undefined -DCMAKE_CXX_FLAGS_RELEASE=-O1 \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/kernels/native"
cmake --build "$build"
# Python itself and PyTorch keep memory to their end, and are not built with the sanitizers
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
"${PYTHON:-python}" -m pytest -q -p no:cacheprovider tests/test_native.py "$@"
