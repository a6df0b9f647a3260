"""Trainer, schedules, checkpoints, metrics and PEFT presets."""
