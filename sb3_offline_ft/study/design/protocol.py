"""What a study compares: its file, its methods, its cells."""

import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from sb3_offline_ft.common.reading import read_text
from sb3_offline_ft.common.strict_yaml import Reader, load_yaml
from sb3_offline_ft.common.suggestions import suggestion
from sb3_offline_ft.datasets import OfflineDataset, load_dataset
from sb3_offline_ft.datasets.reference_scores import reference_scores_for
from sb3_offline_ft.study.design import identity
from sb3_offline_ft.study.design.factory import MethodFactory
from sb3_offline_ft.study.design.methods import Method
from sb3_offline_ft.study.design.reading import (
    NO_DATA,
    EvaluationPlan,
    import_env,
    read_datasets,
    read_env,
    read_evaluation,
    read_factors,
    read_seeds,
)

__all__ = ["STUDY_FILE", "Cell", "EvaluationPlan", "Method", "PretrainingPlan", "Protocol"]

STUDY_FILE = "study.yml"
KEYS = (
    "name",
    "env",
    "datasets",
    "pretraining",
    "seeds",
    "interactions",
    "evaluation",
    "learner_evaluation",
    "random_return",
    "hyperparams",
    "methods",
    "factors",
    "factors_combined",
    "reference_method",
    "presets",
)
NEEDED = ("env", "seeds", "interactions", "methods")


def study_file(path: str | Path) -> Path:
    """The file of a study, which need not exist, from its path or that of its folder."""
    file = Path(path).expanduser().absolute()
    return file if file.is_file() else file / STUDY_FILE


@dataclass(frozen=True)
class PretrainingPlan:
    """
    What pretrained methods start from.

    :param algorithm: Name of the algorithm
    :param hyperparams: All of its hyperparameters, without the values of factors
    """

    algorithm: str
    hyperparams: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Cell:
    """
    One run of a study.

    :param dataset: Label of the dataset, None for a method without data
    :param method: The method
    :param seed: The seed
    """

    dataset: str | None
    method: Method
    seed: int

    @property
    def name(self) -> str:
        """Its name in the study, such as ``medium/td3c/seed3``; without data ``no-data/scratch/seed3``."""
        return f"{self.dataset or NO_DATA}/{self.method.name}/seed{self.seed}"


