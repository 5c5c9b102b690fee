"""
Read many damaged files of every kind, and count what comes of it: right data, or one clear error.

    python benchmarks/robust_files/run.py                  # 10,660 files, then write the table
    python benchmarks/robust_files/run.py --n 200          # a sample, which is only told
    python benchmarks/robust_files/run.py --only 1234      # one of them again, with the traceback
    python benchmarks/robust_files/run.py --report         # write the table from the results that are there

Every file has a number, from which with the seed all about it follows. A process reads file after file, with 3 GiB of memory
beside what Python and the libraries take, 20 s of processor time and 60 s of time for each. If it dies, another one goes on.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "robust_files.json", HERE / "robust_files.md"
N, SEED = 10_660, 0
MEMORY, CPU_SECONDS, SECONDS = 3 * 2**30, 20, 60
GOOD = ("the same data", "other values", "one clear error")
BAD = ("wrong data", "unclear error", "other exception", "too slow", "code was run", "process died")
RUNS_CODE = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect")
"""Events that Python tells of, none of which reading a file may cause."""
UNCLEAR = ("UnicodeDecodeError", "UnicodeEncodeError", "JSONDecodeError", "UnsupportedOperation")
"""Subclasses of ``ValueError`` and ``OSError`` that libraries raise without a file's name."""

Outcome = dict[str, Any]


class TooSlow(BaseException):
    """Not an ``Exception``, which readers take for damage."""


class CodeRun(BaseException):
    """As above."""


def mutate(number: int, seed: int, examples: Path, folder: Path) -> tuple[str, str]:
    """Write the damaged file of a number into a folder; gives its format and what was done to it."""
    import numpy as np
    from formats import FORMATS
    from mutations import mutations_for, replace_file

    rng = np.random.default_rng([seed, number])
    name = list(FORMATS)[number % len(FORMATS)]
    shutil.copytree(examples / name, folder)
    pattern = FORMATS[name].files[int(rng.integers(len(FORMATS[name].files)))]
    fitting = sorted(folder.glob(pattern))
    path = fitting[int(rng.integers(len(fitting)))]
    if rng.random() < 0.02:
        return name, f"{path.name}: {replace_file(path, rng)}"
    done = []
    for _ in range(1 if rng.random() < 0.8 else 2):
        choices = mutations_for(path)
        mutation = choices[int(rng.integers(len(choices)))]
        try:
            path.write_bytes(mutation(path.read_bytes(), rng))
            done.append(mutation.__name__)
        # The second finds a file that is no longer of its kind
        except Exception:
            done.append(f"({mutation.__name__})")
    return name, f"{path.name}: {', '.join(done)}"


def read(name: str, folder: Path, expected: str, is_bytes_only: bool) -> Outcome:
    """Read a file, and say what came of it."""
    from formats import FORMATS

    begin = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = FORMATS[name].read(folder)
        if found == expected:
            outcome, detail = "the same data", ""
        else:
            fits = FORMATS[name].fits
            outcome, detail = ("wrong data" if fits and is_bytes_only and not fits(found, expected) else "other values"), ""
    except TooSlow:
        outcome, detail = "too slow", traceback.format_exc()
    except CodeRun as error:
        outcome, detail = "code was run", str(error)
    except (ValueError, OSError, ImportError) as error:
        kind, text = type(error).__name__, " ".join(str(error).split())
        names = {path.name for path in folder.rglob("*") if path.suffix} | {str(folder)}
        is_clear = kind not in UNCLEAR and not isinstance(error, ImportError) and any(each in text for each in names)
        outcome = "one clear error" if is_clear and len(text) < 3000 else "unclear error"
        detail = f"{kind}: {text[:600]}" if is_clear else traceback.format_exc()
    except BaseException:
        outcome, detail = "other exception", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"outcome": outcome, "detail": detail, "seconds": round(time.process_time() - begin, 3)}


