"""Writes the Python code of the protos beside them. Run by `make proto`; a test runs it and compares."""

import re
import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
PROTO = "vivace/v1/inference.proto"


def generate(out: Path) -> None:
    """Write `inference_pb2.py`, its types and `inference_pb2_grpc.py` under `out`."""
    well_known = str(resources.files("grpc_tools") / "_proto")
    words = ["protoc", f"-I{HERE}", f"-I{well_known}"]
    words += [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    if protoc.main([*words, PROTO]) != 0:
        raise SystemExit(1)
    path = out / "vivace" / "v1" / "inference_pb2_grpc.py"
    text = path.read_text()  # protoc imports from its own root, which is not a package here
    path.write_text(
        re.sub(
            r"^from vivace\.v1 import",
            "from vivace.serving.protos.vivace.v1 import",
            text,
            flags=re.M,
        )
    )


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
