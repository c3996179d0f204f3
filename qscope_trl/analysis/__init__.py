"""Uses of features on data: finding them, checking SAEs, curating sets."""
