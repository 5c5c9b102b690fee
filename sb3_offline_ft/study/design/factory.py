"""Makes the methods of a study: presets, what the study says, variants by factors, and all checks of it."""

import copy
import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.algorithms import ALGORITHMS
from sb3_offline_ft.common.checks import constructor_arguments
from sb3_offline_ft.common.search_space import FINETUNING_PREFIX
from sb3_offline_ft.common.strict_yaml import Reader
from sb3_offline_ft.common.suggestions import suggestion
from sb3_offline_ft.datasets.reference_scores import reference_scores_for
from sb3_offline_ft.pretrained.recipe import SHARED_WITH_PRETRAINING
from sb3_offline_ft.study.design.identity import is_same, method_facts
from sb3_offline_ft.study.design.learners import NOISES, PLAIN_TD3, algorithm_class
from sb3_offline_ft.study.design.methods import (
    CALLBACKS,
    ENSEMBLE_SIZE,
    EXTERNAL,
    SET_BY_STUDY,
    Method,
    Preset,
    default_of,
    factor_path,
    is_ours,
    known_algorithms,
    known_hyperparams,
    online_only,
    preset,
    set_path,
)

WITHOUT_EFFECT_FROM_SCRATCH = frozenset(
    {
        "offline_steps",
        "offline_fraction",
        "warmup_steps",
        "warmup_action_noise",
        "critic_warmup_steps",
        "reset_optimizers",
        "normalize_observations",
    }
)
_CALLBACK_PATHS = ("path", "save_snapshots", "verbose")

METHOD_KEYS = ("label", "algorithm", "start", "frozen", *CALLBACKS, "hyperparams", "external")
EXTERNAL_KEYS = ("command", "options", "timeout")
WITH_EXTERNAL = ("label", "start", "external")
"""What a method that is a command can have."""
STARTS = ("pretrained", "scratch")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MOST_OF_NAME = 150
"""Characters in the name of a method: files are called so, with what else their names have, and may have 255."""


