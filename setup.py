"""Compiles protos/ into src/chiasm/v1 whenever the package is built or installed."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def compile_protos() -> None:
    from grpc_tools import protoc

    out = str(ROOT / "src")
    files = sorted(str(p) for p in (ROOT / "protos").rglob("*.proto"))
    flags = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(["protoc", f"-I{ROOT / 'protos'}", *flags, *files]) != 0:
        raise SystemExit("protoc failed")


class BuildWithProtos(build_py):
    def run(self) -> None:
        compile_protos()
        super().run()


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithProtos})
