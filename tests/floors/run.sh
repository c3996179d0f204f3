#!/usr/bin/env bash
# Tests the older ends of the version ranges: for each constraints file here, an environment of its own that runs the
# equality table and the attachment tests. Usage: tests/floors/run.sh ENVIRONMENT_WITH_TORCH [NAME ...]
# Torch and whatever else a file does not name is shared from the given environment, to save its download.
set -euo pipefail
cd "$(dirname "$0")/../.."
shared=$1
shift
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(oldest middle)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for name in "${names[@]}"; do
  printf '\n-- %s\n' "$name"
  python3 -m venv "$work/$name"
  site=$("$work/$name/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
  "$shared/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" >"$site/shared.pth"
  "$work/$name/bin/pip" install -q -r "tests/floors/$name.txt"
  "$work/$name/bin/python" -c "import transformers, trl, torch; print(transformers.__version__, trl.__version__, torch.__version__)"
  # What lies between runs the equality table; the oldest, which has the most differences, also whatever else joins a
  # trainer. Adapters, architectures and refusals are the same code on every version.
  tests=(equality equality_grpo)
  [ "$name" != oldest ] || tests+=(equality_trainers attach callback masks grpo rewards rollouts scores)
  paths=(tests/hooks)
  for test in "${tests[@]}"; do paths+=("tests/training/test_$test.py"); done
  "$work/$name/bin/python" -m pytest -q -n auto -p no:cacheprovider \
    -m "not slow and not pinned and not distributed" "${paths[@]}"
done