def work(pipe: Connection, examples: Path, seed: int) -> None:
    """Read the files of the numbers that come through a pipe."""
    sys.path.insert(0, str(HERE))
    from formats import FORMATS, make_examples

    if not examples.exists():
        make_examples(examples)

    def too_slow(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, too_slow)
    is_reading = False

    def hook(event: str, _: Any) -> None:
        if is_reading and event in RUNS_CODE:
            raise CodeRun(event)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Everything is imported and warm before memory and time count
        expected = {name: each.read(examples / name) for name, each in FORMATS.items()}
    sys.addaudithook(hook)
    status = Path("/proc/self/statm").read_text().split()
    resource.setrlimit(resource.RLIMIT_AS, (int(status[0]) * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send("ready")
    with tempfile.TemporaryDirectory() as place:
        while (number := pipe.recv()) is not None:
            folder = Path(place) / f"file{number}"
            name, what = mutate(number, seed, examples, folder)
            pipe.send((name, what))
            is_reading = True
            bytes_only = not any(word in what for word in ("change_members", "swell", "bomb"))
            outcome = read(name, folder, expected[name], bytes_only)
            is_reading = False
            pipe.send(outcome)
            shutil.rmtree(folder)


def outcomes(numbers: list[int], seed: int) -> Iterator[Outcome]:
    """What comes of the files of these numbers, in order."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        process = None
        for number in numbers:
            if process is None:
                pipe, other = context.Pipe()
                process = context.Process(target=work, args=(other, Path(place) / "examples", seed), daemon=True)
                process.start()
                other.close()
                # An example that cannot be read ends it all
                assert pipe.recv() == "ready"
            name, what, outcome = "", "", {"outcome": "process died", "detail": "", "seconds": 0.0}
            try:
                pipe.send(number)
                name, what = pipe.recv()
                if pipe.poll(SECONDS):
                    outcome = pipe.recv()
                else:
                    outcome = {"outcome": "too slow", "detail": f"more than {SECONDS} s", "seconds": float(SECONDS)}
                    process.kill()
            except (EOFError, OSError):
                process.join()
                outcome["detail"] = f"exit status {process.exitcode}"
            if outcome["outcome"] == "process died" or not process.is_alive() or outcome["seconds"] == SECONDS:
                process.kill()
                process.join()
                process = None
            yield {"number": number, "format": name, "what": what, **outcome}
        if process is not None:
            pipe.send(None)
            process.join()


def summary(found: list[Outcome], seed: int) -> dict[str, Any]:
    """The small file that is kept: counts by format, and all that went wrong."""
    counts: dict[str, Counter[str]] = {}
    for one in found:
        counts.setdefault(one["format"], Counter())[one["outcome"]] += 1
    keys = ("number", "format", "what", "outcome")
    return {
        "seed": seed,
        "files": len(found),
        "counts": {name: dict(each) for name, each in counts.items()},
        "slowest": {name: max(one["seconds"] for one in found if one["format"] == name) for name in counts},
        "bad": [{key: one[key] for key in keys} for one in found if one["outcome"] in BAD],
    }


def table(result: dict[str, Any]) -> str:
    """The result as a page."""
    columns = [*GOOD, "anything else", "slowest (s)"]
    lines = [f"| kind of file | files | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    total: Counter[str] = Counter()
    for name, counts in result["counts"].items():
        total.update(counts)
        bad = sum(counts.get(each, 0) for each in BAD)
        cells = [*(counts.get(each, 0) for each in GOOD), bad, f"{result['slowest'][name]:.1f}"]
        lines.append(f"| {name} | {sum(counts.values()):,} | {' | '.join(map(str, cells))} |")
    bad = sum(total[each] for each in BAD)
    cells = [*(f"{total[each]:,}" for each in GOOD), str(bad), f"{max(result['slowest'].values()):.1f}"]
    lines.append(f"| **all** | {result['files']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=N, help="number of files")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", type=int, nargs="*", help="only the files of these numbers, told in full")
    parser.add_argument("--details", type=Path, help="a file of lines of JSON, to which all that was found is added")
    parser.add_argument("--report", action="store_true", help="write the table only")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not given.report:
        numbers = list(range(given.n)) if given.only is None else given.only
        found = []
        for outcome in outcomes(numbers, given.seed):
            found.append(outcome)
            if given.details is not None:
                given.details.open("a").write(json.dumps(outcome) + "\n")
            if given.only is not None or outcome["outcome"] in BAD:
                print(json.dumps(outcome, indent=1).replace("\\n", "\n"), flush=True)
            elif len(found) % 500 == 0:
                print(f"{len(found):,} files", flush=True)
        result = summary(found, given.seed)
        if given.only is not None or given.n != N:
            print(table(result))
            sys.exit(1 if result["bad"] else 0)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    TABLE.write_text(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
