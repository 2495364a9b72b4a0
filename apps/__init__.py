"""The app: chat with a run's checkpoints and compare them. Run from a checkout: `rlhf-kit app`."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
