"""`qscope plan`: the GPU memory of a training run, computed before anything is downloaded."""
