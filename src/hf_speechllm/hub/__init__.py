"""Publishing: export a model folder, check it in a clean process, render its card, upload it."""
