"""A longer hunt than the tests': `python tests/fuzz/campaign.py [TARGET ...] [--seconds 60]`.

With atheris installed it is guided by the coverage of our own code, else mutations are made at random. What it keeps
are the inputs that reached something new; the smallest of them go into corpus/ (--keep). It ends with status 1 and the
input in a file when a target raises what its callers don't expect.

    corpus, seeds ──► mutate ──► target.run ──► new coverage? ──► kept      unexpected? ──► crash-TARGET-HASH
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from types import ModuleType

ROOT = Path(__file__).parents[2]
if "tests" not in sys.modules:
    sys.modules["tests"] = ModuleType("tests")
    sys.modules["tests"].__path__ = [str(ROOT / "tests")]
CORPUS = Path(__file__).parent / "corpus"
MAX_KEPT = 12
MAX_KEPT_BYTES = 1024


def main() -> int:
    """Run the campaigns one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="which readers (default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("--keep", action="store_true", help="put the smallest new inputs into the corpus")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return _hunt(args.targets[0], Path(args.inside), args.seconds)
    return max(_campaign(name, args.seconds, args.keep) for name in args.targets or _names())


def _campaign(name: str, seconds: int, keep: bool) -> int:
    """One target, in a process of its own: libFuzzer ends the process that it runs in."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, name, "--seconds", str(seconds), "--inside", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        crashes = [path for path in Path(folder).iterdir() if path.name.startswith("crash")]
        found = [path.read_bytes() for path in Path(folder).iterdir() if path.name.startswith("new")]
        found += [path.read_bytes() for path in (Path(folder) / "inputs").glob("*")]
        for crash in crashes:
            data = crash.read_bytes()
            target = Path(f"crash-{name}-{hashlib.sha256(data).hexdigest()[:12]}")
            target.write_bytes(data)
            print(f"{name}: CRASH, see {target}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
        if done.returncode and not crashes:
            print(f"{name}: did not run\n{done.stderr[-3000:]}")
        runs = next((line for line in done.stderr.splitlines()[::-1] if line.startswith("Done ")), "").strip()
        print(f"{name}: {runs or 'no count'}, {len(found)} inputs reached something new")
        if keep:
            _keep(name, found)
        return int(bool(done.returncode))


def _keep(name: str, found: list[bytes]) -> None:
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    small = {it for it in found if it and len(it) <= MAX_KEPT_BYTES}
    for data in sorted(small or {b"\0"}, key=len):  # one file at least: git keeps no empty folders
        if len(list(folder.iterdir())) >= MAX_KEPT:
            return
        (folder / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)


def _hunt(name: str, folder: Path, seconds: int) -> int:
    try:
        import atheris
    except ImportError:
        return _hunt_blindly(name, folder, seconds)
    with atheris.instrument_imports(include=["swarm"]):
        from tests.fuzz.targets import TARGETS
    target, inputs = TARGETS[name], folder / "inputs"
    inputs.mkdir()
    seeds = folder / "seeds"
    seeds.mkdir()
    for number, seed in enumerate(target.seeds()):
        (seeds / str(number)).write_bytes(seed)

    def run(data: bytes) -> None:
        with suppress(*target.expected):
            target.run(data)

    options = [f"-max_total_time={seconds}", "-max_len=4096", "-rss_limit_mb=4096", "-timeout=20"]
    atheris.Setup([sys.argv[0], *options, str(inputs), str(seeds), *map(str, CORPUS.glob(name))], run)
    atheris.Fuzz()
    return 0


def _hunt_blindly(name: str, folder: Path, seconds: int) -> int:
    from tests.fuzz.mutations import mutate
    from tests.fuzz.targets import TARGETS

    target, random = TARGETS[name], Random(0)
    corpus = [*target.seeds(), *(path.read_bytes() for path in (CORPUS / name).glob("*"))]
    until, count = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        data = random.choice(corpus)
        for _ in range(random.randrange(1, 5)):
            data = mutate(data, corpus, random)
        count += 1
        try:
            with suppress(*target.expected):
                target.run(data)
        except BaseException:
            (folder / "crash").write_bytes(data)
            raise
    print(f"Done {count} runs, unguided", file=sys.stderr)
    return 0


def _names() -> list[str]:
    from tests.fuzz.targets import TARGETS

    return list(TARGETS)


if __name__ == "__main__":
    sys.exit(main())
