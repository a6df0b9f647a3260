"""Manifests, augmentation, data sets, batching."""
