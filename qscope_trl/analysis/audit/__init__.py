"""`qscope audit`: whether the behaviour went away, or the features alone fell silent."""
