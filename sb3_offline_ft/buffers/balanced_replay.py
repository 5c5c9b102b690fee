"""Balanced replay: offline rows are drawn the more often, the more they resemble what is gathered online."""

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn
from torch.nn import functional as F

from sb3_offline_ft.buffers.sampling import SourceShares, SumTree
from sb3_offline_ft.buffers.transitions import OfflineTransitions, OnlineTransitions, Transitions
from sb3_offline_ft.common.checks import known_keywords, whole_number
from sb3_offline_ft.common.observations import Observations, by_key, kind_of, mean_and_std
from sb3_offline_ft.datasets.spaces import flatten_rows

Array = npt.NDArray[Any]

OFFLINE_SAMPLING = ("uniform", "balanced")
PRIORITY_BOUNDS = (1e-3, 1e3)
STD_OFFSET = 1e-3
DRAWS_KEPT = 1000
"""Where nobody asks for updates, what has been drawn must not fill the memory."""


class BalancedReplay:
    """
    Priorities of offline rows from an estimate of how much likelier a row is online than offline (Lee et al. 2021,
    arXiv 2107.00591).

    A network w(s, a) > 0 maximises ``E_online[log(2w / (1 + w))] - E_offline[log((1 + w) / 2)]``, a lower bound of the
    Jensen-Shannon divergence between online and offline rows (times 2) that is tight at the ratio of their densities. A row's
    priority is ``w^(1/T)`` divided by its mean over offline rows, clipped to [0.001, 1000]; it is 1 until the row has been
    drawn.

    The network's last layer gives log w, so that w is positive and the bound cannot overflow; the authors' code takes a
    ReLU. Inputs are observations standardised by the dataset's statistics, and scaled actions.

    :param observation_space: Observation space; images are not supported
    :param temperature: T; larger values bring the draws nearer to uniform ones
    :param learning_rate: Learning rate of Adam
    :param batch_size: Number of online and of offline rows in a step
    :param net_arch: Sizes of the hidden layers
    :param device: PyTorch device
    :raises ValueError: A parameter is out of range, or the space has images
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        temperature: float = 5.0,
        learning_rate: float = 3e-4,
        batch_size: int = 256,
        net_arch: Sequence[int] = (256, 256),
        device: th.device | str = "cpu",
    ) -> None:
        for name, value in (("temperature", temperature), ("learning_rate", learning_rate)):
            if not isinstance(value, Real) or not 0 < value < math.inf:
                raise ValueError(f"`{name}` of balanced replay must be positive, found {value!r}.")
        self._spaces = by_key(observation_space)
        images = [repr(space) for space in self._spaces.values() if kind_of(space) == "image"]
        if images:
            raise ValueError(
                f"Balanced replay estimates densities of vectors, found images: {', '.join(images)}. Use "
                "`offline_sampling='uniform'`."
            )
        self.temperature = float(temperature)
        self.learning_rate = float(learning_rate)
        self.batch_size = whole_number(batch_size, "batch_size", least=1)
        if not isinstance(net_arch, Sequence) or isinstance(net_arch, str):
            raise ValueError(
                "`net_arch` of balanced replay must be the sizes of its hidden layers, such as [256, 256], found "
                f"{net_arch!r}."
            )
        self.net_arch = [whole_number(size, "net_arch", least=1) for size in net_arch]
        self.n_updates = 0
        self._device = th.device(device)
        self._network: nn.Module | None = None
        self._optimizer: th.optim.Adam | None = None
        self._tree: SumTree | None = None
        self._drawn: list[Array] = []
        self._restored: dict[str, Array] | None = None
        self._restored_from = ""
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Start the random stream anew that the network and its batches come from. A network that has been trained is kept."""
        self._generator = np.random.default_rng(seed)
        if self._restored is not None:
            # It is taken up when the offline data is set, and the seed was given after it
            self._restored["generator"] = np.array(json.dumps(self._generator.bit_generator.state))
        if self.n_updates == 0:
            self._network = None

    def set_offline_data(self, offline: OfflineTransitions, shares: SourceShares) -> None:
        """
        Take the rows whose priorities are kept. Priorities restored before are those of these rows.

        :param offline: The rows
        :param shares: How they are drawn as long as their priorities are equal
        :raises ValueError: Restored priorities are of another number of rows; they are dropped then
        """
        if self._restored is not None and len(self._restored["priorities"]) != len(offline):
            n_saved, self._restored = len(self._restored["priorities"]), None
            raise ValueError(
                f"{_other_length(n_saved, len(offline), self._restored_from)} and load the replay buffer again. The loaded "
                "priorities have been dropped: with this dataset, they start anew."
            )
        self._offline, self._shares = offline, shares
        statistics = [mean_and_std(column) for column in self._columns(offline.observations)]
        self._mean = [mean.astype(np.float32) for mean, _ in statistics]
        self._std = [std.astype(np.float32) + STD_OFFSET for _, std in statistics]
        self._tree = SumTree(shares.relative_probabilities(np.arange(len(offline))))
        self._drawn.clear()
        if self._restored is not None:
            restored, self._restored = self._restored, None
            self._restore(restored)

    @property
    def drawn(self) -> tuple[Array, ...]:
        """Rows drawn since the last update, whose priorities the next one estimates; may be set to what it was."""
        return tuple(self._drawn)

    @drawn.setter
    def drawn(self, rows: tuple[Array, ...]) -> None:
        self._drawn = list(rows)

    def draw(self, generator: np.random.Generator, size: int) -> Array:
        """Draw offline rows independently in proportion to their priorities, which the next :meth:`update` estimates anew."""
        assert self._tree is not None
        rows = self._tree.draw(generator, size)
        self._drawn.append(rows)
        if len(self._drawn) > DRAWS_KEPT:
            self._drawn = [np.unique(np.concatenate(self._drawn))]
        return rows

    def update(self, online: OnlineTransitions, n_online: int) -> th.Tensor:
        """
        Do one gradient step, and estimate the priorities of the rows drawn since the last one.

        :param online: The online rows
        :param n_online: Their number, at least 1
        :return: The bound before the step, a scalar: 2 log 2 if online and offline rows are told apart without error, about
            0 if they cannot be
        """
        assert self._tree is not None
        if self._network is None:
            self._make_network()
        assert self._network is not None and self._optimizer is not None
        online_rows = self._generator.integers(0, n_online, size=self.batch_size)
        offline_rows = self._shares.draw(self._generator, self.batch_size)
        inputs = np.concatenate([self._inputs(online, online_rows), self._inputs(self._offline, offline_rows)])
        log_ratios = self._network(self._tensor(inputs))
        on, off = log_ratios[: self.batch_size], log_ratios[self.batch_size :]
        loss = F.softplus(-on).mean() + F.softplus(off).mean()
        if self._drawn:
            self._set_priorities(np.unique(np.concatenate(self._drawn)), off.detach())
            self._drawn.clear()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.n_updates += 1
        return 2 * math.log(2) - loss.detach()

    @th.no_grad()
    def _set_priorities(self, rows: Array, offline_log_ratios: th.Tensor) -> None:
        assert self._network is not None and self._tree is not None
        log_ratios = self._network(self._tensor(self._inputs(self._offline, rows)))
        log_mean = th.logsumexp(offline_log_ratios / self.temperature, dim=0) - math.log(len(offline_log_ratios))
        priorities = (log_ratios / self.temperature - log_mean).exp().clamp(*PRIORITY_BOUNDS)
        self._tree.set(rows, priorities.flatten().cpu().numpy() * self._shares.relative_probabilities(rows))

    def _make_network(self) -> None:
        # The global generator belongs to the learner
        with th.random.fork_rng(devices=[]):
            th.manual_seed(int(self._generator.integers(2**32)))
            size = len(self._inputs(self._offline, np.zeros(1, np.int64))[0])
            self._network = nn.Sequential(*create_mlp(size, 1, self.net_arch)).to(self._device)
        self._optimizer = th.optim.Adam(self._network.parameters(), lr=self.learning_rate)

    def _inputs(self, transitions: Transitions, rows: Array) -> Array:
        parts = []
        columns = self._columns(transitions.observations)
        for column, space, mean, std in zip(columns, self._spaces.values(), self._mean, self._std, strict=True):
            values = flatten_rows(column.take(rows, axis=0), space)
            parts.append(values if isinstance(space, spaces.Discrete) else (values - mean) / std)
        return np.concatenate([*parts, transitions.actions.take(rows, axis=0)], axis=1, dtype=np.float32)

    def _columns(self, observations: Observations) -> list[Array]:
        columns = by_key(observations)
        return [columns[key] for key in self._spaces]

    def _tensor(self, inputs: Array) -> th.Tensor:
        return th.from_numpy(inputs).to(self._device)

    def get_state(self) -> dict[str, Array]:
        """All that the priorities and their further course depend on, by name; empty before there is any."""
        if self._restored is not None:
            return self._restored
        if self._tree is None:
            return {}
        state = {
            "priorities": self._tree.priorities.copy(),
            "drawn": np.concatenate([np.empty(0, np.int64), *self._drawn]),
            "generator": np.array(json.dumps(self._generator.bit_generator.state)),
            "n_updates": np.array(self.n_updates),
        }
        if self._network is not None and self._optimizer is not None:
            for name, parameter in self._network.named_parameters():
                state[f"network/{name}"] = parameter.detach().cpu().numpy().copy()
                for moment, value in self._optimizer.state[parameter].items():
                    state[f"optimizer/{name}/{moment}"] = value.detach().cpu().numpy().copy()
        return state

    def set_state(self, state: Mapping[str, Array], name: str = "the state") -> None:
        """
        Go on from a state. If there is no offline data yet, it is taken up as soon as there is.

        :param state: What :meth:`get_state` returned
        :param name: Where it comes from, for messages
        :raises ValueError: It belongs to other data or a network of other sizes; nothing is changed then
        """
        if self._tree is not None and state and len(state["priorities"]) != len(self._offline):
            raise ValueError(f"{_other_length(len(state['priorities']), len(self._offline), name)}.")
        sizes = [state[key].shape[0] for key in state if key.startswith("network/") and key.endswith("weight")]
        if sizes and sizes != [*self.net_arch, 1]:
            raise ValueError(
                f"The density-ratio network in {name} was saved with layers {sizes[:-1]}, this learner has {self.net_arch}: "
                "use the same `net_arch`."
            )
        if self._tree is None:
            self._restored, self._restored_from = dict(state) or None, name
        elif state:
            self._restore(state)

    def _restore(self, state: Mapping[str, Array]) -> None:
        self._tree = SumTree(state["priorities"])
        self._drawn = [state["drawn"]] if len(state["drawn"]) else []
        names = [name.removeprefix("network/") for name in state if name.startswith("network/")]
        if names:
            self._make_network()
            assert self._network is not None and self._optimizer is not None
            self._network.load_state_dict({name: th.from_numpy(state[f"network/{name}"].copy()) for name in names})
            for name, parameter in self._network.named_parameters():
                prefix = f"optimizer/{name}/"
                moments = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                self._optimizer.state[parameter] = {
                    # Adam counts its steps on the CPU
                    moment: th.from_numpy(np.array(value)).to("cpu" if moment == "step" else parameter.device)
                    for moment, value in moments.items()
                }
        self.n_updates = int(state["n_updates"])
        self._generator.bit_generator.state = json.loads(str(state["generator"]))