class MethodFactory:
    """Makes the methods that a study's file asks for; ``random_return`` is the file's own, if it is given."""

    def __init__(
        self, reader: Reader, given: Mapping[str, Any], env: str, interactions: int, random_return: float | None
    ) -> None:
        self.reader, self.given, self.env, self.interactions = reader, given, env, interactions
        measured = reference_scores_for(env.rpartition(":")[2])
        self._random_return, self._known_random_return = random_return, None if measured is None else measured.random
        pretraining = reader.mapping(given.get("pretraining"), "pretraining", ("algorithm", "hyperparams"))
        self.pretraining_algorithm = reader.text(pretraining.get("algorithm", "td3bc"), "pretraining.algorithm")
        self.pretraining = reader.mapping(pretraining.get("hyperparams"), "pretraining.hyperparams")
        self.shared = reader.mapping(given.get("hyperparams"), "hyperparams")
        presets = reader.mapping(given.get("presets"), "presets")
        self._presets = {name: self._read_preset(name, entry) for name, entry in presets.items()}
        self._check_pretraining()

    def _read_preset(self, algorithm: str, entry: Any) -> Preset:
        key = f"presets.{algorithm}"
        if algorithm not in ALGORITHMS:
            self.reader.fail(key, f"is of no algorithm that has one. {suggestion(algorithm, ALGORITHMS)}")
        hyperparams = self.reader.mapping(entry, key)
        callbacks = {kind: self.reader.mapping(hyperparams.pop(kind, None), f"{key}.{kind}") for kind in CALLBACKS}
        self._check_hyperparams(hyperparams, key, algorithm)
        for kind, arguments in callbacks.items():
            self._check_callback_names(kind, arguments, f"{key}.{kind}")
        return Preset(hyperparams, callbacks)

    def _preset(self, algorithm: str) -> Preset:
        return self._presets.get(algorithm) or preset(algorithm, self.env)

    def _check_pretraining(self) -> None:
        key, algorithm = "pretraining.algorithm", self.pretraining_algorithm
        if algorithm not in ALGORITHMS:
            self.reader.fail(
                key, f"is {algorithm!r}, which is no algorithm that pretrains. {suggestion(algorithm, ALGORITHMS)}"
            )
        key = "pretraining.hyperparams"
        self._check_hyperparams(self.pretraining, key, algorithm)
        for name in self.pretraining:
            if name in online_only(algorithm):
                self.reader.fail(f"{key}.{name}", "does not act before the first interaction: write it in `hyperparams`.")
        self.reader.whole(self.pretraining_hyperparams({}).get("offline_steps", 0), f"{key}.offline_steps")

    def _check_hyperparams(self, hyperparams: Mapping[str, Any], key: str, algorithm: str) -> None:
        known = known_hyperparams(algorithm)
        for name, value in hyperparams.items():
            self._check_hyperparam(name, value, f"{key}.{name}", known, algorithm_class(algorithm).__name__)

    def _check_hyperparam(self, name: str, value: Any, key: str, known: Collection[str], owner: str) -> None:
        if name in SET_BY_STUDY:
            self.reader.fail(key, f"is no hyperparameter of a study: use {SET_BY_STUDY[name]}.")
        if name not in known:
            self.reader.fail(key, f"is no known argument of {owner}. {suggestion(name, known)}")
        if name == "guide_policy" and value not in (None, "pretrained"):
            self.reader.fail(key, f"must be 'pretrained' in a study, found {value!r}.")
        if name == "noise_type" and value not in (None, *NOISES):
            self.reader.fail(key, f"must be one of {', '.join(map(repr, NOISES))}, found {value!r}.")
        if name in ("policy_kwargs", "replay_buffer_kwargs") and not isinstance(value, Mapping | None):
            self.reader.fail(key, f"must be a mapping, found {value!r}.")

    def _check_shared(self, algorithms: Collection[str]) -> None:
        """Check that each of the study's ``hyperparams`` is an argument of one of our algorithms in it."""
        ours = [name for name in {*algorithms, self.pretraining_algorithm} if is_ours(name)]
        known = set().union(*(known_hyperparams(name) for name in ours))
        owner = " or ".join(sorted(algorithm_class(name).__name__ for name in ours))
        for name, value in self.shared.items():
            self._check_hyperparam(name, value, f"hyperparams.{name}", known, owner)

    def pretraining_hyperparams(self, variant: Mapping[str, Any]) -> dict[str, Any]:
        """All hyperparameters of the pretraining with values of factors, without those that act online only."""
        known = known_hyperparams(self.pretraining_algorithm) - online_only(self.pretraining_algorithm)
        made = self._preset(self.pretraining_algorithm).hyperparams | self.shared | self.pretraining
        own = copy.deepcopy({name: value for name, value in made.items() if name in known})
        if defaults := getattr(algorithm_class(self.pretraining_algorithm), "policy_defaults", None):
            # Other algorithms, which go on with its networks, have other defaults
            own["policy_kwargs"] = {**defaults, **(own.get("policy_kwargs") or {})}
        for factor, value in variant.items():
            path = factor_path(factor)
            if not factor.startswith(FINETUNING_PREFIX) and path[0] in known:
                set_path(own, path, value)
        return own

    def methods(self, factors: Mapping[str, list[Any]]) -> tuple[Method, ...]:
        """All methods of the study, each followed by its variants by the factors."""
        entries = self.reader.mapping(self.given["methods"], "methods")
        if not entries:
            self.reader.fail("methods", "must have at least one method.")
        combined = self.reader.truth(self.given.get("factors_combined", False), "factors_combined")
        listed = [self._method(name, entry) for name, entry in entries.items()]
        ours = [method for method in listed if method.external is None]
        self._check_shared({method.algorithm for method in ours})
        for method in ours:
            self._check_warmup(method, f"methods.{method.name}")
        self._check_different(listed)
        made: list[Method] = []
        used: set[str] = set()
        for method, entry in zip(listed, entries.values(), strict=True):
            made.append(method)
            facts = [self._facts(method)]
            for variant in self._variants(method, factors, combined):
                used |= variant.keys()
                new = self._method(method.name, entry, variant)
                # A factor's value may be what the method has anyway
                if not any(is_same(self._facts(new), others) for others in facts):
                    facts.append(self._facts(new))
                    self._check_warmup(new, "factors")
                    made.append(new)
        for factor in factors:
            if factor not in used:
                self._unused_factor(factor, listed)
        self._check_names(made)
        return tuple(made)

    def _check_names(self, made: list[Method]) -> None:
        names: dict[str, Method] = {}
        labels: dict[str, Method] = {}
        for method in made:
            if method.name in names:
                values = [list(each.variant.values()) for each in (names[method.name], method)]
                self.reader.fail(
                    "factors", f"has the values {values[0]} and {values[1]}, which both make {method.name}: leave one."
                )
            if len(method.name) > MOST_OF_NAME:
                key = "factors" if method.variant else f"methods.{method.base}"
                remedy = "make a method of its own of it in `methods`" if method.variant else "choose a shorter one"
                self.reader.fail(
                    key,
                    f"makes the name {method.name[:40]}..., which has {len(method.name)} characters, and folders are called "
                    f"so: at most {MOST_OF_NAME}, {remedy}.",
                )
            if method.label in labels:
                self.reader.fail(
                    f"methods.{method.base}.label",
                    f"makes {method.label!r}, as methods.{labels[method.label].base} does: "
                    "give each a label of its own, by which people tell them apart.",
                )
            names[method.name] = labels[method.label] = method

    def _facts(self, method: Method) -> dict[str, Any]:
        return method_facts(method, self.pretraining_algorithm)

    def _check_different(self, listed: list[Method]) -> None:
        for index, method in enumerate(listed):
            for other in listed[:index]:
                if is_same(self._facts(method), self._facts(other)):
                    self.reader.fail(
                        f"methods.{method.name}", f"is the same as methods.{other.name}: leave one, or change it."
                    )

    def _variants(self, method: Method, factors: Mapping[str, list[Any]], combined: bool) -> Iterator[dict[str, Any]]:
        if method.frozen or not method.pretrained or method.external is not None:
            return
        known = known_hyperparams(method.algorithm)
        taken = {name: values for name, values in factors.items() if factor_path(name)[0] in known}
        if combined and taken:
            yield from (dict(zip(taken, values, strict=True)) for values in itertools.product(*taken.values()))
        elif not combined:
            yield from ({name: value} for name, values in taken.items() for value in values)

    def _unused_factor(self, factor: str, listed: list[Method]) -> None:
        ours = [method for method in listed if method.pretrained and not method.frozen and method.external is None]
        known = set().union({ENSEMBLE_SIZE}, *(known_hyperparams(method.algorithm) for method in ours))
        who = ", ".join(method.name for method in ours) or "none is pretrained and not frozen"
        self.reader.fail(
            f"factors.{factor}", f"is an argument of no method that it can act in ({who}). {suggestion(factor, known)}"
        )

    def _method(self, name: str, entry: Any, variant: Mapping[str, Any] | None = None) -> Method:
        key, variant = f"methods.{name}", dict(variant or {})
        if not _NAME.fullmatch(name):
            self.reader.fail(key, "must be a name of letters, digits, '.', '_' and '-'.")
        given = self.reader.mapping(entry, key, METHOD_KEYS)
        start = given.get("start", "pretrained")
        if start not in STARTS:
            self.reader.fail(f"{key}.start", f"must be {' or '.join(STARTS)}, found {start!r}.")
        pretrained, frozen = start == "pretrained", self.reader.truth(given.get("frozen", False), f"{key}.frozen")
        label = self.reader.text(given["label"], f"{key}.label") if "label" in given else name
        if "external" in given:
            external = self._external(given, key)
            return Method(name, label, EXTERNAL, pretrained, external=external, base=name)
        suffixes = [f"{factor}={_value_name(value)}" for factor, value in variant.items()]
        pretraining = self.pretraining_hyperparams(variant)
        method = Method(
            name="+".join([name, *suffixes]),
            label=", ".join([label, *(suffix.replace("=", " ") for suffix in suffixes)]),
            algorithm=self._algorithm(given, key, pretrained, frozen),
            pretrained=pretrained,
            frozen=frozen,
            pretraining_hyperparams=pretraining if pretrained else {},
            variant=variant,
            base=name,
        )
        hyperparams = self._hyperparams(method, given, pretraining)
        guard, champion = (self._callback(kind, method, given.get(kind)) for kind in ("guard", "champion"))
        return replace(method, hyperparams=hyperparams, guard=guard, champion=champion)

    def _external(self, given: Mapping[str, Any], key: str) -> dict[str, Any]:
        for other in given.keys() - {*WITH_EXTERNAL}:
            self.reader.fail(f"{key}.{other}", "is not known to a command: write it in `external.options`, or leave it out.")
        key = f"{key}.external"
        external = self.reader.mapping(given["external"], key, EXTERNAL_KEYS)
        command = external.get("command")
        words: list[Any] = command if isinstance(command, list) else []
        if not words or not all(isinstance(word, str) and word and "\0" not in word for word in words):
            self.reader.fail(f"{key}.command", f"must be a list of words, such as [python, learn.py], found {command!r}.")
        options = self.reader.mapping(external.get("options"), f"{key}.options")
        self._check_json(options, f"{key}.options")
        timeout = external.get("timeout")
        if timeout is not None and self.reader.number(timeout, f"{key}.timeout") <= 0:
            self.reader.fail(f"{key}.timeout", f"must be a number of seconds above 0, found {timeout!r}.")
        return {"command": words, "options": options, **({} if timeout is None else {"timeout": float(timeout)})}

    def _check_json(self, value: Any, key: str) -> None:
        """Check that a request can hold an option, and that it will be read back as it is."""
        if isinstance(value, Mapping):
            for name, entry in value.items():
                if not isinstance(name, str):
                    self.reader.fail(key, f"must have texts for keys, as JSON has, found {name!r}: write it in quotes.")
                self._check_json(entry, f"{key}.{name}")
        elif isinstance(value, list):
            for position, entry in enumerate(value):
                self._check_json(entry, f"{key}[{position}]")
        elif not (value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))):
            self.reader.fail(
                key, f"must be what JSON can hold (texts, numbers, truth values, lists, mappings), found {value!r}: write "
                "it as a text."
            )  # fmt: skip

    def _algorithm(self, given: Mapping[str, Any], key: str, pretrained: bool, frozen: bool) -> str:
        if "algorithm" not in given and not pretrained:
            self.reader.fail(f"{key}.algorithm", "is missing: say which algorithm learns from scratch.")
        algorithm = self.reader.text(given.get("algorithm", self.pretraining_algorithm), f"{key}.algorithm")
        known = known_algorithms()
        if algorithm not in known:
            self.reader.fail(
                f"{key}.algorithm", f"is {algorithm!r}, which is no known algorithm. {suggestion(algorithm, known)}"
            )
        if pretrained and not is_ours(algorithm):
            ours = ", ".join([PLAIN_TD3, *ALGORITHMS])
            self.reader.fail(
                f"{key}.algorithm",
                f"is {algorithm}, which cannot start from the pretrained policy as {ours} can: add `start: scratch`.",
            )
        if frozen and (not pretrained or algorithm != self.pretraining_algorithm):
            self.reader.fail(f"{key}.frozen", "is for the pretrained policy as it is: leave out `algorithm` and `start`.")
        return algorithm

    def _hyperparams(self, method: Method, given: Mapping[str, Any], pretraining: dict[str, Any]) -> dict[str, Any]:
        """Those of the preset, then of the pretraining, the study, the method itself, and its variant."""
        key = f"methods.{method.base}.hyperparams"
        own = self.reader.mapping(given.get("hyperparams"), key)
        if method.frozen and own:
            self.reader.fail(key, "have no effect on a frozen policy: write them in `pretraining.hyperparams`.")
        self._check_hyperparams(own, key, method.algorithm)
        for name in own:
            where = f"{key}.{name}"
            if method.pretrained and name in SHARED_WITH_PRETRAINING:
                self.reader.fail(
                    where, "cannot be another one than in the pretraining: write it in `pretraining.hyperparams`."
                )
            if not method.pretrained and name in WITHOUT_EFFECT_FROM_SCRATCH:
                self.reader.fail(where, "has no effect from scratch, without data: leave it out.")
        if method.frozen:
            return pretraining
        if not is_ours(method.algorithm):
            return {"policy": "MlpPolicy", **copy.deepcopy(own)}
        source = self.pretraining_algorithm if method.algorithm == PLAIN_TD3 else method.algorithm
        made = self._preset(source).hyperparams | self.shared
        made = {name: value for name, value in made.items() if name not in SHARED_WITH_PRETRAINING}
        # From scratch too: the networks of the methods shall be comparable
        made |= {name: pretraining[name] for name in SHARED_WITH_PRETRAINING if name in pretraining}
        known = known_hyperparams(method.algorithm)
        made = copy.deepcopy({name: value for name, value in made.items() if name in known} | own)
        for factor, value in method.variant.items():
            path = factor_path(factor)
            if path[0] not in SHARED_WITH_PRETRAINING:
                set_path(made, path, value)
        without_effect = () if method.pretrained else WITHOUT_EFFECT_FROM_SCRATCH
        return {name: value for name, value in made.items() if name not in without_effect}

    def _callback(self, kind: str, method: Method, given: Any) -> dict[str, Any] | None:
        """Arguments of a method's callback of a kind: those of the preset, then its own."""
        if given is None or given is False:
            return None
        key = f"methods.{method.base}.{kind}"
        own = {} if given is True else self.reader.mapping(given, key)
        if method.frozen:
            self.reader.fail(key, "has nothing to do for a frozen policy: leave it out.")
        if not issubclass(algorithm_class(method.algorithm), OffPolicyAlgorithm):
            self.reader.fail(key, f"needs an off-policy algorithm, found {method.algorithm}: leave it out.")
        if kind == "champion" and not method.pretrained:
            self.reader.fail(key, "needs a pretrained policy, which is the first champion: leave it out, or `start: scratch`.")
        self._check_callback_names(kind, own, key)
        source = method.algorithm if method.algorithm in ALGORITHMS else self.pretraining_algorithm
        # A preset may have the other kind alone
        of_preset = self._preset(source).callbacks[kind] or self._preset(self.pretraining_algorithm).callbacks[kind]
        arguments = {"random_return": self._known_random_return} | of_preset
        if self._random_return is not None:
            arguments["random_return"] = self._random_return
        arguments = {name: value for name, value in (arguments | own).items() if value is not None}
        if kind == "guard":
            self._check_baseline(arguments.get("baseline", "warmup"), f"{key}.baseline", method.pretrained)
        try:
            CALLBACKS[kind](**arguments)
        except (ValueError, TypeError) as error:
            self.reader.fail(key, f"is not possible: {error}")
        return copy.deepcopy(arguments)

    def _check_callback_names(self, kind: str, own: Mapping[str, Any], key: str) -> None:
        known = constructor_arguments(CALLBACKS[kind]).keys() - {*_CALLBACK_PATHS}
        for name in own:
            if name in _CALLBACK_PATHS:
                self.reader.fail(f"{key}.{name}", "is set by the study: leave it out.")
            if name not in known:
                owner = CALLBACKS[kind].__name__
                self.reader.fail(f"{key}.{name}", f"is no known argument of {owner}. {suggestion(name, known)}")

    def _check_baseline(self, baseline: Any, key: str, pretrained: bool) -> None:
        if baseline == "evaluations":
            self.reader.fail(key, "must be 'warmup' or a list of returns in a study, found 'evaluations'.")
        if not pretrained and baseline == "warmup":
            self.reader.fail(key, "must be a list of returns from scratch, where no policy is there to warm up.")

    def _check_warmup(self, method: Method, key: str) -> None:
        if not method.pretrained or method.frozen:
            return
        default = default_of(method.algorithm, "warmup_steps")
        warmup_steps = self.reader.whole(method.hyperparams.get("warmup_steps", default), f"{key}.hyperparams.warmup_steps", 0)
        if warmup_steps >= self.interactions:
            self.reader.fail(
                key,
                f"has {warmup_steps:,} warm-up steps, and `interactions` are {self.interactions:,}: nothing would be learned. "
                "Set a smaller `hyperparams: {warmup_steps: ...}`, or more interactions.",
            )


def _value_name(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_") or "none"
