"""Texts for features that a dataset does not cover: measured, generated, verified by encoding them."""
