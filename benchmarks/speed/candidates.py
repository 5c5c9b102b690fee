"""
What the speed benchmark measures: groups of candidates, and how much arithmetic one update needs.

Only the standard library is imported here, since the peers' environments read this file too.
"""

from dataclasses import dataclass, field
from typing import Any

BATCH_SIZE = 256
HIDDEN = 256
POLICY_DELAY = 2
ROWS = 100_000
REFERENCE = "sb3"
FASTEST_PEER = "sbx"
GEMM_SIZE = 256


@dataclass(frozen=True)
class Shape:
    """
    Sizes of an environment's vectors.

    :param observation: Length of an observation
    :param action: Length of an action
    """

    observation: int
    action: int

    @property
    def flops(self) -> float:
        """
        Floating point operations that one update of TD3 or TD3+BC cannot do without, the policy's counted every second time.

        Only matrix products are counted, 2 operations for each multiplication with addition. A product of a layer's input
        and weights is needed forward, another one for the gradient of the weights and a third for that of the input. Left
        out are what no update needs: gradients of the first layer's input, and of the critic's weights in the policy's loss.
        """
        critic_input = self.observation + self.action
        critic = critic_input * HIDDEN + HIDDEN * HIDDEN + HIDDEN
        actor = self.observation * HIDDEN + HIDDEN * HIDDEN + HIDDEN * self.action
        targets = actor + 2 * critic
        critics = 2 * (critic + critic + critic - critic_input * HIDDEN)
        # Through the critic to the action, of its input
        to_action = HIDDEN + HIDDEN * HIDDEN + self.action * HIDDEN
        policy = actor + critic + to_action + actor + actor - self.observation * HIDDEN
        return 2.0 * BATCH_SIZE * (targets + critics + policy / POLICY_DELAY)


SHAPES = {"hopper": Shape(11, 3), "halfcheetah": Shape(17, 6)}


@dataclass(frozen=True)
class Candidate:
    """
    One thing to measure.

    :param name: Unique in its group
    :param label: For tables
    :param kind: Which function of `worker.py` sets it up
    :param settings: Its keyword arguments
    :param environment: Whose Python runs it: ``"own"`` or a peer of `peers.py`
    :param arithmetic: Format of the matrix products, None if its share of the arithmetic limit is not asked for
    :param share: Share of a round that it takes
    """

    name: str
    label: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    environment: str = "own"
    arithmetic: str | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Group:
    """
    Candidates that are compared with each other.

    :param name: For example ``"offline/hopper"``
    :param title: For tables
    :param unit: What a step is
    :param candidates: They take turns
    :param flops: Of one step, None where they are not counted
    """

    name: str
    title: str
    unit: str
    candidates: tuple[Candidate, ...]
    flops: float | None = None

    def find(self, name: str) -> Candidate:
        """
        :param name: Name of a candidate
        :return: The candidate
        """
        return next(candidate for candidate in self.candidates if candidate.name == name)


