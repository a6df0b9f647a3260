"""Quality measures: word and character error rate."""
