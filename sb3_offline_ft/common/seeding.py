"""Seeds for generators of our own, so that other users of the global ones do not change the data we draw."""

import numpy as np


def derive_seed(seed: int | None, stream: int) -> int:
    """
    Derive the seed of one random stream from the seed of the whole learner.

    :param seed: Seed of the learner; if None, fresh entropy from the operating system
        (NumPy's global generator is left alone: SB3 draws its batches from it)
    :param stream: Number of the stream
    :return: A seed below 2**32
    """
    entropy = None if seed is None else [seed, stream]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
