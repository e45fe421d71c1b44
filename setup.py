"""Compiles protos/ into src/chiasm/v1 whenever the package is built or installed."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def compile_protos() -> None:
    from grpc_tools import protoc

    out = str(ROOT / "src")
    files = sorted(str(p) for p in (ROOT / "protos/chiasm").rglob("*.proto"))
    flags = [f"-I{ROOT / 'protos'}"]
    flags += [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    # Contracts of other projects keep their own package on the wire; their modules are ours.
    for folder in sorted(p for p in (ROOT / "protos").iterdir() if p.is_dir()):
        if folder.name != "chiasm":
            flags.append(f"-Ichiasm/v1={folder}")
            files += [f"chiasm/v1/{p.name}" for p in sorted(folder.glob("*.proto"))]
    if protoc.main(["protoc", *flags, *files]) != 0:
        raise SystemExit("protoc failed")


class BuildWithProtos(build_py):
    def run(self) -> None:
        compile_protos()
        super().run()


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithProtos})
