"""The app: chat with a run's checkpoints and compare them. Run from a checkout: `rlhf-kit app`."""
