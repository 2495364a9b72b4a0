"""The random generators of this rank, saved and set back."""

from __future__ import annotations

import random
from typing import cast

import torch

from rlhf_kit.training_state import State


class Generators:
    """The random generators of this rank: Python's, NumPy's, torch's on the CPU and the GPU."""

    def state(self) -> State:
        import numpy as np

        _, numbers, gauss = random.getstate()
        _, keys, place, has_gauss, cached = cast(tuple, np.random.get_state(legacy=True))
        state = {
            "python": torch.tensor(numbers),
            "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
            "numpy": torch.tensor(keys.astype("int64")),
            "numpy_rest": torch.tensor([place, has_gauss, cached], dtype=torch.float64),
            "torch": torch.get_rng_state(),
        }
        return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})

    def load_state(self, state: State) -> None:
        """On another number of ranks the generators stay as they are seeded."""
        import numpy as np

        if state["torch"] is None:
            return
        gauss = state["python_gauss"].tolist()
        random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
        place, has_gauss, cached = state["numpy_rest"].tolist()
        keys = state["numpy"].numpy().astype("uint32")
        np.random.set_state(("MT19937", keys, int(place), int(has_gauss), cached))
        torch.set_rng_state(state["torch"])
        if state.get("cuda") is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
