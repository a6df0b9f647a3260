"""Readers of untrusted packs of other toolkits, and builders of what they turn into."""
