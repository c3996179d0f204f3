#!/usr/bin/env bash
# Installs DeepSpeed and bitsandbytes for the CPU into an environment and runs the tests that are skipped without them.
# Usage: tests/engines.sh ENVIRONMENT
set -euo pipefail
cd "$(dirname "$0")/.."
# DeepSpeed compiles what it needs when it is first used; built ahead, it would look for a GPU's compiler.
export DS_ACCELERATOR=cpu DS_BUILD_OPS=0
"$1/bin/pip" install -q -c constraints.txt wheel setuptools py-cpuinfo hjson msgpack einops ninja
"$1/bin/pip" install -q -c constraints.txt --no-build-isolation --no-deps deepspeed bitsandbytes
"$1/bin/python" -m pytest -q -n auto tests/distributed/test_engines.py tests/training/test_quantised.py \
  tests/test_cli.py -k "zero or quantised or DeepSpeed"
