"""What loading costs: memory close to the size of the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

D, F = 1024, 16384  # 128 MiB in float32
HOOK = "blocks.4.hook_resid_post"

MEASURE = """
import json, sys
from pathlib import Path
import torch
from sae_core import SAE

def status(field):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field + ":"))

torch.set_num_threads(1)
SAE.load(sys.argv[1])  # imports, and whatever else happens once
found = {}
for path in map(Path, sys.argv[2:]):
    weights = next(file for file in path.iterdir() if file.suffix in (".safetensors", ".pt"))
    size = weights.stat().st_size
    for dtype in (None, "bfloat16"):
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts afresh
        before = status("VmRSS")
        sae = SAE.load(path, dtype=dtype)
        peak = status("VmHWM") - before
        del sae
        found[f"{path.name} as {dtype}"] = peak / size
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("large")
    folders = [root / name for name in ("dictionary_learning", "sparsify", "openmoss")]
    for folder in folders:
        folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    W_FD, V_DF = torch.randn(F, D, generator=generator), torch.randn(D, F, generator=generator)
    b_F, b_D = torch.zeros(F), torch.zeros(D)
    torch.save({"encoder.weight": W_FD, "encoder.bias": b_F, "decoder.weight": V_DF, "bias": b_D}, folders[0] / "ae.pt")
    trainer = {"dict_class": "AutoEncoder", "activation_dim": D, "dict_size": F}
    (folders[0] / "config.json").write_text(json.dumps({"trainer": trainer}))
    sparsify = {"encoder.weight": W_FD, "encoder.bias": b_F, "W_dec": W_FD.clone(), "b_dec": b_D}
    save_file(sparsify, folders[1] / "sae.safetensors")
    (folders[1] / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": F, "expansion_factor": 16, "k": 32}))
    openmoss = {
        "W_E": V_DF,
        "b_E": b_F,
        "W_D": W_FD,
        "b_D": b_D,
        "activation_function.log_jumprelu_threshold": b_F.clone(),
        f"dataset_average_activation_norm.{HOOK}": torch.tensor(5.0),
    }
    save_file(openmoss, folders[2] / "sae_weights.safetensors")
    config = {"sae_type": "sae", "d_model": D, "expansion_factor": F / D, "act_fn": "jumprelu"}
    config |= {"hook_point_in": HOOK, "hook_point_out": HOOK}
    (folders[2] / "config.json").write_text(json.dumps(config))
    return folders


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux reports it")
def test_loading_needs_at_most_a_fifth_more_memory_than_the_file(folders: list[Path]):
    small = Path(__file__).parent / "golden/sparsify/sae"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), *map(str, folders)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert len(measured) == 2 * len(folders)
    assert {name: ratio for name, ratio in measured.items() if ratio > 1.2} == {}
