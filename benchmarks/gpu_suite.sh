#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the CUDA kernels, runs the tests that need a GPU, looks for invalid
# accesses and races, measures the encoder against the bare product, torch and other packages, its parts, and a training
# step. Results go to benchmarks/results (JSON and tables, with hardware, versions and commit). Under 8 minutes on one
# GPU. A step that fails does not stop the others; the exit status says whether one did.
#
#   benchmarks/gpu_suite.sh [OUTPUT]        PYTHON=... to choose the interpreter
#
# Needs torch with CUDA, nvcc, pytest and, for the last step, trl, datasets and greenlet. Other packages are measured
# where they are installed: pip install eai-sparsify sae-lens
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
output=${1:-benchmarks/results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
failed=()
step() {
  local name=$1
  shift
  printf '\n== %s (%ss)\n' "$name" "$SECONDS"
  "$@" || failed+=("$name")
}

step "a GPU" "$python" -c "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'; print(torch.cuda.get_device_name(), torch.__version__)"
if [ ${#failed[@]} -gt 0 ]; then exit 1; fi
step "build" "$python" -m qscope_trl build cuda --force
step "tests" timeout 120 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/ops
if command -v compute-sanitizer >/dev/null; then
  few="exact_top_k or duplicates or sorted_features or chosen_features or sparse_matrix"
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool" timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$python" -m pytest -q -x -m gpu -p no:cacheprovider tests/ops/test_topk_encode.py tests/ops/test_feature_rank.py \
      tests/ops/test_sparse.py -k "($few) and not torch-"
  done
else
  echo "compute-sanitizer is not on the path: not run"
fi
step "encoder" timeout 150 "$python" benchmarks/encoder.py --device cuda --rounds 15 --output "$output"
step "parts of the encoder" timeout 60 "$python" benchmarks/encoder_parts.py --device cuda --output "$output"
if "$python" -c "import trl, datasets, greenlet" 2>/dev/null; then
  step "training step" timeout 90 "$python" benchmarks/step_overhead.py --device cuda --rounds 20 --memory-runs 1 --output "$output"
else
  echo "trl, datasets or greenlet is not installed: the training step is not measured"
fi
printf '\n== done (%ss)\n' "$SECONDS"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
