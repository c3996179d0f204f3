"""`qscope doctor`: whether SAEs fit a model, measured on the user's texts."""
