"""The mixture-of-experts layer. Knows nothing of models, data, tasks or tracking."""
