"""`qscope demo`: the whole job on a small bundled model, from finding features to a table of what changed."""
