"""Curation of datasets by the features of their rows."""