@dataclass(frozen=True, eq=False)
class Protocol:
    """
    What a study compares; made by :meth:`load`.

    :param name: Name of the study
    :param folder: Its folder, absolute
    :param env: Gymnasium id of the environment
    :param datasets: Specs of the datasets by label, with absolute paths where they are beside the file
    :param pretraining: The pretraining
    :param seeds: The seeds
    :param interactions: Environment steps of each run
    :param evaluation: The measured evaluations, of which learners see nothing
    :param learner_evaluation: Evaluations for methods that learn from them
    :param methods: All methods, each followed by its variants
    :param factors: Values of each factor
    :param reference_method: The method that others are compared with, None if none is named
    :param text: The file as it was read
    :param given_random_return: ``random_return`` of the file, if it is given
    :param specs: Specs of the datasets as they are written
    :param trust_pickle: Whether they may be read from pickle files, which the file cannot say itself
    """

    name: str
    folder: Path
    env: str
    datasets: dict[str, str]
    pretraining: PretrainingPlan
    seeds: tuple[int, ...]
    interactions: int
    evaluation: EvaluationPlan
    learner_evaluation: EvaluationPlan
    methods: tuple[Method, ...]
    factors: dict[str, list[Any]]
    reference_method: str | None
    text: str
    given_random_return: float | None
    specs: dict[str, str]
    trust_pickle: bool = False
    _loaded: dict[str, OfflineDataset] = field(default_factory=dict, repr=False, init=False)
    _data_facts: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, init=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": {}}

    @classmethod
    def load(cls, path: str | Path, trust_pickle: bool = False) -> Self:
        """
        Read a study's file. No data is read, and no code of others runs.

        :param path: The file, or the folder that has it as ``study.yml``
        :param trust_pickle: Whether datasets may be read from pickle files: that runs code which these hold
        :return: The protocol
        :raises FileNotFoundError: There is no such file
        :raises ValueError: Something in it is wrong; the message names the key, what was expected and what was found
        """
        file = study_file(path)
        if not file.exists():
            raise FileNotFoundError(
                f"There is no study in {str(file.parent)!r}, as it has no {STUDY_FILE}: write one with "
                f"`sb3-offline-ft study init {path} --env ... --dataset ...`."
            )
        return cls.parse(read_text(file), file, trust_pickle)

    @classmethod
    def parse(cls, text: str, file: Path, trust_pickle: bool = False) -> Self:
        """
        :param text: The text of a study's file
        :param file: Where it is from, or will be
        :param trust_pickle: As for :meth:`load`
        :return: The protocol
        :raises ValueError: As :meth:`load`
        """
        reader = Reader(file)
        given = reader.mapping(load_yaml(text, file), "", KEYS)
        for key in NEEDED:
            if given.get(key) is None:
                reader.fail(key, "is missing.")
        env = read_env(reader, given["env"])
        interactions = reader.whole(given["interactions"], "interactions")
        specs, datasets = read_datasets(reader, given.get("datasets"), file.parent)
        random_return = given.get("random_return")
        random_return = None if random_return is None else reader.number(random_return, "random_return")
        factors = read_factors(reader, given.get("factors"))
        factory = MethodFactory(reader, given, env, interactions, random_return)
        methods = factory.methods(factors)
        if not datasets and any(method.uses_data for method in methods):
            reader.fail("datasets", "must have at least one dataset, for the methods that start from a pretrained policy.")
        reference = given.get("reference_method")
        names = [method.name for method in methods]
        if reference is not None and reference not in names:
            reader.fail(
                "reference_method", f"is {reference!r}, which is no method of the study. {suggestion(str(reference), names)}"
            )
        return cls(
            name=reader.text(given.get("name", file.parent.name), "name"),
            folder=file.parent,
            env=env,
            datasets=datasets,
            pretraining=PretrainingPlan(factory.pretraining_algorithm, factory.pretraining_hyperparams({})),
            seeds=read_seeds(reader, given["seeds"]),
            interactions=interactions,
            evaluation=read_evaluation(reader, given.get("evaluation"), "evaluation", interactions),
            learner_evaluation=read_evaluation(reader, given.get("learner_evaluation"), "learner_evaluation", interactions),
            methods=methods,
            factors=factors,
            reference_method=reference,
            text=text,
            given_random_return=random_return,
            specs=specs,
            trust_pickle=trust_pickle,
        )

    def changed(self, **changes: Any) -> Self:
        """A copy with other values of parameters, which shares the data and what is known of it."""
        copy = replace(self, **changes)
        for name in ("_loaded", "_data_facts"):
            object.__setattr__(copy, name, getattr(self, name))
        return copy

    def cells(self) -> list[Cell]:
        """
        List all runs, seed by seed and within a seed dataset by dataset, so that early ones are of all methods.

        :return: The cells; those without data come first in each seed
        """
        with_data = [method for method in self.methods if method.uses_data]
        without = [method for method in self.methods if not method.uses_data]
        return [
            Cell(label, method, seed)
            for seed in self.seeds
            for label, methods in ((None, without), *((label, with_data) for label in self.datasets))
            for method in methods
        ]

    def dataset(self, label: str) -> OfflineDataset:
        """
        :param label: A dataset's label
        :return: The dataset, which is loaded at the first call
        :raises FileNotFoundError: It is not there
        :raises ValueError: It cannot be read
        """
        if label not in self._loaded:
            try:
                self._loaded[label] = load_dataset(self.datasets[label], trust_pickle=self.trust_pickle)
            except (FileNotFoundError, ValueError) as error:
                kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
                raise kind(f"{self.file}: `datasets.{label}`: {error}") from None
        return self._loaded[label]

    def data_facts(self, label: str) -> dict[str, Any]:
        """
        Facts about the dataset with a label, for others to :meth:`remember_data` where the data is not: its spec as it is
        written, its fingerprint, parts and reference scores, in the form of JSON.
        """
        if label not in self._data_facts:
            self._data_facts[label] = {"spec": self.specs[label], **identity.data_facts(self.dataset(label))}
        return dict(self._data_facts[label])

    def remember_data(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """
        Believe facts about the datasets instead of loading them, as a report does on a machine without the data.

        :param facts: :meth:`data_facts` by label; those of other labels, or of other specs than the file's, are ignored
        """
        for label, known in facts.items():
            if self.specs.get(label) == known.get("spec"):
                self._data_facts.setdefault(label, dict(known))

    @property
    def file(self) -> Path:
        """Where the study is written."""
        return self.folder / STUDY_FILE

    @property
    def random_return(self) -> float | None:
        """Mean return of a random policy: as given, as measured of the environment, as a dataset says; None if unknown."""
        if self.given_random_return is not None:
            return self.given_random_return
        measured = reference_scores_for(self.env.rpartition(":")[2])
        if measured is not None:
            return measured.random
        scores = (self.data_facts(label)["reference_scores"] for label in self.datasets)
        return next((float(pair[0]) for pair in scores if pair is not None), None)

    def with_random_return(self, method: Method) -> Method:
        """A method whose guard and champion know the study's random policy, if they were given none."""
        known = {} if self.random_return is None else {"random_return": self.random_return}
        changed: dict[str, Any] = {name: {**known, **arguments} for name, arguments in method.callbacks.items()}
        return replace(method, **changed)

    def described(self, cell: Cell) -> dict[str, Any]:
        """
        :param cell: A cell
        :return: What its result depends on, in the form of JSON; not its name and labels, nor where the data is
        """
        data = None
        if cell.dataset is not None:
            data = {name: value for name, value in self.data_facts(cell.dataset).items() if name != "spec"}
        plan = {
            "env": self.env,
            "seed": cell.seed,
            "interactions": self.interactions,
            "evaluation": asdict(self.evaluation),
            "learner_evaluation": asdict(self.learner_evaluation),
        }
        return identity.cell_facts(self.with_random_return(cell.method), self.pretraining.algorithm, data, plan)

    def cell_key(self, cell: Cell) -> str:
        """
        :param cell: A cell
        :return: 16 hexadecimal digits, equal for cells of which :meth:`described` says the same
        """
        return identity.digest(self.described(cell))

    def import_env(self) -> None:
        """
        Import the module that ``env`` names before the id, if it does, which runs that module's code.

        :raises ValueError: There is no such module, or Gymnasium does not know the id
        """
        import_env(Reader(self.file), self.env)

    @property
    def commands(self) -> list[str]:
        """The commands that are methods, as a shell has them."""
        return [shlex.join(method.external["command"]) for method in self.methods if method.external is not None]

    @property
    def env_module(self) -> str:
        """The module that ``env`` names before the id, empty if there is none."""
        return self.env.rpartition(":")[0]

    def check(self, labels: Iterable[str] | None = None, commands: Collection[str] | None = None) -> None:
        """
        Find out now what would fail only later: make the environment, load the data, construct each method's learner.

        :param labels: Labels of the datasets to load, by default all
        :param commands: Names of the methods whose commands must be there, by default all
        :raises FileNotFoundError: A dataset is not there
        :raises ValueError: The data does not fit the environment, or a hyperparameter is not possible
        """
        from sb3_offline_ft.study.design.checking import check_protocol

        self.import_env()
        check_protocol(self, self.datasets if labels is None else labels, commands)