def make_balanced_replay(
    offline_sampling: str, balanced_kwargs: dict[str, Any], observation_space: spaces.Space[Any], device: th.device
) -> BalancedReplay | None:
    """
    :param offline_sampling: ``"uniform"`` or ``"balanced"``
    :param balanced_kwargs: Keyword arguments of balanced replay
    :param observation_space: Observation space
    :param device: PyTorch device
    :return: Balanced replay, None for uniform sampling
    :raises ValueError: The name is unknown, or there are keyword arguments without effect
    :raises TypeError: A keyword argument is unknown
    """
    if offline_sampling not in OFFLINE_SAMPLING:
        raise ValueError(
            f"`offline_sampling` must be one of {', '.join(map(repr, OFFLINE_SAMPLING))}, found {offline_sampling!r}."
        )
    if offline_sampling == "uniform":
        if balanced_kwargs:
            raise ValueError("`balanced_kwargs` have no effect without `offline_sampling='balanced'`: add it or drop them.")
        return None
    if not isinstance(balanced_kwargs, Mapping):
        raise TypeError(f"`balanced_kwargs` must be a dictionary such as {{'temperature': 5.0}}, found {balanced_kwargs!r}.")
    known_keywords(BalancedReplay, balanced_kwargs, "balanced_kwargs", excluded=("observation_space", "device"))
    return BalancedReplay(observation_space, **balanced_kwargs, device=device)


def _other_length(n_saved: int, n_rows: int, name: str) -> str:
    return (
        f"The priorities of balanced replay in {name} were saved for {n_saved} offline rows, the dataset has {n_rows}: use "
        "the dataset that they were saved with"
    )
