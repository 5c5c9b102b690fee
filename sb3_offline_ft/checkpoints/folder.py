"""Checkpoints as folders: written whole or not at all, the newest intact one is found again."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th

from sb3_offline_ft.checkpoints.ring import RingFiles
from sb3_offline_ft.common.io import naming_damage, remove_unfinished, replace_synced
from sb3_offline_ft.common.plain import from_plain, to_plain
from sb3_offline_ft.common.reading import open_file, read_json
from sb3_offline_ft.common.versions import installed_versions
from sb3_offline_ft.common.warning import warn

NAME = "checkpoints"
MANIFEST, STATE = "manifest.json", "state.pt"
UNFINISHED = ".unfinished_"
VERSION = 1
PACKAGES = ("sb3-offline-ft", "stable_baselines3", "torch", "numpy", "gymnasium")
MUST_AGREE = ("sb3-offline-ft",)


@dataclass
class Checkpoint:
    """
    A checkpoint that has been read and found intact.

    :param path: Its folder
    :param facts: What it is about, in the form of JSON
    :param state: The state of everything but the rows of the replay buffer
    """

    path: Path
    facts: dict[str, Any]
    state: dict[str, Any]


class CheckpointFolder:
    """
    The checkpoints of one run.

    :param run: The run's folder, in which they have one of their own
    """

    def __init__(self, run: Path) -> None:
        self.path = run / NAME
        self._damaged: set[Path] = set()
        """Checkpoints that cannot be resumed, which do not count among those to keep."""
        self.ring = RingFiles(self.path)

    def _by_number(self) -> list[tuple[int | None, Path]]:
        """Numbers and folders of the checkpoints, the newest last: a damaged one, of which nobody knows, may be that."""
        found: list[tuple[int | None, Path]] = []
        for path in sorted(self.path.glob("step_*")):
            try:
                found.append((int(_read_manifest(path)["number"]), path))
            except (ValueError, KeyError, TypeError, OverflowError, OSError):
                found.append((None, path))
        return sorted(found, key=lambda entry: (entry[0] is None, entry[0] or 0))

    def write(self, name: str, facts: dict[str, Any], state: dict[str, Any], buffer: Any, keep: int) -> Path:
        """
        Write a checkpoint, and remove those that are older than the ``keep`` newest ones.

        :raises OSError: The disk does not take it; the others are as they were
        """
        target = self.path / name
        self.path.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        number = max((number or 0 for number, _ in self._by_number()), default=0) + 1
        if target.exists():
            # It may be the only one, and is not removed before this one is there
            target = self.path / f"{name}_{number}"
        temporary = Path(tempfile.mkdtemp(dir=self.path, prefix=UNFINISHED))
        try:
            rows = self.ring.write(buffer)
            with (temporary / STATE).open("wb") as file:
                th.save(to_plain(state, "a checkpoint"), file)
            manifest = facts | {"format": VERSION, "number": number, "versions": installed_versions(PACKAGES), "buffer": rows}
            manifest["sha256"] = {STATE: _sha256(temporary / STATE), MANIFEST: _sha256_of(manifest)}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            temporary.chmod(0o777 & ~_umask())
            replace_synced(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        known = self._by_number()
        kept = [path for number, path in known if number is not None and path not in self._damaged][-keep:]
        for _, path in known:
            if path not in kept:
                self._remove(path)
        self._forget_rows()
        return target

    def _remove(self, checkpoint: Path) -> None:
        # Who is killed here shall not leave half of one
        gone = checkpoint.with_name(f"{UNFINISHED}{checkpoint.name}")
        checkpoint.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _remove_unfinished(self) -> None:
        for path in self.path.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        if (self.path / "buffer").is_dir():
            remove_unfinished(self.path / "buffer")

    def _forget_rows(self) -> None:
        names: set[str] = set()
        for _, path in self._by_number():
            try:
                names |= {name for _, name in _read_manifest(path)["buffer"]["files"]}
            except (ValueError, KeyError, TypeError, OSError):
                # Of a damaged one nobody knows what it needs, and it cannot be resumed
                continue
        self.ring.keep(names)

    def newest(self) -> Checkpoint:
        """
        Read the newest checkpoint that is intact; of newer ones that are damaged a warning tells.

        :raises ValueError: There is none, or it was written by another version
        """
        problems = []
        for _, path in reversed(self._by_number()):
            try:
                checkpoint = self._read(path)
            except (ValueError, OSError) as error:
                problems.append(str(error))
                self._damaged.add(path)
                continue
            for problem in problems:
                warn(f"{problem} The checkpoint {path.name} before it is used.")
            _check_versions(checkpoint)
            return checkpoint
        found = f" ({' '.join(problems)})" if problems else ""
        raise ValueError(
            f"{self.path} has no intact checkpoint{found}: expected one that `CheckpointRun` wrote. Start the run again; "
            "nothing of it can be resumed."
        )

    def _read(self, path: Path) -> Checkpoint:
        facts = _read_manifest(path)
        with naming_damage(path / MANIFEST, "the manifest of a checkpoint"):
            if facts["format"] != VERSION:
                raise ValueError(f"it has the format {facts['format']}, expected {VERSION}")
            expected = facts["sha256"][STATE]
        with naming_damage(path / STATE, "the state of a checkpoint"):
            if _sha256(path / STATE) != expected:
                raise ValueError("it has changed since it was written")
            state = from_plain(th.load(path / STATE, map_location="cpu", weights_only=True))
        self.ring.check(facts["buffer"])
        return Checkpoint(path, facts, state)


def has_checkpoint(run: Path | str) -> bool:
    """Whether there is a checkpoint in a run's folder, intact or not."""
    return any(True for _ in (Path(run) / NAME).glob("step_*"))


def _read_manifest(path: Path) -> dict[str, Any]:
    with naming_damage(path / MANIFEST, "the manifest of a checkpoint"):
        content = read_json(path / MANIFEST)
        if _sha256_of({name: value for name, value in content.items() if name != "sha256"}) != content["sha256"][MANIFEST]:
            raise ValueError("it has changed since it was written")
        return content


def _check_versions(checkpoint: Checkpoint) -> None:
    found, now = checkpoint.facts["versions"], installed_versions(PACKAGES)
    different = [f"{name} {found[name]} (now {now.get(name)})" for name in found if found[name] != now.get(name)]
    if any(found.get(name) != now.get(name) for name in MUST_AGREE):
        raise ValueError(
            f"{checkpoint.path} was written with {', '.join(different)}: a run goes on with the version of sb3-offline-ft "
            "that began it. Install that one, or start the run again."
        )
    if different:
        warn(f"{checkpoint.path} was written with {', '.join(different)}: the run may go on differently in the last bits.")


def _sha256_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