def _offline(shape_name: str) -> Group:
    def ours(name: str, label: str, layer_norm: bool, arithmetic: str = "float32", **keywords: str) -> Candidate:
        settings = {"shape": shape_name, "algorithm": label.split()[0], "layer_norm": layer_norm, **keywords}
        norm = "LayerNorm" if layer_norm else "no LayerNorm"
        return Candidate(name, f"{label}, {norm}", "pretrain", settings, arithmetic=arithmetic)

    def peer(name: str, label: str, kind: str, environment: str = "own") -> Candidate:
        return Candidate(name, label, kind, {"shape": shape_name}, environment, arithmetic="float32")

    def gemm(arithmetic: str, library: str = "default") -> Candidate:
        name = f"gemm-{arithmetic}" + ("" if library == "default" else f"-{library}")
        settings = {"arithmetic": arithmetic, "library": library}
        return Candidate(name, f"{GEMM_SIZE}³ product, {name[5:]}", "gemm", settings, share=0.25)

    shape = SHAPES[shape_name]
    candidates = (
        peer(REFERENCE, "SB3 TD3", "sb3_train"),
        peer("corl_style", "TD3+BC, single file", "single_file"),
        peer("d3rlpy", "d3rlpy TD3+BC", "d3rlpy_update", "d3rlpy"),
        peer(FASTEST_PEER, "SBX TD3 (JAX)", "sbx_train", "sbx"),
        ours("td3bc", "TD3BC", True),
        ours("td3bc-nonorm", "TD3BC", False),
        ours("td3c", "TD3C", True),
        ours("td3c-nonorm", "TD3C", False),
        ours("td3bc-autograd", "TD3BC autograd", True, kernel="autograd"),
        ours("td3bc-autograd-nonorm", "TD3BC autograd", False, kernel="autograd"),
        ours("td3bc-bfloat16", "TD3BC bfloat16", True, "bfloat16", update_precision="bfloat16"),
        ours("td3bc-bfloat16-nonorm", "TD3BC bfloat16", False, "bfloat16", update_precision="bfloat16"),
        gemm("float32"),
        gemm("float32", "onednn"),
        gemm("bfloat16"),
    )
    title = f"Updates on logged data, {shape_name} shapes ({shape.observation} observations, {shape.action} actions)"
    return Group(f"offline/{shape_name}", title, "gradient step", candidates, shape.flops)


def _online() -> Group:
    def learn(name: str, label: str, **settings: Any) -> Candidate:
        return Candidate(name, label, "learn", {"noise": 0.1, "gradient_steps": 1, **settings})

    return Group(
        "online/hopper",
        "`learn()` on Hopper-v5, one update per environment step",
        "environment step",
        (
            learn(REFERENCE, "SB3 TD3", algorithm="TD3"),
            learn("td3bc", "TD3BC, dataset, LayerNorm", algorithm="TD3BC", dataset=True),
            learn("td3bc-nonorm", "TD3BC, dataset, no LayerNorm", algorithm="TD3BC", dataset=True, layer_norm=False),
            learn("td3c", "TD3C, dataset, LayerNorm", algorithm="TD3C", dataset=True),
            learn("td3bc-nodata", "TD3BC, no dataset, LayerNorm", algorithm="TD3BC"),
            learn("td3bc-nodata-nonorm", "TD3BC, no dataset, no LayerNorm", algorithm="TD3BC", layer_norm=False),
        ),
    )


def _collection(name: str, noise: float | None) -> Group:
    settings = {"noise": noise, "gradient_steps": 0}
    return Group(
        f"collect/{name}",
        f"`learn()` on Hopper-v5 without updates, {name.replace('nonoise', 'no noise')}",
        "environment step",
        (
            Candidate(REFERENCE, "SB3 TD3", "learn", {"algorithm": "TD3", **settings}),
            Candidate("td3bc", "TD3BC", "learn", {"algorithm": "TD3BC", **settings}),
        ),
    )


def _online_train(name: str, title: str) -> Group:
    return Group(
        f"train/{name}",
        f"`train()` on online data, {title}",
        "gradient step",
        (
            Candidate(REFERENCE, "SB3 TD3", "online_train", {"algorithm": "TD3", "network": name}),
            Candidate("offline_td3", "OfflineTD3", "online_train", {"algorithm": "OfflineTD3", "network": name}),
        ),
    )


GROUPS = (
    *(_offline(name) for name in SHAPES),
    _online(),
    _collection("noise", 0.1),
    _collection("nonoise", None),
    _online_train("mlp", "MlpPolicy"),
    _online_train("elu", "MlpPolicy with ELU"),
    _online_train("dict", "MultiInputPolicy"),
    _online_train("cnn", "CnnPolicy, 36x36 images, batch of 64"),
)


def find_group(name: str) -> Group:
    """
    :param name: Name of a group
    :return: The group
    """
    return next(group for group in GROUPS if group.name == name)
