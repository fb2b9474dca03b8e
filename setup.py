"""Builds the two compiled parts of the package.

`nano_vllm/_ops.so` holds the kernels as torch ops, against LibTorch's stable ABI: one build serves
every torch from 2.11 on and every Python. `nano_vllm._core` is a pybind11 module with the block
allocator and the batch preparation.

Environment:
    NANO_VLLM_BUILD: `cpu`, `cuda`, or `auto` (default): CUDA where an nvcc and a CUDA build of
        torch are there.
        Whether a GPU is visible plays no part.
    TORCH_CUDA_ARCH_LIST: CUDA architectures, as torch's own extensions take them, e.g.
        `8.0;9.0a+PTX`.
    CXXFLAGS: further options of the C++ compiler; they override those given here.
    CUDA_HOME: where the CUDA toolkit is, if not beside the nvcc on the PATH.
    MAX_JOBS: compile jobs at the same time.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
CXXFLAGS = shlex.split(os.environ.get("CXXFLAGS", ""))
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")


def stop(message: str) -> NoReturn:
    sys.exit(f"error: {message}")


try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    stop(
        f"building nano_vllm needs torch >= 2.11 ({error}): pip install torch, "
        "or drop --no-build-isolation"
    )


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        stop(f"nano_vllm needs torch >= 2.11 (LibTorch's stable ABI), found {torch.__version__}")


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        stop(
            f"no C++ compiler: {compiler!r} is not on the PATH; install g++ >= 11 or clang, "
            "or set CXX"
        )


def cuda_home() -> Path | None:
    """The toolkit's folder, by CUDA_HOME, else by the nvcc on the PATH, else the usual place."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    homes = [Path(named)] if named else []
    if on_path is not None:
        homes.append(toolkit_of(on_path))
    homes.append(Path("/usr/local/cuda"))
    for home in homes:
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime_api.h").exists():
            return home
    return None


def toolkit_of(nvcc: str) -> Path:
    """Where this nvcc has its toolkit: it says so itself, as it may be a link or a script."""
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(top[1] if top else Path(nvcc).parent.parent).resolve()


def run_nvcc(home: Path, option: str) -> str:
    return subprocess.run(
        [str(home / "bin" / "nvcc"), option], check=True, capture_output=True, text=True
    ).stdout


def find_cuda() -> Path | None:
    """The toolkit to build CUDA kernels with, or None for a CPU build."""
    choice = os.environ.get("NANO_VLLM_BUILD", "auto")
    if choice not in ("auto", "cpu", "cuda"):
        stop(f"NANO_VLLM_BUILD must be auto, cpu or cuda, got {choice!r}")
    if choice == "cpu" or (choice == "auto" and torch.version.cuda is None):
        return None
    home = cuda_home()
    if home is None:
        if choice == "auto":
            return None
        stop("NANO_VLLM_BUILD=cuda needs nvcc: put it on the PATH or set CUDA_HOME")
    release = re.search(r"release (\d+)\.(\d+)", run_nvcc(home, "--version"))
    if release is None:
        stop(f"could not read the version of {home / 'bin' / 'nvcc'}")
    if torch.version.cuda is not None and torch.version.cuda.split(".")[0] != release[1]:
        stop(
            f"torch is built for CUDA {torch.version.cuda} and nvcc is {release[1]}.{release[2]}: "
            "their major versions must agree; set CUDA_HOME to a matching toolkit, or "
            "NANO_VLLM_BUILD=cpu"
        )
    return home


def architecture_flags(home: Path) -> list[str]:
    """-gencode flags for TORCH_CUDA_ARCH_LIST, else the visible GPU's own, else all that this nvcc
    knows.
    """
    known = set(re.findall(r"compute_(\d+)", run_nvcc(home, "--list-gpu-arch")))
    wanted = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,"))
    if wanted == [""]:
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            wanted = [f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")]
        else:
            wanted = [arch for arch in ARCHITECTURES if re.sub(r"\D", "", arch) in known]
            if not wanted:
                stop(
                    f"{home / 'bin' / 'nvcc'} knows none of the architectures "
                    f"{', '.join(ARCHITECTURES)}"
                )
            wanted[-1] += "+PTX"
    flags = []
    for arch in wanted:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None or match[1] + match[2] not in known:
            stop(
                f"TORCH_CUDA_ARCH_LIST: unknown architecture {arch!r}; "
                f"this nvcc knows {', '.join(sorted(known))}"
            )
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def ops_library(home: Path | None) -> Extension:
    flags = [
        "-O3",
        "-std=c++17",
        "-fvisibility=hidden",
        "-Wall",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    compile_args = {"cxx": [*flags, "-fopenmp", *CXXFLAGS]}
    extension = Extension(
        "nano_vllm._ops",
        sources=sources("*/*_cpu.cpp")
        + [s for s in sources("bindings/*.cpp") if not s.endswith("core.cpp")],
        include_dirs=[str(ROOT / "csrc"), *cpp_extension.include_paths()],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        extra_compile_args=compile_args,
        extra_link_args=["-fopenmp"],
        language="c++",
    )
    if home is not None:
        cpp_extension.CUDA_HOME = str(
            home
        )  # torch looks for nvcc only where torch itself is built for CUDA
        compile_args["cxx"].append("-DNANO_VLLM_CUDA")
        compile_args["nvcc"] = [
            "-O3",
            "-std=c++17",
            "-lineinfo",
            "-DNANO_VLLM_CUDA",
            # torch switches these off for its own sake
            "-U__CUDA_NO_HALF_OPERATORS__",
            "-U__CUDA_NO_HALF_CONVERSIONS__",
            "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
            "-U__CUDA_NO_HALF2_OPERATORS__",
            *architecture_flags(home),
        ]
        extension.sources += sources("*/*.cu")
        extension.include_dirs.append(str(home / "include"))
        extension.library_dirs.append(str(home / "lib64"))
        extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
    return extension


def core_module() -> Extension:
    import pybind11

    return Extension(
        "nano_vllm._core",
        sources=[
            "csrc/bindings/core.cpp",
            "csrc/bindings/decode_rows_core.cpp",
            "csrc/cache/block_allocator.cpp",
            "csrc/cache/decode_rows.cpp",
            "csrc/cache/prepare_batch.cpp",
            "csrc/cache/shared_prefix.cpp",
        ],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        extra_compile_args={
            "cxx": ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", *CXXFLAGS]
        },
        language="c++",
    )


class BuildExtension(cpp_extension.BuildExtension):
    def get_ext_filename(self, ext_name: str) -> str:
        # A library of torch ops is no Python module: it carries no Python's tag.
        if ext_name.endswith("_ops"):
            return os.path.join(*ext_name.split(".")) + ".so"
        return super().get_ext_filename(ext_name)

    def build_extensions(self) -> None:
        self._remove_stale_cuda_objects()
        try:
            super().build_extensions()
        except subprocess.CalledProcessError as error:
            stop(f"the compiler failed (exit code {error.returncode}); its messages are above")

    def _remove_stale_cuda_objects(self) -> None:
        # torch has ninja look at the headers of a .cu file only where torch is built for CUDA.
        headers = [path for kind in ("h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{kind}")]
        newest = max(path.stat().st_mtime for path in headers)
        for source in sources("*/*.cu"):
            compiled = (Path(self.build_temp) / source).with_suffix(".o")
            if compiled.exists() and compiled.stat().st_mtime < newest:
                compiled.unlink()


check_torch()
check_compiler()
setup(ext_modules=[ops_library(find_cuda()), core_module()], cmdclass={"build_ext": BuildExtension})
